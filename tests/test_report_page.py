"""The report of a run: what its page says, the tables behind it, and how it looks in a browser."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from blockprune.cli import main
from blockprune.errors import BlockpruneError
from blockprune.lottery.record import BlockRecord, RunRecord, SimilarityRecord, TicketCase
from blockprune.lottery.steps import Step
from blockprune.report import (
    networks_csv,
    page_html,
    read_run,
    scores_csv,
    verdicts_csv,
    write_run_report,
)
from blockprune.report.cases import Cases, Setting
from blockprune.report.cautions import cautions
from blockprune.report.charts import cost_chart, curve_charts, depth_charts
from blockprune.report.paper import paper_tables, set_up_of
from blockprune.report.pictures import block_pictures
from tests.browser import CHROMIUM, Browser
from tests.fake_run import DENSE, anew, chance, fake_run, network, ticket, verdict_on
from tests.fake_weights import structures_run, weights_run

FILES = ("report.html", "results.json", "networks.csv", "verdicts.csv", "scores.csv")
SECTIONS = (
    "notes",
    "summary",
    "verdicts",
    "tables",
    "depth",
    "cost",
    "blocks",
    "similarity",
    "curves",
    "networks",
    "again",
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def run() -> RunRecord:
    return fake_run()


@pytest.fixture(scope="module")
def page(run: RunRecord) -> str:
    return page_html(run)


def few(*parts: Any, **changes: Any) -> RunRecord:
    """A run of only the networks and verdicts given."""
    return fake_run().model_copy(
        update={
            "networks": tuple(part for part in parts if hasattr(part, "stage")),
            "verdicts": tuple(part for part in parts if hasattr(part, "verdict")),
            "scores": (),
            "similarities": (),
            "failures": {},
            **changes,
        }
    )


def paper_run(**changes: Any) -> RunRecord:
    """A run of the paper's own set-up: CIFAR-10, its ResNet32, 200 epochs."""
    cases = {
        ticket("grasp", 1): 0.5,
        ticket("snip", 5): -0.75,
        ticket("kl", 2, Step(epoch=200), Step(epoch=25)): 0.25,
        ticket("kl", 2, Step(epoch=200), Step(epoch=60)): 0.125,
    }
    networks = [network(DENSE, seed, 0.92, epochs=200) for seed in (0, 1)]
    networks += [network(case, s, 0.92, epochs=200) for case in cases for s in (0, 1)]
    verdicts = [verdict_on(case, {0: points, 1: points}) for case, points in cases.items()]
    data = {**fake_run().data, "name": "cifar10", "test_images": 10_000}
    return few(*networks, *verdicts, **{"data": data, **changes})


class _Outline(HTMLParser):
    """Checks that tags close in order, and collects ids, links and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found.get("href")))
        elif found.get("src") or found.get("href"):
            self.loaded.append(str(found.get("src") or found.get("href")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself holds nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> _Outline:
    parser = _Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def words(page: str) -> str:
    """The text of a page, tags left out."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


