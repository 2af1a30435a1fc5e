"""Models of third-party libraries, each a configuration with the number of its branches.

The libraries are no dependency of the tests; the extra `zoo-others` installs them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterable
from importlib import metadata

from .others import CONFIGURATIONS, Built, Configuration
from .waking import wake

__all__ = [
    "INSTALL",
    "OTHERS",
    "MissingLibraryError",
    "build",
    "configuration",
    "names",
    "prepare",
]

OTHERS = "others"
"""The name of this sweep, where the other sweeps have that of their library."""

INSTALL = "pip install -e '.[zoo-others]'"

# What has another name as a module than as a distribution.
MODULES = {
    "chronos-forecasting": "chronos",
    "open-clip-torch": "open_clip",
}

_BY_NAME = {each.name: each for each in CONFIGURATIONS}


class MissingLibraryError(Exception):
    """Libraries of the sweep are not installed."""


def names() -> list[str]:
    """Return the names of all configurations."""
    return list(_BY_NAME)


def configuration(name: str) -> Configuration:
    """Return the configuration of that name."""
    return _BY_NAME[name]


def build(name: str) -> Built:
    """Build a model with random weights, and its inputs."""
    model, inputs = configuration(name).build()
    return wake(model), inputs


def prepare(libraries: Iterable[str]) -> None:
    """Import libraries once, so that no child has to.

    Raises:
        MissingLibraryError: some are not installed.
    """
    libraries = list(libraries)
    missing = [library for library in libraries if not _is_installed(library)]
    if missing:
        raise MissingLibraryError(
            f"not installed: {', '.join(missing)}; {INSTALL} installs what the sweep needs"
        )
    # It would ask the network for newer versions of itself.
    os.environ["YOLO_OFFLINE"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            importlib.import_module(MODULES.get(library, library.replace("-", "_")))


def _is_installed(library: str) -> bool:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return False
    return True
