"""Every model of torchvision, timm and transformers: its blocks, and its tickets checked.

Each model runs in a process of its own, with limits to its time and its memory, so that a failure
ends nothing else. Weights are random and nothing is downloaded. Finished models are kept in
`results/`, and `--resume` goes on from there.

`others` are tiny models of many more libraries, whose branches were counted by reading their
sources. It needs these libraries, which nothing else does: `pip install -e '.[zoo-others]'`.

    python benchmarks/zoo_coverage.py                                   # the first three libraries
    python benchmarks/zoo_coverage.py torchvision --names 'resnet*' vit_b_16
    python benchmarks/zoo_coverage.py timm --resume
    python benchmarks/zoo_coverage.py others --jobs 2                   # third-party libraries
    python benchmarks/zoo_coverage.py others --only monai diffusers
    python benchmarks/zoo_coverage.py --document                        # docs/coverage.md only
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _coverage.children import Limits, Task, run_all
from _coverage.document import document
from _coverage.libraries import (
    LIBRARIES,
    VERIFY,
    distributions_of,
    first_tasks,
    names_of,
    smallest_tasks,
)
from _coverage.others_models import INSTALL, OTHERS, MissingLibraryError, prepare
from _coverage.progress import Progress, versions
from _coverage.status import is_failed, status_of
from _coverage.study import Row, verdict_of
from _machine import RESULTS, write_result

DOCUMENT = Path(__file__).parent.parent / "docs" / "coverage.md"


def main() -> None:
    """Sweep libraries, write the results and the report, and fail where a model failed."""
    arguments = _arguments()
    libraries = [arguments.library] if arguments.library else list(LIBRARIES)
    failed = 0
    if not arguments.document:
        for library in libraries:
            try:
                failed += _sweep(library, arguments)
            except MissingLibraryError as error:
                raise SystemExit(f"zoo_coverage.py: {error}") from None
    # A part of a library is no coverage of it.
    if arguments.document or not (arguments.names or arguments.only or arguments.out):
        _write_document()
    if failed:
        raise SystemExit(1)


def _sweep(library: str, arguments: argparse.Namespace) -> int:
    """Study the models of one library; return how many failed."""
    names = _chosen(library, [*arguments.names, *(f"{only}/*" for only in arguments.only)])
    if not names:
        print(f"no model of {library} is called {' or '.join(arguments.names or arguments.only)}")
        return 0
    distributions = distributions_of(library, names)
    if library == OTHERS:
        prepare(distributions)
    part = "_part" if arguments.names or arguments.only else ""
    path: Path = arguments.out or RESULTS / f"zoo_coverage_{library}{part}.json"
    made_with = versions(distributions)
    progress = Progress(path.with_suffix(".jsonl"), made_with, resume=arguments.resume)
    verify = arguments.verify or VERIFY[library]
    found = ", ".join(f"{name} {made_with[name]}" for name in distributions)
    print(f"{found}: {len(names)} models\n{_HEAD}", flush=True)
    _run(first_tasks(library, names, verify), progress, arguments)
    if verify == "smallest":
        rows = [row for row in progress.rows if row["task"] != "verify" and row["name"] in names]
        _run(smallest_tasks(library, rows), progress, arguments)
    rows = [row for row in progress.rows if row["name"] in names]
    result = {"versions": made_with, "names": len(names), "models": rows}
    write_result(path.stem, result, path)
    failed = [row["name"] for row in rows if is_failed(row)]
    print(f"{len(rows)} rows, {len(failed)} failed; {path}", flush=True)
    return len(failed)


def _run(tasks: Iterable[Task], progress: Progress, arguments: argparse.Namespace) -> None:
    """Run the tasks that are not done yet, keeping and printing each row."""
    limits = Limits(arguments.seconds, arguments.gigabytes)
    waiting = (
        task
        for task in tasks
        if progress.found(name=task.label["name"], task=task.label["task"]) is None
    )
    log = progress.path.with_suffix(".log")
    for row in run_all(waiting, limits, arguments.jobs, log):
        print(_line(progress.add(row)), flush=True)


def _write_document() -> None:
    paths = {name: RESULTS / f"zoo_coverage_{name}.json" for name in (*LIBRARIES, OTHERS)}
    results: dict[str, Any] = {
        library: json.loads(path.read_text()) for library, path in paths.items() if path.exists()
    }
    DOCUMENT.write_text(document(results))
    print(f"{DOCUMENT} from the results of {', '.join(results) or 'no library'}")


def _chosen(library: str, patterns: list[str]) -> list[str]:
    return [
        name
        for name in names_of(library)
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


_COLUMNS = (
    ("model", "<44"),
    ("traced", "<18"),
    ("branches", ">8"),
    ("residual", ">8"),
    ("layers", ">6"),
    ("refused", ">7"),
    ("seconds", ">7"),
    ("peak MB", ">7"),
)
_HEAD = " ".join(f"{name:{width}}" for name, width in _COLUMNS) + "  verdict"


def _line(row: Row) -> str:
    """One line of the table that is printed."""
    verdict, why = status_of(row) if "expected" in row else verdict_of(row)
    cells = (
        row["name"],
        row.get("traced", ""),
        row.get("branches", ""),
        row.get("residual", ""),
        row.get("layers", ""),
        sum(row.get("refused", {}).values()),
        round(sum(row.get("seconds", {}).values()), 1),
        row.get("peak_mb", ""),
    )
    line = " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return f"{line}  {verdict}{': ' + why if why else ''}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="blocks and tickets of whole model libraries")
    parser.add_argument(
        "library",
        nargs="?",
        choices=[*LIBRARIES, OTHERS],
        help=f"default: all but {OTHERS}, third-party libraries that need {INSTALL}",
    )
    parser.add_argument("--names", nargs="+", default=[], metavar="GLOB", help="only these models")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="LIBRARY",
        help=f"of {OTHERS}, only these libraries",
    )
    parser.add_argument("--resume", action="store_true", help="keep rows made with these versions")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument(
        "--verify",
        choices=["all", "smallest", "none"],
        help="whose tickets are checked (default: all; of timm, the smallest of each file)",
    )
    parser.add_argument("--out", type=Path, help="result file (default: results/)")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=20, help="limit for one model")
    parser.add_argument("--document", action="store_true", help="only write docs/coverage.md")
    arguments = parser.parse_args()
    if arguments.out and not arguments.library:
        parser.error("--out names one file, so name one library")
    if arguments.only and arguments.library != OTHERS:
        parser.error(f"--only names libraries of {OTHERS}")
    return arguments


if __name__ == "__main__":
    main()
