"""Run the experiments on digits, and gather who wins and which findings of the papers they show.

python benchmarks/lottery.py --runs FOLDER               # all of them; taken up where left
python benchmarks/lottery.py --runs FOLDER digits-quick  # one
python benchmarks/lottery.py --runs FOLDER --gather      # only what has ended
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _machine import write_result

from blockprune.lottery import RunRecord, read_specs, run
from blockprune.report import read_run, runs_in
from blockprune.report.cases import Cases
from blockprune.report.findings import findings_of

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = (
    "digits-table1",
    "digits-table2",
    "digits-ltr",
    "digits-stability",
    "digits-structures",
    "digits-table5",
)


def main() -> None:
    """Run what is asked for, and write one summary of everything in the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="files of examples/, without .toml")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--gather", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, help="JSON file (default in results/)")
    options = parser.parse_args()
    if not options.gather:
        for name in options.names:
            took = run_example(name, options.runs / name, options.jobs)
            print(f"{name}: {took:.0f} s")
    runs = [one for name in options.names for one in summaries(name, options.runs / name)]
    print(f"written to {write_result('lottery', {'runs': runs}, options.out)}")


def run_example(name: str, folder: Path, jobs: int) -> float:
    """Run every spec of an example; return the seconds that this call took."""
    begin = time.perf_counter()
    specs = read_specs(EXAMPLES / f"{name}.toml")
    command = f"blockprune lottery run examples/{name}.toml --out {name} --jobs {jobs}"
    for spec in specs:
        run(spec, folder if len(specs) == 1 else folder / spec.name, jobs=jobs, command=command)
    return time.perf_counter() - begin


def summaries(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what each ended run of an example comes to."""
    for place in (folder, *(runs_in(folder) if folder.is_dir() else ())):
        if (place / "results.json").exists():
            yield summary(name, read_run(place))


def summary(example: str, record: RunRecord) -> dict[str, Any]:
    """Return what one run comes to."""
    cases = Cases(record)
    return {
        "example": example,
        "name": record.name,
        "environment": record.environment,
        "data": record.data,
        "seeds": list(cases.seeds),
        "xi_points": record.xi_points,
        "confidence": record.confidence,
        "trainings": len({network.stage for network in record.networks}),
        "training_seconds": sum(
            {network.stage: network.seconds for network in record.networks}.values()
        ),
        "failures": len(record.failures),
        "dense_percent": [100 * network.accuracy for network in cases.dense],
        "verdicts": [
            {
                "case": verdict.case.label(),
                "kind": verdict.case.kind,
                "mean": verdict.mean,
                "interval": verdict.interval,
                "over_random": verdict.against_random,
                "verdict": verdict.verdict,
                **_costs(cases, record, verdict.case),
            }
            for verdict in record.verdicts
        ],
        "findings": [
            {
                "paper": finding.paper,
                "claim": finding.claim,
                "decision": finding.decision,
                "figures": finding.figures,
            }
            for finding in findings_of(cases)
        ],
    }


def _costs(cases: Cases, record: RunRecord, case: Any) -> dict[str, float]:
    """Return what a case takes over the dense network, means over seeds."""
    networks = cases.networks(case)
    found = {
        "params": _ratio([n.params for n in networks], [n.params for n in cases.dense]),
        "macs": _ratio([n.macs for n in networks], [n.macs for n in cases.dense]),
        "training": _ratio([n.seconds for n in networks], [n.seconds for n in cases.dense]),
    }
    times = [n.latency_ms for n in networks if n.latency_ms is not None]
    dense = [n.latency_ms for n in cases.dense if n.latency_ms is not None]
    if times and dense:
        found["latency"] = _ratio(times, dense)
    return found


def _ratio(values: Sequence[float], dense: Sequence[float]) -> float:
    return round(statistics.fmean(values) / statistics.fmean(dense), 4)


if __name__ == "__main__":
    main()