class TestPage:
    def test_it_is_whole_and_loads_nothing(self, page: str) -> None:
        found = outline(page)
        assert len(found.ids) == len(set(found.ids))
        assert set(SECTIONS) | {"failures"} <= set(found.ids)
        assert found.loaded == ["data:,"]
        assert {link for link in found.links if not link.startswith("#")} == set(FILES[1:])
        assert all(link[1:] in found.ids for link in found.links if link.startswith("#"))
        assert "<script" not in page
        assert "http" not in page.replace("http-equiv", "")

    def test_failures_and_notes_come_first(self, run: RunRecord, page: str) -> None:
        for text in (*run.failures.values(), *run.notes, *cautions(run), set_up_of(run).sentence):
            place = words(page).index(text.replace('"', "&#34;").replace("'", "&#39;"))
            assert place < words(page).index("of each seed")

    def test_every_verdict_has_its_seeds_its_interval_and_its_control(
        self, run: RunRecord, page: str
    ) -> None:
        text = words(page)
        case = ticket("grasp", 2)
        verdict = next(v for v in run.verdicts if v.case == case)
        control = next(v for v in run.verdicts if v.case == chance(2))
        assert verdict.interval is not None
        assert verdict.against_random is not None
        table = text[text.index("Tickets scored at initialisation") :]
        row = table[table.index("grasp, p=2") :][:600]
        assert verdict.verdict in row
        assert f"[{verdict.interval[0]:+.2f}, {verdict.interval[1]:+.2f}], 3 seeds" in row
        for seed, points in verdict.differences.items():
            assert f"{seed}: {points:+.2f} {'✓' if verdict.winning[seed] else '✗'}" in row
        assert f"{control.mean:+.2f}" in row
        assert f"{verdict.against_random:+.2f}" in row

    def test_environment_command_and_spec_are_there(self, run: RunRecord, page: str) -> None:
        text = words(page)
        assert run.command in text
        assert all(f"{name} {value or 'none'}" in text for name, value in run.environment.items())
        assert "&#34;name&#34;: &#34;blockprune:resnet32&#34;" in page

    def test_names_from_the_file_are_text_and_no_markup(self, run: RunRecord) -> None:
        evil = '<script>alert("x")</script>'
        networks = [n.model_copy(update={"removed": (evil,)}) for n in run.networks]
        changed = run.model_copy(
            update={
                "name": evil,
                "command": evil,
                "notes": (evil,),
                "failures": {evil: evil},
                "networks": tuple(networks),
                "environment": {evil: evil},
                "data": {"name": evil, evil: evil},
                "spec": {"model": evil},
                "scores": tuple(s.model_copy(update={"criterion": evil}) for s in run.scores),
                "blocks": tuple(
                    b.model_copy(update={"name": evil + b.name, "reason": evil}) for b in run.blocks
                ),
                "similarities": tuple(
                    s.model_copy(update={"rows": (evil,) * len(s.rows)}) for s in run.similarities
                ),
            }
        )
        page = page_html(changed)
        outline(page)
        assert "<script" not in page

    def test_two_pages_of_one_record_are_the_same(self, run: RunRecord, page: str) -> None:
        assert page_html(RunRecord.from_json(run.to_json())) == page

    def test_an_empty_run_says_so(self) -> None:
        text = words(page_html(few()))
        for sentence in (
            "No case was judged.",
            "No ticket and no control was trained.",
            "No block was scored.",
            "No network was trained.",
            "its spec does not ask for similarities",
            "no ticket was scored at initialisation",
            "no ticket was scored after training and rewound",
            "not trained",
        ):
            assert sentence in text

    @pytest.mark.parametrize("seeds", [(0,), (0, 1), (3, 1, 4, 5, 9)])
    def test_any_number_of_seeds(self, seeds: tuple[int, ...]) -> None:
        page = page_html(fake_run(seeds))
        outline(page)
        assert ("not enough seeds" in words(page)) == (len(seeds) <= 2)
        assert ("no case is decided" in page) == (len(seeds) == 1)
        assert ("All rests on" in page) == (len(seeds) == 2)

    def test_it_needs_neither_torch_nor_pyplot(self, run: RunRecord, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text(run.to_json(), encoding="utf-8")
        code = (
            "import sys; from pathlib import Path\n"
            "from blockprune.report import read_run, write_run_report\n"
            f"folder = Path({str(tmp_path)!r})\n"
            "write_run_report(read_run(folder), folder)\n"
            "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
        )
        ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        assert ran.stdout.decode().strip() == "[]"

    def test_what_it_is_made_with_is_in_the_package(self) -> None:
        for name in ("page.html.jinja", "page.css"):
            assert resources.files("blockprune.report").joinpath(name).is_file()


class TestPapersTables:
    def test_table_1_has_criteria_by_moments_and_the_best_two_of_a_row(
        self, run: RunRecord
    ) -> None:
        [table, *_] = paper_tables(run)
        assert table.number == 1
        assert table.columns == (
            "epoch 0 (0 %)",
            "epoch 5 (25 %)",
            "epoch 10 (50 %)",
            "epoch 15 (75 %)",
        )
        assert [name for name, _ in table.rows] == ["hrank", "expectabs", "pls", "kl", "random"]
        for _, cells in table.rows:
            means = [cell.verdict.mean for cell in cells if cell.verdict]
            assert len(means) == 4
            best = [cell.verdict.mean for cell in cells if cell.place == 1 and cell.verdict]
            assert set(best) == {max(means)}
            assert all(cell.published is None for cell in cells)

    def test_tables_2_and_3_have_p_by_criteria_and_layers(self, run: RunRecord) -> None:
        _, second, third = paper_tables(run)
        assert second.columns == ("snip", "grasp", "random")
        assert [name for name, _ in second.rows] == ["1", "2", "3", "4", "5"]
        by_case = {verdict.case: verdict for verdict in run.verdicts}
        for name, (snip, grasp, control) in second.rows:
            assert snip.verdict == by_case[ticket("snip", int(name))]
            assert grasp.verdict == by_case[ticket("grasp", int(name))]
            assert control.verdict == by_case[chance(int(name))]
        (filters, empty), (layers, cells) = third.rows
        assert (filters, layers) == ("filters", "layers")
        assert all(cell.verdict is None for cell in empty)
        assert [cell.case for cell in cells] == [ticket("snip", 1), ticket("grasp", 1)]
        assert "prunes no filters" in third.notes[0]

    def test_published_figures_stand_only_beside_the_papers_set_up(self) -> None:
        record = paper_run()
        assert set_up_of(record).is_the_papers
        first, second, third = paper_tables(record)
        assert [cell.published for cell in dict(first.rows)["kl"]] == [0.46, None]
        assert dict(second.rows)["1"][0].published == 0.40
        assert dict(second.rows)["5"][1].published == -1.00
        assert [cell.published for cell in dict(third.rows)["filters"]] == [-0.11]
        text = words(page_html(record))
        assert "paper (-) 1.00" in text
        assert "The set-up is the paper's".replace("'", "&#39;") in text

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"data": {"name": "digits"}}, "data are digits, and accuracies on it say nothing"),
            ({"data": {}}, "data are unknown data"),
            ({"blocks": ()}, "0 residual blocks"),
            ({"networks": ()}, "unknown MACs"),
            (
                {"networks": (network(DENSE, 0, 0.9, epochs=160),)},
                "trained for 160 epochs, not 200",
            ),
        ],
    )
    def test_another_set_up_is_not_compared(self, changes: dict[str, Any], why: str) -> None:
        record = paper_run(**changes)
        found = set_up_of(record)
        assert not found.is_the_papers
        assert why in found.sentence
        cells = [c for table in paper_tables(record) for _, row in table.rows for c in row]
        assert all(cell.published is None for cell in cells)

    def test_each_number_of_blocks_and_policy_has_a_table_of_its_own(self) -> None:
        trained, back = Step(epoch=20), Step(epoch=5)
        cases = [
            ticket("kl", 1, trained, back),
            ticket("kl", 2, trained, back),
            ticket("kl", 1, trained, back, weights="learning-rate"),
            ticket("kl", 1, trained, None, weights="finetune"),
            ticket("kl", 1, weights="rewind", schedule="iterative"),
            ticket("kl", 1, None, None, early_bird=True),
        ]
        tables = paper_tables(few(*(verdict_on(case, {0: 0.0, 1: 0.1}) for case in cases)))
        assert [(table.number, table.title) for table in tables] == [
            (1, "p = 1, learning-rate, scored at epoch 20"),
            (1, "p = 1, rewind, scored at epoch 20"),
            (1, "p = 2, rewind, scored at epoch 20"),
            (2, "tickets found at initialisation, iterative"),
            (3, "layer against filter pruning, one block removed"),
        ]
        assert tables[-1].rows == ()
        assert "no ticket of one block" in tables[-1].notes[0]

    def test_a_decline_that_rounds_to_nothing_is_none(self) -> None:
        record = few(verdict_on(ticket("grasp", 1), {0: -0.004, 1: -0.004}))
        assert "(+) 0.00" in words(page_html(record))


