"""Energy and CO2 of a piece of work: by formula from its time, or metered part by part.

The formula is that of the ML CO2 Impact calculator, which the papers use::

    kWh = watts * hours / 1000
    kg  = kWh * grid

with `watts` the power of the device, taken as drawn all the time, and `grid` the kg of CO2
equivalents that the grid emits for a kWh. Under it, CO2 saved is time saved.

The meter is codecarbon (extra `carbon`), told to stay offline and to write nothing. What it gives
for a part of the machine is a measurement where a counter can be read, and a guess where none can:
each figure says which, and where it comes from.

Source: Lacoste et al., "Quantifying the Carbon Emissions of Machine Learning", 2019.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from blockprune.errors import MeasurementError, MissingExtraError

__all__ = [
    "CPU_WATTS",
    "GPU_WATTS",
    "GRID_KG_PER_KWH",
    "Energy",
    "EnergyPart",
    "check_meter",
    "formula_energy",
    "metered_energy",
]

GRID_KG_PER_KWH = 0.432
"""What the ML CO2 Impact calculator takes for private machines: the OECD's mean of 2014."""

GPU_WATTS = 300.0
"""Thermal design power of a Tesla V100 SXM2, a usual choice in that calculator."""

CPU_WATTS = 85.0
"""What codecarbon takes for a CPU that it does not know."""

_COUNTERS = {
    "intel_rapl": "RAPL counters, of the whole package",
    "windows_emi": "Windows energy meter, of the whole package",
    "intel_power_gadget": "Intel Power Gadget, of the whole package",
}


@dataclass(frozen=True)
class EnergyPart:
    """What one part of a machine used.

    Attributes:
        name: "CPU", "GPU", "RAM", or "device" for the formula.
        kwh: energy in kWh.
        measured: whether a counter was read; False: it is an estimate.
        source: the counter, or what the estimate assumes.
    """

    name: str
    kwh: float
    measured: bool
    source: str


@dataclass(frozen=True)
class Energy:
    """Energy and CO2 of a piece of work.

    Attributes:
        seconds: that the work took.
        parts: of the machine, with what each used.
        grid_kg_per_kwh: kg of CO2 equivalents emitted for a kWh.
    """

    seconds: float
    parts: tuple[EnergyPart, ...]
    grid_kg_per_kwh: float

    @property
    def kwh(self) -> float:
        """Energy of all parts, in kWh."""
        return math.fsum(part.kwh for part in self.parts)

    @property
    def co2_kg(self) -> float:
        """CO2 equivalents in kg: ``kwh * grid_kg_per_kwh``."""
        return self.kwh * self.grid_kg_per_kwh

    def times(self, factor: float) -> Energy:
        """Return the energy of ``factor`` times the work."""
        parts = tuple(replace(part, kwh=part.kwh * factor) for part in self.parts)
        return Energy(self.seconds * factor, parts, self.grid_kg_per_kwh)


def formula_energy(
    seconds: float, watts: float, grid_kg_per_kwh: float = GRID_KG_PER_KWH
) -> Energy:
    """Return the energy of a device that draws the same power all the time.

    Args:
        seconds: 0 or more.
        watts: above 0; the thermal design power of the device is what is usually given.
        grid_kg_per_kwh: of the grid, 0 or more.

    Raises:
        MeasurementError: a number is out of range.

    Example:
        >>> from blockprune.profiling import formula_energy
        >>> found = formula_energy(seconds=7200, watts=250, grid_kg_per_kwh=0.4)
        >>> found.kwh, found.co2_kg
        (0.5, 0.2)

    Source: Lacoste et al., "Quantifying the Carbon Emissions of Machine Learning", 2019.
    """
    _check("seconds", seconds, zero=True)
    _check("watts", watts, zero=False)
    _check("grid_kg_per_kwh", grid_kg_per_kwh, zero=True)
    kwh = watts * (seconds / 3600) / 1000
    part = EnergyPart("device", kwh, measured=False, source=f"{watts:g} W all the time")
    return Energy(seconds, (part,), grid_kg_per_kwh)


