"""The report of robustness, by arithmetic done again."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest

from blockprune.lottery.record import RobustnessRecord, RunRecord
from blockprune.report import page_html, write_run_report
from blockprune.report.cases import Cases
from blockprune.report.robust import robustness_section
from blockprune.report.sections import Part, Section, Table
from tests.browser import CHROMIUM, Browser
from tests.fake_robustness import EFFECTS, NAMES, PIXEL, error_of, result_of, robust_run
from tests.fake_run import DENSE, chance, fake_run, ticket

SEEDS = (0, 1, 2)
STUDENT = 4.303
"""For 95 % and three seeds."""


@pytest.fixture(scope="module")
def run() -> RunRecord:
    return robust_run()


def section_of(record: RunRecord) -> Section:
    section = robustness_section(Cases(record))
    assert section is not None
    return section


def with_results(*found: RobustnessRecord) -> RunRecord:
    return fake_run().model_copy(update={"robustness": found})


def part(section: Section, title: str) -> Part:
    return next(part for part in section.parts if part.title.startswith(title))


def column(table: Table, head: str) -> dict[str, str]:
    place = table.columns.index(head)
    return {name: cells[place].text for name, cells in table.rows}


def mean_error(effect: float, seed: int) -> float:
    """Over the corruptions of the fifteen, the last being none of them."""
    return statistics.fmean(
        error_of(place, severity, effect, seed)
        for place in range(len(NAMES) - 1)
        for severity in range(1, 6)
    )


def test_pictures_stand_in_the_page_itself(run: RunRecord) -> None:
    examples = part(section_of(run), "Examples")
    # The dense network and three tickets; controls are not shown.
    assert len(examples.figures) == 4
    drawing = examples.figures[0].drawing
    assert drawing.count("<image") == 2
    assert f'href="data:image/png;base64,{PIXEL}"' in drawing
    assert "✗ 1" in drawing
    assert page_html(run).count(PIXEL) == 8


class TestAnswer:
    def test_intervals_are_paired_over_seeds(self, run: RunRecord) -> None:
        answer = section_of(run).parts[0]
        assert "there is no one answer" in answer.text[0]
        counts = dict(answer.tables[0].rows)
        # Of three tickets one is better, one worse, and one like the dense network.
        assert [cell.text for cell in counts["corruptions"]] == ["1", "1", "1", "0"]
        assert [cell.text for cell in counts["usps"]] == ["0", "0", "3", "0"]
        assert "clean" not in counts

    @pytest.mark.parametrize(
        ("case", "said"),
        [
            (ticket("grasp", 1), "Tickets are more robust"),
            (ticket("grasp", 3), "Tickets are less robust"),
            (ticket("snip", 1), "Nothing tells"),
            (chance(1), "Not compared"),
        ],
    )
    def test_it_hangs_on_the_tickets_alone(self, run: RunRecord, case: object, said: str) -> None:
        found = [
            RobustnessRecord(case=one, seed=seed, result=result_of(EFFECTS[one], seed))
            for one in EFFECTS
            if one in (DENSE, case)
            for seed in SEEDS
        ]
        assert said in section_of(with_results(*found)).parts[0].text[0]

    def test_one_seed_tells_nothing(self) -> None:
        answer = section_of(robust_run((0,))).parts[0].text[0]
        assert "cannot be told by one seed" in answer

    def test_without_a_dense_network_nothing_is_compared(self) -> None:
        alone = with_results(
            RobustnessRecord(case=ticket("snip", 1), seed=0, result=result_of(0.0, 0))
        )
        section = section_of(alone)
        assert "Not compared" in section.parts[0].text[0]
        assert [table.title for table in section.parts[1].tables] == [
            "Accuracy, calibration and agreement"
        ]

    def test_clean_images_alone_compare_nothing(self, run: RunRecord) -> None:
        easy = {
            "corrupted_by": None,
            "corruptions": (),
            "corruption_errors": {},
            "severity_errors": {},
            "mean_error": None,
            "shifts": (),
            "attacks": (),
        }
        section = section_of(
            with_results(
                *(
                    one.model_copy(update={"result": one.result.model_copy(update=easy)})
                    for one in run.robustness
                )
            )
        )
        assert section.parts[0].text == (
            "Not compared: no seed has both on harder images than the clean ones.",
        )
        assert section.parts[0].tables == ()
        assert [table.columns[0] for table in section.parts[1].tables] == ["clean", "clean, %"]

    def test_networks_of_other_seeds_are_not_compared(self) -> None:
        section = section_of(
            with_results(
                RobustnessRecord(case=DENSE, seed=0, result=result_of(0.0, 0)),
                RobustnessRecord(case=ticket("snip", 1), seed=1, result=result_of(0.02, 1)),
            )
        )
        assert "no seed has both" in section.parts[0].text[0]
        [(name, differences)] = section.parts[1].tables[0].rows
        assert name == ticket("snip", 1).label()
        assert {cell.text for cell in differences} == {"-"}

    def test_flags_name_the_network(self, run: RunRecord) -> None:
        [flag] = section_of(run).parts[1].text
        assert flag.startswith(f"Do not trust the attacks on {chance(1).label()}, seed 1: PGD")


class TestTables:
    def test_table_5_has_points_above_dense(self, run: RunRecord) -> None:
        table = section_of(run).parts[1].tables[0]
        assert table.columns[:3] == ("clean", "corruptions", "usps")
        assert DENSE.label() not in dict(table.rows)
        for case, effect in EFFECTS.items():
            if case == DENSE:
                continue
            points = [100 * (mean_error(0.0, s) - mean_error(effect, s)) for s in SEEDS]
            mean = statistics.fmean(points)
            half = STUDENT * statistics.stdev(points) / 3**0.5
            cell = dict(table.rows)[case.label()][1]
            assert cell.text == f"({'-' if mean < 0 else '+'}) {abs(mean):.2f}"
            low, high = (float(end) for end in cell.small[0].strip("[]").split(","))
            assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)

    def test_accuracies_calibration_and_agreement(self, run: RunRecord) -> None:
        table = section_of(run).parts[1].tables[1]
        right = [100 * (1 - mean_error(0.02, seed)) for seed in SEEDS]
        name = ticket("grasp", 1).label()
        written = f"{statistics.fmean(right):.2f} ± {statistics.stdev(right):.2f}"
        assert column(table, "corruptions, %")[name] == written
        assert column(table, "ECE, %")[name] == "2.10 ± 0.10"
        assert column(table, "decides like dense, %")["dense"] == "-"
        assert column(table, "decides like dense, %")[name] == "90.00 ± 0.00"
        # At epsilon 0 nothing is attacked: five others count.
        attacked = 100 * statistics.fmean(0.9 / (1 + k) for k in range(1, 6))
        assert column(table, "fgsm, %")["dense"] == f"{attacked:.2f} ± 0.00"

    def test_each_corruption_has_a_row_and_a_best(self, run: RunRecord) -> None:
        [table] = part(section_of(run), "Each corruption").tables
        assert [name for name, _ in table.rows] == [name.replace("_", " ") for name in NAMES]
        for _, cells in table.rows:
            best = [head for head, cell in zip(table.columns, cells, strict=True) if cell.is_best]
            assert best == [ticket("grasp", 1).label()]
        assert "Not among the fifteen of the mean: speckle noise." in table.notes

    def test_curves_are_of_severity_and_of_each_attack(self, run: RunRecord) -> None:
        figures = {f.title: f for f in part(section_of(run), "Against").figures}
        assert list(figures) == [
            "Corruptions",
            "fgsm",
            "pgd, 20 steps",
            "pgd, 20 steps, made on dense",
            "deepfool, 50 steps",
        ]
        assert [label for _, label in figures["fgsm"].legend] == [c.label() for c in EFFECTS]
        at_8 = 100 * 0.9 / (1 + 4)
        assert f"dense: {at_8:.2f} % at epsilon, of 255 8" in str(figures["fgsm"].drawing)
        assert "epsilon, L2" in str(figures["deepfool, 50 steps"].drawing)

    def test_a_network_without_an_attack_has_no_figure_for_it(self, run: RunRecord) -> None:
        lacking = ticket("grasp", 1)
        section = section_of(
            with_results(
                *(
                    one.model_copy(
                        update={
                            "result": one.result.model_copy(
                                update={"attacks": one.result.attacks[1:]}
                            )
                        }
                    )
                    if one.case == lacking
                    else one
                    for one in run.robustness
                )
            )
        )
        compared, absolute = section.parts[1].tables
        assert column(compared, "fgsm")[lacking.label()] == "-"
        assert column(absolute, "fgsm, %")[lacking.label()] == "-"
        assert column(compared, "fgsm")[ticket("snip", 1).label()] == "(+) 0.00"
        assert column(compared, "pgd, 20 steps")[lacking.label()] == "(+) 0.00"
        figures = {f.title: f for f in part(section, "Against").figures}
        others = [case.label() for case in EFFECTS if case != lacking]
        assert [label for _, label in figures["fgsm"].legend] == others


class TestFiles:
    def test_all_figures_are_in_one_table(self, run: RunRecord, tmp_path: Path) -> None:
        assert "robustness.csv" in write_run_report(run, tmp_path)
        rows = list(csv.DictReader(io.StringIO((tmp_path / "robustness.csv").read_text("utf-8"))))
        shot = [
            float(row["value"])
            for row in rows
            if (row["kind"], row["name"], row["severity_or_epsilon"]) == ("dense", NAMES[1], "3")
        ]
        assert shot == [1 - error_of(1, 3, 0.0, seed) for seed in SEEDS]
        assert {row["measure"] for row in rows} == {
            "clean",
            "ece",
            "agreement",
            "corruption",
            "shift",
            "attack",
            "attack made on dense",
        }

    def test_a_run_that_did_not_look_has_no_such_section(self) -> None:
        assert robustness_section(Cases(fake_run())) is None
        assert "robustness" not in page_html(fake_run())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_reads_without_scrolling_sideways(run: RunRecord, tmp_path: Path, width: int) -> None:
    write_run_report(run, tmp_path)
    with Browser.open(tmp_path / "profile") as browser:
        browser.show(tmp_path / "report.html", width)
        assert browser.problems == []
        assert browser.ask("document.documentElement.scrollWidth") <= width