class TestCases:
    def test_controls_stand_beside_the_tickets_trained_like_them(self, run: RunRecord) -> None:
        cases = Cases(run)
        found = {setting.title(): members for setting, members in cases.settings()}
        assert list(found) == [
            "scored at initialisation",
            "scored at epoch 20, rewound to initialisation",
            "scored at epoch 20, rewound to epoch 5",
            "scored at epoch 20, rewound to epoch 10",
            "scored at epoch 20, rewound to epoch 15",
        ]
        at_start = found["scored at initialisation"]
        assert [c for c in at_start if c.kind == "random"] == [chance(p) for p in range(1, 6)]
        assert [c for c in at_start if c.kind == "scratch"] == [
            anew("grasp", p) for p in range(1, 6)
        ]
        late = found["scored at epoch 20, rewound to epoch 15"]
        assert [c for c in late if c.kind != "ticket"] == [chance(3, Step(epoch=15))]
        control = cases.random_of(ticket("kl", 3, Step(epoch=20), Step(epoch=15)))
        assert control is not None
        assert control.case == chance(3, Step(epoch=15))
        assert cases.random_of(ticket("kl", 2, Step(epoch=20), Step(epoch=15))) is None

    def test_a_run_of_controls_alone_is_one_setting(self) -> None:
        record = few(network(DENSE, 0, 0.9), network(chance(1), 0, 0.8, ["layer1.1"]))
        [(setting, members)] = Cases(record).settings()
        assert setting.title() == "controls"
        assert members == (chance(1),)
        outline(page_html(record))

    def test_policies_are_named(self) -> None:
        trained = Step(epoch=20)
        assert (
            Setting.of(ticket("kl", 1, trained, None, weights="finetune")).title()
            == "scored at epoch 20, finetune"
        )
        assert Setting.of(ticket("kl", 1, None, None, early_bird=True)).title() == "early birds"
        at_5 = Setting.of(ticket("kl", 1, Step(epoch=5), Step(epoch=5), schedule="iterative"))
        assert at_5.title() == "scored at epoch 5, iterative"


