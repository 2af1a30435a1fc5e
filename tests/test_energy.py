"""Energy and CO2: the formula by hand, and codecarbon kept offline."""

from __future__ import annotations

import logging
import math
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from blockprune.errors import MeasurementError, MissingExtraError
from blockprune.profiling import Energy, EnergyPart, formula_energy, metered_energy


def test_the_formula_by_hand() -> None:
    # 250 W for two hours are half a kWh.
    found = formula_energy(2 * 3600, 250, 0.432)
    assert found.kwh == pytest.approx(0.5)
    assert found.co2_kg == pytest.approx(0.216)
    [part] = found.parts
    assert (part.name, part.measured, part.source) == ("device", False, "250 W all the time")
    # The calculator's own example: 100 hours of a V100 (300 W) at 0.432 kg/kWh emit 12.96 kg.
    assert formula_energy(100 * 3600, 300).co2_kg == pytest.approx(12.96)
    assert formula_energy(0, 300).co2_kg == 0


def test_energy_scales_part_by_part() -> None:
    parts = (EnergyPart("CPU", 1.0, True, "a"), EnergyPart("RAM", 0.5, False, "b"))
    found = Energy(10.0, parts, 0.2).times(4)
    assert (found.seconds, found.kwh, found.co2_kg) == (40.0, 6.0, pytest.approx(1.2))
    assert [(part.name, part.kwh, part.source) for part in found.parts] == [
        ("CPU", 4.0, "a"),
        ("RAM", 2.0, "b"),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"seconds": -1},
        {"seconds": math.nan},
        {"watts": 0},
        {"watts": -5},
        {"watts": math.inf},
        {"watts": True},
        {"watts": "300"},
        {"grid_kg_per_kwh": -0.1},
    ],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(MeasurementError, match=f"{name} must be a number"):
        formula_energy(**{"seconds": 1, "watts": 1, "grid_kg_per_kwh": 1, **arguments})


def test_an_absent_meter_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    done: list[int] = []
    with pytest.raises(MissingExtraError, match=r"pip install 'blockprune\[carbon\]'"):
        metered_energy(lambda: done.append(1))
    assert not done


class CPU:
    def __init__(self, mode: str, tdp: float) -> None:
        self._mode, self._tdp = mode, tdp


class GPU:
    pass


class RAM:
    pass


class AppleSiliconChip:
    chip_part = "CPU"


@pytest.fixture
def fake_meter(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for codecarbon; note how it was set up, and give figures that are known."""
    record = SimpleNamespace(settings={}, events=[], hardware=[], figures=True)

    class OfflineEmissionsTracker:
        def __init__(self, **settings: Any) -> None:
            record.settings = settings
            record.folder_existed = Path(settings["output_dir"]).is_dir()

        def start(self) -> None:
            record.events.append("start")

        def stop(self) -> None:
            record.events.append("stop")
            self._hardware = record.hardware
            if record.figures:
                self.final_emissions_data = SimpleNamespace(
                    cpu_energy=0.3, gpu_energy=0.5, ram_energy=0.2
                )

    module = ModuleType("codecarbon")
    module.OfflineEmissionsTracker = OfflineEmissionsTracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    return record


def test_parts_say_whether_they_were_measured(fake_meter: SimpleNamespace) -> None:
    fake_meter.hardware = [RAM(), CPU("cpu_load", 85), GPU()]
    found = metered_energy(lambda: fake_meter.events.append("work"), grid_kg_per_kwh=0.1)
    assert fake_meter.events == ["start", "work", "stop"]
    assert [(part.name, part.kwh, part.measured) for part in found.parts] == [
        ("CPU", 0.3, False),
        ("GPU", 0.5, True),
        ("RAM", 0.2, False),
    ]
    assert found.parts[0].source == "85 W times the load"
    assert (found.kwh, found.co2_kg) == pytest.approx((1.0, 0.1))


@pytest.mark.parametrize(
    ("part", "measured", "source"),
    [
        (CPU("intel_rapl", 85), True, "RAPL counters"),
        (CPU("constant", 60), False, "60 W times a half"),
        (AppleSiliconChip(), True, "AppleSiliconChip's own counters"),
    ],
)
def test_where_the_figure_of_the_processor_comes_from(
    fake_meter: SimpleNamespace, part: object, measured: bool, source: str
) -> None:
    fake_meter.hardware = [part]
    [found] = metered_energy(lambda: None).parts
    assert (found.name, found.measured) == ("CPU", measured)
    assert found.source.startswith(source)


def test_the_meter_is_stopped_when_the_work_fails(fake_meter: SimpleNamespace) -> None:
    def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        metered_energy(work)
    assert fake_meter.events == ["start", "stop"]


def test_a_meter_without_figures_is_an_error(fake_meter: SimpleNamespace) -> None:
    fake_meter.figures = False
    with pytest.raises(MeasurementError, match="codecarbon gave no figures"):
        metered_energy(lambda: None)


def test_nothing_is_reported_or_written_whatever_is_configured(
    fake_meter: SimpleNamespace,
) -> None:
    fake_meter.hardware = [RAM()]
    metered_energy(lambda: None, grid_kg_per_kwh=0.25)
    settings = fake_meter.settings
    assert settings["output_methods"] == settings["output_handlers"] == []
    assert not settings["emissions_endpoint"]
    assert not settings["electricitymaps_api_token"]
    assert settings["force_carbon_intensity_g_co2e_kwh"] == 250
    assert fake_meter.folder_existed
    assert not Path(settings["output_dir"]).exists()


def test_codecarbon_itself_stays_offline_and_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon", reason="needs the carbon extra", exc_type=ImportError)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        raise OSError("no network in tests")

    calls: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nemissions_endpoint=http://localhost:9\noutput_methods=csv,api\n"
        "electricitymaps_api_token=secret\nlog_level=debug\n"
    )
    level = logging.getLogger("codecarbon").level
    capfd.readouterr()
    found = metered_energy(lambda: sum(range(10**6)), grid_kg_per_kwh=0.5)
    assert calls == []
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".codecarbon.config"]
    assert logging.getLogger("codecarbon").level == level
    assert {"CPU", "RAM"} <= {part.name for part in found.parts}
    assert found.kwh > 0
    assert found.co2_kg == pytest.approx(0.5 * found.kwh)
