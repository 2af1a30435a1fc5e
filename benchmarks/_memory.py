"""How much memory a call takes at its peak, above where it started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be measured: on a GPU, and on Linux."""
    return device.type == "cuda" or (CLEAR.exists() and STATUS.exists())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of a call: of torch's allocator on a GPU, else of resident memory.

    Resident memory counts nothing that is freed and used again, so each call has to be the first
    of its process: see `in_own_process`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _kilobytes("VmRSS")
    CLEAR.write_text("5")  # the peak starts again from here
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def in_own_process(script: str, arguments: Sequence[str]) -> Any:
    """Run a script again with these arguments, and return the JSON that it prints last."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _kilobytes(field: str) -> int:
    return int(STATUS.read_text().partition(f"{field}:")[2].split()[0])