def metered_energy(
    work: Callable[[], object], *, grid_kg_per_kwh: float = GRID_KG_PER_KWH
) -> Energy:
    """Return the energy that codecarbon meters while `work` is done.

    It looks at the CPU and the memory of this process and at the whole GPUs, and works offline.
    Files and settings that codecarbon would read for where to report to are overruled.

    Args:
        work: called once; some seconds at least, since estimates look about once a second.
        grid_kg_per_kwh: of the grid, 0 or more.

    Raises:
        MissingExtraError: codecarbon is not installed.
        MeasurementError: the grid's number is out of range, or codecarbon gave no figures.

    Example:
        ``metered_energy(lambda: train(model, data.train, recipe)).co2_kg``

    Source: https://codecarbon.io
    """
    _check("grid_kg_per_kwh", grid_kg_per_kwh, zero=True)
    codecarbon = check_meter()
    with _silent(), tempfile.TemporaryDirectory() as scratch:
        tracker = _tracker(codecarbon, scratch, grid_kg_per_kwh)
        tracker.start()
        start = time.perf_counter()
        try:
            work()
        finally:
            seconds = time.perf_counter() - start
            tracker.stop()
    found = getattr(tracker, "final_emissions_data", None)
    if found is None:
        raise MeasurementError(
            "codecarbon gave no figures for this machine; energy by formula (formula_energy) "
            "needs only the time and the power of the device."
        )
    sources = _sources(getattr(tracker, "_hardware", ()))
    energies = {"CPU": found.cpu_energy, "GPU": found.gpu_energy, "RAM": found.ram_energy}
    parts = tuple(
        EnergyPart(name, energies[name], *sources[name]) for name in energies if name in sources
    )
    return Energy(seconds, parts, grid_kg_per_kwh)


def check_meter() -> ModuleType:
    """Return codecarbon.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # What its own dependencies will change one day.
            warnings.simplefilter("ignore")
            return importlib.import_module("codecarbon")
    except ImportError as error:
        raise MissingExtraError(
            "Metering energy needs codecarbon, which is not installed: "
            "pip install 'blockprune[carbon]'"
        ) from error


def _tracker(codecarbon: ModuleType, scratch: str, grid_kg_per_kwh: float) -> Any:
    # Each setting is given: one that is left out is read from files and the environment, and
    # those can name a server to report to.
    return codecarbon.OfflineEmissionsTracker(
        project_name="blockprune",
        measure_power_secs=15,
        api_call_interval=-1,
        output_methods=[],
        output_handlers=[],
        output_dir=scratch,
        emissions_endpoint=False,
        electricitymaps_api_token="",
        country_iso_code=None,
        country_2letter_iso_code=None,
        region=None,
        cloud_provider=None,
        cloud_region=None,
        force_carbon_intensity_g_co2e_kwh=1e3 * grid_kg_per_kwh,
        tracking_mode="process",
        allow_multiple_runs=True,
        pue=1.0,
        wue=0.0,
        log_level="critical",
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep codecarbon's log and warnings to itself."""
    logger = logging.getLogger("codecarbon")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sources(hardware: Any) -> dict[str, tuple[bool, str]]:
    """Return, for each part of the machine, whether it is measured, and by what."""
    sources: dict[str, tuple[bool, str]] = {}
    for item in hardware:
        kind = type(item).__name__
        if kind == "CPU":
            sources["CPU"] = _cpu_source(getattr(item, "_mode", ""), getattr(item, "_tdp", None))
        elif kind == "GPU":
            sources["GPU"] = True, "counters of the whole GPUs"
        elif kind == "RAM":
            sources["RAM"] = False, "watts for the memory's size"
        else:
            # Chips that measure their own parts: Apple's, Raspberry's.
            sources[str(getattr(item, "chip_part", kind))] = True, f"{kind}'s own counters"
    return sources


def _cpu_source(mode: str, watts: float | None) -> tuple[bool, str]:
    if mode in _COUNTERS:
        return True, _COUNTERS[mode]
    assumed = "an assumed power" if watts is None else f"{watts:g} W"
    return False, f"{assumed} times {'the load' if mode == 'cpu_load' else 'a half'}"


def _check(name: str, value: float, *, zero: bool) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (value == 0 and not zero):
        wanted = "0 or more" if zero else "above 0"
        raise MeasurementError(f"{name} must be a number {wanted}, got {value!r}.")
