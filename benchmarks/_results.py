"""What the scripts share: where to run, targets, and results that survive an interruption."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _machine import write_result

MISSED, MET = "MISSED", "met"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file (default in results/)")
    return parser


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that was asked for, with torch's threads set."""
    if options.threads < 1:
        raise SystemExit(f"--threads must be at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no GPU; --device cpu works")
    torch.set_num_threads(options.threads)
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_positive(**counts: int) -> None:
    """Refuse counts below 1 before anything is measured."""
    for name, value in counts.items():
        if value < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {value}")


class Results:
    """A result file that is whole on disk after each part.

    Args:
        name: of the script.
        options: its arguments, with `out`.
        device: what it runs on.
        settings: what the figures depend on.
    """

    def __init__(
        self, name: str, options: argparse.Namespace, device: torch.device, **settings: Any
    ) -> None:
        self._name, self._out, self._device = name, options.out, device
        self._parts: dict[str, Any] = {
            "device": device.type,
            "settings": settings,
            "targets": [],
            "skipped": {},
        }
        self.path = self._write()

    def add(self, section: str, key: str, **parts: Any) -> None:
        """Keep parts of the entry `key` of a section."""
        self._parts.setdefault(section, {}).setdefault(key, {}).update(parts)
        self._write()

    def skip(self, what: str, why: str) -> None:
        """Keep why a part was not measured."""
        self._parts["skipped"][what] = why
        print(f"  skipped: {what}: {why}", flush=True)
        self._write()

    def target(
        self, what: str, value: float, *, at_most: float, at_least: float | None = None
    ) -> None:
        """Hold a figure against what is to be reached."""
        met = value <= at_most and (at_least is None or value >= at_least)
        bounds = {} if at_least is None else {"at_least": at_least}
        row = {"what": what, "value": value, **bounds, "at_most": at_most, "met": met}
        self._parts["targets"].append(row)
        print(f"  {target_line(row)}", flush=True)
        self._write()

    def _write(self) -> Path:
        return write_result(self._name, self._parts, self._out, self._device)


def target_line(row: dict[str, Any]) -> str:
    """Return a target and its figure in words."""
    low = f"{row['at_least']} to " if "at_least" in row else "at most "
    verdict = MET if row["met"] else MISSED
    return f"{row['what']}: {row['value']:.3f} (target {low}{row['at_most']}: {verdict})"
