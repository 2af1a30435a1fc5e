"""What every result file says about the machine, and where result files go."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# What timings and counts depend on, where it is installed.
PACKAGES = ("torchvision", "numpy", "fvcore", "timm", "torch-pruning")

if importlib.util.find_spec("blockprune") is None:
    # A machine with the dependencies need not have the package installed: the checkout will do.
    sys.path.insert(0, str(Path(__file__).parent.parent))


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Describe the machine in terms that matter for timings and name nobody."""
    gpu = {}
    if device is not None and device.type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_installed(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_result(
    name: str, result: Mapping[str, Any], out: Path | None, device: torch.device | None = None
) -> Path:
    """Write a result with the machine it is from; the file is replaced as a whole.

    ``out`` None is ``results/NAME.json``, or ``results/NAME_cuda.json`` for what ran on a GPU.
    """
    suffix = "_cuda" if device is not None and device.type == "cuda" else ""
    path = out or RESULTS / f"{name}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps({"machine": machine(device), **result}, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def _installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