class TestCautions:
    def test_the_limits_of_a_run_are_named(self, run: RunRecord) -> None:
        text = " ".join(cautions(run))
        assert "All rests on 3 seeds" in text
        assert "snip, p=4, scored at epoch 0 (2 of 3)" in text
        assert "360 images, so one image is 0.28 points" in text
        assert f"{len(run.verdicts)} cases are judged" in text
        assert "Latency" not in text

    def test_equal_seeds_are_no_certainty(self) -> None:
        record = few(verdict_on(ticket("grasp", 1), {0: 0.5, 1: 0.5}))
        assert any("without width" in sentence for sentence in cautions(record))

    def test_dense_networks_far_apart_are_told(self) -> None:
        for other, is_told in ((0.895, False), (0.87, True)):
            record = few(network(DENSE, 0, 0.9), network(DENSE, 1, other))
            assert any("3.00 points apart" in s for s in cautions(record)) == is_told

    def test_enough_of_everything_needs_no_caution(self) -> None:
        networks = [network(DENSE, seed, 0.9) for seed in range(5)]
        assert cautions(few(*networks, data={"name": "digits"})) == ()


class TestCharts:
    def test_cost_is_latency_where_all_were_timed_and_macs_otherwise(self, run: RunRecord) -> None:
        assert cost_chart(Cases(run))[1] == "latency of a batch of 64, ms"
        untimed = [network(DENSE, 0, 0.9), network(ticket("grasp", 1), 0, 0.9, timed=False)]
        assert cost_chart(Cases(few(*untimed)))[1] == "million MACs of one sample"
        assert any("in MACs" in sentence for sentence in cautions(few(*untimed)))

    def test_depth_shows_each_seed_each_mean_and_each_interval(self, run: RunRecord) -> None:
        figure = depth_charts(Cases(run))[0]
        drawing = str(figure.drawing)
        judged = [v for v in run.verdicts if v.case.scored_at == Step()]
        judged += [v for v in run.verdicts if v.case in {chance(p) for p in range(1, 6)}]
        seeds = sum(len(verdict.differences) for verdict in judged)
        assert len(re.findall(r'<circle class="seed ', drawing)) == seeds
        assert len(re.findall(r'<circle class="mark ', drawing)) == len(judged)
        assert [label for _, label in figure.legend] == [
            "dense",
            "snip",
            "grasp",
            "random",
            "grasp, from scratch",
        ]

    def test_what_is_drawn_lies_in_the_drawing(self, run: RunRecord) -> None:
        for figure in depth_charts(Cases(run)):
            for axis, size in (("x", 360), ("y", 236)):
                found = re.findall(rf'c?{axis}[12]?="(-?[\d.]+)"', str(figure.drawing))
                assert all(0 <= float(place) <= size for place in found)

    def test_curves_are_of_the_test_set_only_where_all_were_tested(self) -> None:
        case = ticket("grasp", 1)
        tested = few(network(DENSE, 0, 0.9), network(case, 0, 0.9))
        [(title, figures)] = curve_charts(Cases(tested))
        assert title == "scored at initialisation"
        assert [f.title for f in figures] == ["grasp: test accuracy, %", "grasp: training loss"]
        partly = few(network(DENSE, 0, 0.9), network(case, 0, 0.9, tested=False))
        [(_, figures)] = curve_charts(Cases(partly))
        assert figures[0].title == "grasp: training accuracy, %"
        [(title, figures)] = curve_charts(Cases(few(network(DENSE, 0, 0.9))))
        assert (title, len(figures)) == ("dense", 2)

    def test_blocks_are_drawn_with_scores_and_the_share_of_cuts(self, run: RunRecord) -> None:
        figures = {figure.title: str(figure.drawing) for figure in block_pictures(Cases(run))}
        assert list(figures) == [
            "snip, scored at initialisation",
            "grasp, scored at initialisation",
            *(f"{name}, scored at epoch 20" for name in ("hrank", "expectabs", "pls", "kl")),
            "random control",
        ]
        drawing = figures["grasp, scored at initialisation"]
        assert drawing.count('class="score"') == 13
        assert drawing.count("stays: projection_shortcut") == 2 * 5
        of_5 = [n.removed for n in run.networks if n.case == ticket("grasp", 5)]
        for block in run.blocks:
            share = 100 * sum(block.name in removed for removed in of_5) / len(of_5)
            said = f"{block.name}, p=5: cut in {share:.0f} % of the networks"
            assert (said in drawing) == block.removable
        assert 'class="score"' not in figures["random control"]

    def test_many_long_names_make_a_wide_picture(self, run: RunRecord) -> None:
        names = [f"encoder.layers.encoder_layer_{k}.self_attention" for k in range(40)]
        wide = run.model_copy(
            update={
                "blocks": tuple(BlockRecord(name=n, stage=0, shape=(197, 768)) for n in names),
                "scores": tuple(
                    s.model_copy(update={"scores": dict.fromkeys(names, 0.0)}) for s in run.scores
                ),
            }
        )
        figure = block_pictures(Cases(wide))[0]
        assert figure.width > 800
        assert "…_0.self_attention"[-14:] in str(figure.drawing)
        assert '<figure class="wide">' in page_html(wide)

    def test_a_similarity_that_is_undefined_or_negative_is_drawn(self) -> None:
        case = ticket("grasp", 1)
        similarity = SimilarityRecord(
            case=case,
            seed=0,
            rows=("a", "b"),
            columns=("a", "c"),
            values=((float("nan"), -0.02), (-0.004, 0.987)),
        )
        page = page_html(few(similarities=(similarity,)))
        outline(page)
        assert "dense a, other a: nan" in page
        assert ">99</text>" in page
        assert ">-2</text>" in page
        assert ">0</text>" in page
        assert ">-0</text>" not in page


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def step(row: dict[str, str], name: str) -> Step | None:
    epoch, iteration = row[f"{name}_epoch"], row[f"{name}_iteration"]
    return None if epoch == "" else Step(epoch=int(epoch), iteration=int(iteration))


