"""``blockprune doctor`` and ``blockprune --version --verbose``: what is installed, what works."""

from __future__ import annotations

from dataclasses import asdict

from blockprune.cli.output import print_json, print_line, print_table, print_wrapped, working
from blockprune.doctor import examine, versions

__all__ = ["print_versions", "run"]


def run(*, as_json: bool) -> int:
    """Try every part of the installation, and print what was found.

    Returns:
        The exit code: 0, or 1 where a part of the core does not work.
    """
    with working("Trying every part ..."):
        findings = examine()
    works = all(finding.state == "works" for finding in findings if finding.is_core)
    if as_json:
        print_json({"core_works": works, "parts": [asdict(finding) for finding in findings]})
        return 0 if works else 1
    rows = [
        (finding.part, "core" if finding.is_core else "", finding.version or "-", finding.state)
        for finding in findings
    ]
    print_table(("part", "", "version", "state"), rows)
    print_line("")
    for finding in findings:
        print_wrapped(finding.detail, label=f"{finding.part}:")
    print_line("")
    print_line("The core works." if works else "The core does not work: see above.")
    return 0 if works else 1


def print_versions() -> None:
    """Print what a report of a bug needs, a line for each thing."""
    found = versions()
    width = max(map(len, found))
    for name, value in found.items():
        print_line(f"{name:<{width}}  {value}")
