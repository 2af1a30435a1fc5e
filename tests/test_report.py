"""What an experiment found, as figures, tables, plots and files."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from blockprune.errors import BlockpruneError
from blockprune.lottery.results import ExperimentResult, NetworkResult
from blockprune.report import (
    BenchResult,
    comparison_markdown,
    comparison_table,
    plot_accuracy,
    plot_bench,
    plot_blocks,
    reading_notes,
    staged_folder,
    write_report,
)
from blockprune.report.bench import (
    MemoryFigures,
    NetworkFigures,
    TrainingFigures,
    TrainingSettings,
)

FILES = ("results.json", "table.txt", "table.md", "accuracy.png", "blocks.png")


def _network(p: int, removed: tuple[str, ...], correct: int, macs: int) -> NetworkResult:
    return NetworkResult(
        p=p,
        removed=removed,
        blocks=15 - p,
        params=467_658 - 4_736 * p,
        macs=macs,
        accuracy=correct / 400,
        train_seconds=12.0 / (1 + p / 10),
        latency_ms=8.0 / (1 + p),
        latency_iqr_ms=0.25,
    )


@pytest.fixture
def result() -> ExperimentResult:
    """Dense 390 of 400 right; tickets better, exactly xi worse, and one image worse than xi."""
    return ExperimentResult(
        model="ResNet32",
        data="digits",
        image_shape=(1, 8, 8),
        train_images=1257,
        test_images=400,
        criterion="grasp",
        seed=3,
        epochs=20,
        batch_size=64,
        latency_batch_size=32,
        threads=2,
        device="cpu",
        xi_points=1.0,
        scores={"layer1.0": 1e-6, "layer1.1": -2e-5, "layer2.1": 3e-3, "layer3.1": 0.5},
        protected=("layer1.0",),
        min_blocks_per_stage=2,
        dense=_network(0, (), 390, 1000),
        tickets=(
            _network(1, ("layer1.1",), 392, 900),
            _network(2, ("layer1.1", "layer2.1"), 386, 800),
            _network(3, ("layer1.1", "layer2.1", "layer3.1"), 385, 700),
        ),
    )


def _text(result: ExperimentResult, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(comparison_table(result))
    return file.getvalue()


class TestComparisons:
    def test_figures_follow_their_definitions(self, result: ExperimentResult) -> None:
        first, second, third = result.comparisons
        assert [c.difference_points for c in (first, second, third)] == [0.5, -1.0, -1.25]
        assert [c.winning for c in (first, second, third)] == [True, True, False]
        assert first.macs_saved_percent == pytest.approx(10)
        assert second.training_speed_up == pytest.approx(1.2)
        assert third.latency_speed_up == pytest.approx(4)

    def test_a_loss_of_exactly_xi_wins_for_every_test_size(self) -> None:
        # 100 * (k / n - (k - d) / n) is seldom exactly d percent in binary.
        for images in range(100, 2000, 100):
            for right in range(images // 2, images, 7):
                dense = _network(0, (), right, 10).model_copy(update={"accuracy": right / images})
                lower = (right - images // 100) / images
                ticket = dense.model_copy(update={"p": 1, "accuracy": lower})
                found = _with(dense, ticket, images).comparisons[0]
                assert found.winning, (images, right)

    def test_json_round_trip(self, result: ExperimentResult) -> None:
        text = result.to_json()
        assert ExperimentResult.from_json(text) == result
        assert '"winning": true' in text


def _with(dense: NetworkResult, ticket: NetworkResult, images: int) -> ExperimentResult:
    return ExperimentResult(
        model="m",
        data="d",
        image_shape=(1, 1, 1),
        train_images=1,
        test_images=images,
        criterion="c",
        seed=0,
        epochs=1,
        batch_size=1,
        latency_batch_size=1,
        threads=1,
        device="cpu",
        xi_points=1.0,
        scores={"a": 0.0},
        protected=(),
        min_blocks_per_stage=0,
        dense=dense,
        tickets=(ticket,),
    )


class TestTable:
    def test_reads_at_80_columns_with_every_figure(self, result: ExperimentResult) -> None:
        lines = _text(result).splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in _text(result)
        [dense] = [line.split() for line in lines if "(dense)" in line]
        assert dense == ["0", "(dense)", "97.50", "467,658", "8.00", "12.0"]
        [first] = [line.split() for line in lines if line.startswith("1 ")]
        assert first == (
            ["1", "layer1.1", "98.00", "+0.50", "yes", "10.00%", "462,922", "4.00", "10.9", "1.10x"]
        )
        text = _text(result)
        third = text[text.index("\n3 ") :]
        assert all(name in third for name in ("layer1.1", "layer2.1", "layer3.1", "-1.25", " no "))

    def test_figures_stay_whole_when_names_are_long(self, result: ExperimentResult) -> None:
        name = "encoder.layers.encoder_layer_11.self_attention"
        [ticket, *_] = result.tickets
        long = result.model_copy(
            update={"tickets": (ticket.model_copy(update={"removed": (name,)}),)}
        )
        text = _text(long)
        assert max(map(len, text.splitlines())) <= 80
        assert "462,922" in text
        assert "1.10x" in text

    def test_markdown_has_one_line_a_network(self, result: ExperimentResult) -> None:
        header, rule, *rows = comparison_markdown(result).splitlines()
        assert header.count("|") == rule.count("|") == 11
        assert [row.split("|")[1].strip() for row in rows] == ["0", "1", "2", "3"]
        assert rows[2].split("|")[2].strip() == "layer1.1 layer2.1"

    def test_notes_say_what_the_figures_mean(self, result: ExperimentResult) -> None:
        notes = " ".join(reading_notes(result))
        for fact in ("1x8x8", "1257 training", "400 test", "0.25 points", "xi = 1", "seed 3"):
            assert fact in notes
        assert "protected: layer1.0; at least 2 blocks a stage stay" in notes


class TestPlots:
    @pytest.mark.parametrize("plot", [plot_accuracy, plot_blocks])
    def test_a_png_with_something_on_it(
        self, result: ExperimentResult, tmp_path: Path, plot: object
    ) -> None:
        assert callable(plot)
        plot(result, tmp_path / "a.png")
        pixels = matplotlib.image.imread(tmp_path / "a.png")
        assert min(pixels.shape[:2]) > 400
        assert len({tuple(pixel) for row in pixels[::5, ::5] for pixel in row}) > 10

    def test_scores_that_are_all_zero_can_be_drawn(
        self, result: ExperimentResult, tmp_path: Path
    ) -> None:
        flat = result.model_copy(update={"scores": dict.fromkeys(result.scores, 0.0)})
        plot_blocks(flat, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 1000

    def test_pyplot_is_not_touched(self, result: ExperimentResult, tmp_path: Path) -> None:
        # pyplot would pick a window system and keep every figure alive.
        path = tmp_path / "result.json"
        path.write_text(result.to_json(), encoding="utf-8")
        code = (
            "import sys; from pathlib import Path\n"
            "from blockprune.lottery.results import ExperimentResult\n"
            "from blockprune.report import write_report\n"
            f"path = Path({str(path)!r})\n"
            "write_report(ExperimentResult.from_json(path.read_text('utf-8')), path.parent)\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        assert (tmp_path / "accuracy.png").exists()


def _bench(watts: float | None, *, is_trained: bool = True) -> BenchResult:
    """Return a ticket whose every cost is another share of the dense network."""

    def memory(percent: float) -> MemoryFigures:
        return MemoryFigures(batch=4, peak_bytes=8, state_bytes=4, percent=percent, source="x")

    def figures(name: str, share: float) -> NetworkFigures:
        training = TrainingFigures(
            batch=64,
            step_ms=1,
            step_iqr_ms=0,
            step_interval_ms=(1, 1),
            epoch_seconds=1,
            epoch_interval_seconds=(1, 1),
            percent=share * 60,
            percent_interval=(share * 58, share * 61),
            speed_up=1,
            speed_up_interval=(1, 1),
            memory=memory(share * 70),
            kwh=1,
            co2_kg=1,
            co2_percent=share * 50,
            energy=(),
        )
        return NetworkFigures(
            name=name,
            removed=(),
            params=1,
            params_saved_percent=100 - share * 90,
            macs=1,
            macs_saved_percent=100 - share * 80,
            paper_memory_bytes=1,
            paper_memory_saved_percent=0,
            memory=(memory(share * 75),),
            training=training if is_trained else None,
        )

    settings = TrainingSettings(batch=64, epoch_samples=100, watts=watts, grid_kg_per_kwh=0.432)
    return BenchResult(
        model="net",
        inputs=((1, 3, 8, 8),),
        device="cpu",
        threads=1,
        execution="",
        repeats=3,
        confidence=0.95,
        criterion="l1",
        granularity="branch",
        training=settings if is_trained else None,
        complete=True,
        networks=(figures("dense", 100 / 80), figures("p=1", 1)),
    )


class TestBenchPlot:
    @pytest.mark.parametrize(
        ("result", "costs"),
        [
            (_bench(85.0, is_trained=False), {}),
            # By formula CO2 is the time once more; metered, it is a figure of its own.
            (_bench(85.0), {"training memory, batch 64": 70, "training time, batch 64": 60}),
            (
                _bench(None),
                {"training memory, batch 64": 70, "training time, batch 64": 60, "CO2": 50},
            ),
        ],
        ids=["not trained", "by formula", "metered"],
    )
    def test_a_row_is_a_cost(
        self,
        result: BenchResult,
        costs: dict[str, float],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        drawn: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
        plot_bench(result, tmp_path / "r.png")
        [axes] = drawn[0].axes
        expected = {"parameters": 90, "MACs": 80, "memory, batch 4": 75, **costs}
        assert [label.get_text() for label in axes.get_yticklabels()] == list(expected)
        [dots] = [line for line in axes.lines if line.get_marker() == "o"]
        assert list(dots.get_xdata()) == pytest.approx(list(expected.values()))
        if costs:
            ends = [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()]
            assert ends[4] == pytest.approx([58, 61])


class TestFiles:
    def test_a_report_is_five_files(self, result: ExperimentResult, tmp_path: Path) -> None:
        with staged_folder(tmp_path / "a" / "b") as folder:
            assert write_report(result, folder) == FILES
        out = tmp_path / "a" / "b"
        assert sorted(file.name for file in out.iterdir()) == sorted(FILES)
        assert ExperimentResult.from_json((out / "results.json").read_text("utf-8")) == result
        text = (out / "table.txt").read_text("utf-8")
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text
        assert "layer3.1" in text
        assert comparison_markdown(result) in (out / "table.md").read_text("utf-8")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_exception_leaves_an_absent_folder_absent(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        with pytest.raises(error), staged_folder(tmp_path / "a" / "b") as folder:
            (folder / "half.txt").write_text("ha")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_an_exception_leaves_a_present_folder_as_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "table.txt").write_text("old")
        with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path, force=True) as folder:
            (folder / "table.txt").write_text("ne")
            raise KeyboardInterrupt
        assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]
        assert (tmp_path / "table.txt").read_text() == "old"

    def test_an_empty_folder_is_used_and_kept(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path):
            raise KeyboardInterrupt
        assert tmp_path.is_dir()
        with staged_folder(tmp_path) as folder:
            (folder / "a").write_text("a")
        assert [file.name for file in tmp_path.iterdir()] == ["a"]

    def test_a_folder_where_a_file_belongs_leaves_the_others(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("old")
        (tmp_path / "b.txt").mkdir()
        with (
            pytest.raises(BlockpruneError, match=r"b\.txt is a folder"),
            staged_folder(tmp_path, force=True) as folder,
        ):
            (folder / "a.txt").write_text("new")
            (folder / "b.txt").write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]

    def test_force_replaces_results_and_keeps_the_rest(self, tmp_path: Path) -> None:
        (tmp_path / "table.txt").write_text("old")
        (tmp_path / "thesis.tex").write_text("years of work")
        with staged_folder(tmp_path, force=True) as folder:
            (folder / "table.txt").write_text("new")
        assert (tmp_path / "table.txt").read_text() == "new"
        assert (tmp_path / "thesis.tex").read_text() == "years of work"
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_folder_that_holds_files_asks_for_force(self, tmp_path: Path) -> None:
        (tmp_path / "table.txt").write_text("old")
        with (
            pytest.raises(BlockpruneError, match=r"exists and is not empty\. Use --force"),
            staged_folder(tmp_path),
        ):
            pytest.fail("the block must not begin")
        assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file_in_the_way_is_never_replaced(self, tmp_path: Path, force: bool) -> None:
        file = tmp_path / "out"
        file.write_text("mine")
        with (
            pytest.raises(BlockpruneError, match="is a file; the results need a folder"),
            staged_folder(file, force=force),
        ):
            pytest.fail("the block must not begin")
        assert file.read_text() == "mine"

    def test_a_folder_that_cannot_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(BlockpruneError, match="cannot be written to"),
            staged_folder(tmp_path / "file" / "out"),
        ):
            pytest.fail("the block must not begin")