def case_of(row: dict[str, str]) -> TicketCase:
    return TicketCase.model_validate(
        {
            "kind": row["kind"],
            "criterion": row["criterion"] or None,
            "p": int(row["p"]),
            "scored_at": step(row, "scored_at"),
            "weights": row["weights"] or None,
            "rewound_to": step(row, "rewound_to"),
            "schedule": row["schedule"],
            "early_bird": row["early_bird"] == "True",
            "structure": row["structure"],
            "matched": row["matched"] or None,
            "level": int(row["level"]),
            "scope": row["scope"],
        }
    )


class TestTables:
    @pytest.mark.parametrize("make", [fake_run, weights_run, structures_run])
    def test_networks_come_back_as_they_were(self, make: Callable[[], RunRecord]) -> None:
        run = make()
        rows = read(networks_csv(run))
        assert len(rows) == len(run.networks)
        for row, trained in zip(rows, run.networks, strict=True):
            assert case_of(row) == trained.case
            assert tuple(filter(None, row["removed"].split(";"))) == trained.removed
            for field in ("accuracy", "loss", "latency_ms", "latency_iqr_ms", "seconds"):
                value = getattr(trained, field)
                assert row[field] == ("" if value is None else str(value))
            for field in ("seed", "blocks", "params", "macs"):
                assert int(row[field]) == getattr(trained, field)
            assert (row["stage"], int(row["epochs"])) == (trained.stage, len(trained.epochs))

    def test_verdicts_come_back_as_they_were(self, run: RunRecord) -> None:
        for row, verdict in zip(read(verdicts_csv(run)), run.verdicts, strict=True):
            assert case_of(row) == verdict.case
            assert row["verdict"] == verdict.verdict
            assert float(row["mean_points"]) == verdict.mean
            for name, interval in (
                ("interval", verdict.interval),
                ("against_random", verdict.against_random_interval),
            ):
                found = row[f"{name}_low"], row[f"{name}_high"]
                assert found == (("", "") if interval is None else tuple(map(str, interval)))
            for seed in (0, 1, 2):
                difference = verdict.differences.get(seed)
                found = row[f"difference_seed_{seed}"], row[f"winning_seed_{seed}"]
                if difference is None:
                    assert found == ("", "")
                else:
                    assert found == (str(difference), str(verdict.winning[seed]))

    def test_scores_come_back_as_they_were(self, run: RunRecord) -> None:
        found: dict[Any, dict[str, float]] = {}
        for row in read(scores_csv(run)):
            key = row["criterion"], step(row, "scored_at"), int(row["seed"])
            found.setdefault(key, {})[row["block"]] = float(row["score"])
        assert found == {(s.criterion, s.scored_at, s.seed): s.scores for s in run.scores}

    def test_a_run_without_rows_is_an_empty_table(self) -> None:
        assert networks_csv(few()) == verdicts_csv(few()) == scores_csv(few()) == ""


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run `blockprune report` in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockprune", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


