"""`python -m tests.fuzz --cases 10000 --seed 0 --jobs 2`: exit status 1 where a law is broken."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Iterator

from tests.fuzz.cases import failure
from tests.fuzz.laws import SHARES


def _results(cases: range, seed: int, jobs: int) -> Iterator[str | None]:
    # A process that is spawned finds what is asked of it by the name of its module, which a
    # program that is being run has not: so it is not in this file.
    check = functools.partial(failure, seed=seed)
    if jobs == 1:
        yield from map(check, cases)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(check, cases, chunksize=8)  # in order: what is done is a range
        pool.close()
        pool.join()


def main() -> int:
    """Check the cases asked for and print each failure as a program."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0, help="of all of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    shares = ", ".join(f"{law} {share:.0%}" for law, share in SHARES.items())
    print(f"laws that a share of the cases is checked against: {shares}", flush=True)
    failures, start = 0, time.monotonic()
    cases = range(options.first, options.first + options.cases)
    for done, text in enumerate(_results(cases, options.seed, options.jobs), start=1):
        if text is not None:
            failures += 1
            print(f"{text}\n", flush=True)
        if done % 100 == 0 or done == options.cases:
            rate = done / (time.monotonic() - start)
            print(f"{done} cases, {failures} failures, {rate:.1f} cases/s", file=sys.stderr)
    print(f"{options.cases} cases of seed {options.seed}: {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