class TestCommand:
    def test_it_writes_the_page_and_the_tables(
        self, cli: Cli, run: RunRecord, page: str, tmp_path: Path
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "results.json").write_text(run.to_json(), encoding="utf-8")
        code, out, err = cli("run")
        assert (code, err) == (0, "")
        assert "119 networks, 39 cases judged." in out
        assert "1 stage failed" in out
        folder = tmp_path / "run" / "report"
        assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
        assert (folder / "report.html").read_text(encoding="utf-8") == page
        assert RunRecord.from_json((folder / "results.json").read_text("utf-8")) == run

    def test_its_own_folder_is_replaced_and_another_is_not(
        self, cli: Cli, run: RunRecord, tmp_path: Path
    ) -> None:
        (tmp_path / "results.json").write_text(run.to_json(), encoding="utf-8")
        assert cli(tmp_path / "results.json")[0] == 0
        (tmp_path / "report" / "report.html").write_text("old")
        assert cli(tmp_path)[0] == 0
        assert (tmp_path / "report" / "report.html").read_text("utf-8").startswith("<!doctype")
        other = tmp_path / "other"
        other.mkdir()
        (other / "mine.txt").write_text("mine")
        code, _, err = cli(tmp_path, "--out", other)
        assert code == 1
        assert "is not empty. Use --force" in err
        assert cli(tmp_path, "--out", other, "--force")[0] == 0
        assert sorted(file.name for file in other.iterdir()) == sorted([*FILES, "mine.txt"])

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "holds no results.json"),
            ("{", "not whole JSON. Run the lottery again"),
            ("[]", "it holds a list"),
            ("\xff", "cannot be read"),
            (json.dumps({"version": 2}), "has the version 2; this blockprune reads version 1"),
            (json.dumps({"tickets": [], "dense": {}}), "is a result of `blockprune demo`"),
            (json.dumps({"name": "x"}), "spec: Field required"),
        ],
    )
    def test_what_is_no_run_is_refused_in_a_sentence(
        self, cli: Cli, tmp_path: Path, text: str | None, why: str
    ) -> None:
        if text is not None:
            (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
        code, out, err = cli(tmp_path)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert why in err
        assert not (tmp_path / "report").exists()

    def test_a_folder_where_a_file_of_the_report_belongs(
        self, cli: Cli, run: RunRecord, tmp_path: Path
    ) -> None:
        (tmp_path / "results.json").write_text(run.to_json(), encoding="utf-8")
        in_the_way = tmp_path / "report" / min(FILES)
        in_the_way.mkdir(parents=True)
        code, out, err = cli(tmp_path)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {in_the_way} is a folder, ")
        assert [*(tmp_path / "report").iterdir()] == [in_the_way]

    def test_a_report_that_cannot_be_written(
        self, cli: Cli, run: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "results.json").write_text(run.to_json(), encoding="utf-8")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.replace", full)
        code, out, err = cli(tmp_path)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {tmp_path / 'report'} cannot be written to: ")
        assert not (tmp_path / "report").exists()

    def test_a_run_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(BlockpruneError, match=r"does not exist\. Give the folder"):
            read_run(tmp_path / "nothing")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
class TestBrowser:
    @pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
    def test_it_reads_without_scrolling_sideways(
        self, run: RunRecord, tmp_path: Path, width: int, dark: bool
    ) -> None:
        write_run_report(run, tmp_path)
        page = tmp_path / "report.html"
        with Browser.open(tmp_path / "profile") as browser:
            browser.show(page, width, dark=dark)
            assert browser.problems == []
            assert set(browser.requests) == {page.as_uri()}
            # Also with all that is folded away opened.
            browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.ask("innerWidth") == width
            assert browser.ask("document.documentElement.scrollWidth") <= width
            for section in SECTIONS:
                height = browser.ask(f"document.getElementById('{section}').offsetHeight")
                assert height > 40, section
            assert browser.ask(LEAST_TEXT) >= 8
            colour = browser.ask("getComputedStyle(document.body).backgroundColor")
            assert colour == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
            browser.screenshot(tmp_path / "page.png", height=800)
            assert (tmp_path / "page.png").stat().st_size > 10_000


LEAST_TEXT = """
Math.min(...[...document.querySelectorAll('figure svg')].map(drawing =>
  drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width *
  Math.min(...[...drawing.querySelectorAll('text')].map(
    text => parseFloat(getComputedStyle(text).fontSize)))))
"""
