"""The report of tickets of weights and of structures side by side, by arithmetic done again."""

from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path

import pytest

from blockprune.lottery.record import RunRecord
from blockprune.lottery.steps import Step
from blockprune.report import page_html, write_run_report
from blockprune.report.cases import Cases
from blockprune.report.cautions import cautions
from blockprune.report.grouping import rewind_places
from blockprune.report.levels import levels_section
from blockprune.report.masks import layers_section, overlap_section
from blockprune.report.paper import paper_tables
from blockprune.report.sections import Part, Section, Table
from blockprune.report.stability import stability_section
from blockprune.report.structures import rivals_of, structures_section
from tests.browser import CHROMIUM, Browser
from tests.fake_run import DENSE, START, fake_run, ticket, verdict_on
from tests.fake_weights import (
    IMPORTANCES,
    LAYERS,
    LEVELS,
    SEEDS,
    TOTAL,
    accuracy_of,
    left_of,
    leveled,
    structures_run,
    twin,
    weights_run,
)

NEW = ("structures", "levels", "layers", "overlap", "stability", "robustness")
OF_BLOCKS = ("verdicts", "tables", "depth", "cost", "blocks", "similarity")


@pytest.fixture(scope="module")
def run() -> RunRecord:
    return weights_run()


@pytest.fixture(scope="module")
def structures() -> RunRecord:
    return structures_run()


def found(section: Section | None) -> Section:
    assert section is not None
    return section


def part(section: Section, title: str) -> Part:
    return next(part for part in section.parts if part.title.startswith(title))


def cells(table: Table, row: str) -> dict[str, str]:
    values = dict(table.rows)[row]
    return dict(zip(table.columns, (cell.text for cell in values), strict=True))


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def ids(page: str) -> list[str]:
    return re.findall(r'<section[^>]* id="(\w+)"', page)


class TestSections:
    def test_a_run_of_blocks_has_none_of_the_new_ones(self, tmp_path: Path) -> None:
        page = page_html(fake_run())
        assert not set(NEW) & set(ids(page))
        assert set(OF_BLOCKS) <= set(ids(page))
        assert not any(f'href="#{name}"' in page for name in NEW)
        files = {"report.html", "results.json", "networks.csv", "verdicts.csv", "scores.csv"}
        assert set(write_run_report(fake_run(), tmp_path)) == files

    def test_a_run_of_levels_has_none_of_blocks(self, run: RunRecord) -> None:
        page = page_html(run)
        assert not set(OF_BLOCKS) & set(ids(page))
        assert [name for name in ids(page) if name in NEW] == list(NEW[1:5])
        assert "residual blocks" not in page
        assert "cannot be compared" not in page

    def test_a_run_of_structures_has_both(self, structures: RunRecord) -> None:
        page = page_html(structures)
        assert set(OF_BLOCKS) <= set(ids(page))
        assert [name for name in ids(page) if name in NEW] == ["structures"]
        assert "4 filters (layer1.0.conv1: 4)" in page
        assert "tickets, filters" in page
        assert "random weights" in page

    def test_what_belongs_to_blocks_is_not_changed_by_other_structures(
        self, structures: RunRecord
    ) -> None:
        pages = [page_html(record) for record in (fake_run(), structures)]
        for name in ("tables", "depth", "cost", "blocks", "verdicts"):
            sections = [
                re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL) for page in pages
            ]
            one, other = (section.group() for section in sections if section)
            if name == "tables":
                one, other = (text[: text.index("Table 3")] for text in (one, other))
            # Colours are by criterion, in order of appearance: the same in both.
            assert one == other, name


class TestCautions:
    def test_of_many_names_a_sentence_lists_a_few(self, run: RunRecord) -> None:
        flat = tuple(
            verdict.model_copy(update={"interval": (0.0, 0.0)}) for verdict in run.verdicts
        )
        text = " ".join(cautions(run.model_copy(update={"verdicts": flat})))
        assert f"and {len(flat) - 8} more)" in text

    def test_what_is_not_shown_needs_no_caution(self, run: RunRecord) -> None:
        assert all(network.latency_ms is None for network in run.networks)
        assert "in MACs" not in " ".join(cautions(run))


class TestLevels:
    def test_rows_are_levels_and_columns_importances_with_their_controls(
        self, run: RunRecord
    ) -> None:
        section = found(levels_section(Cases(run)))
        [table] = part(section, "Over all layers, iterative, rewound to initialisation").tables
        assert [name for name, _ in table.rows] == ["dense", *map(str, LEVELS)]
        assert table.columns == (
            "sparsity, %",
            *IMPORTANCES,
            *(f"random like {name}" for name in IMPORTANCES),
            "magnitude, from scratch",
        )

    def test_a_cell_is_mean_and_deviation_of_the_seeds(self, run: RunRecord) -> None:
        section = found(levels_section(Cases(run)))
        [table] = part(section, "Over all layers, iterative, rewound to initialisation").tables
        for level in LEVELS:
            row = cells(table, str(level))
            for name in IMPORTANCES:
                case = leveled(name, level)
                accuracies = [100 * accuracy_of(case, seed) for seed in SEEDS]
                assert row[name] == spread(accuracies)
                accuracies = [100 * accuracy_of(twin(case), seed) for seed in SEEDS]
                assert row[f"random like {name}"] == spread(accuracies)
        dense = [100 * accuracy_of(DENSE, seed) for seed in SEEDS]
        assert cells(table, "dense")["lamp"] == spread(dense)

    def test_sparsity_is_of_the_prunable_weights(self, run: RunRecord) -> None:
        section = found(levels_section(Cases(run)))
        [table] = part(section, "Over all layers, iterative, rewound to epoch 2").tables
        left = sum(left_of(layer, 3, "magnitude") for layer in LAYERS)
        assert cells(table, "3")["sparsity, %"] == f"{100 * (1 - left / TOTAL):.2f}"

    def test_the_best_of_each_row_is_marked(self, run: RunRecord) -> None:
        section = found(levels_section(Cases(run)))
        for table in (table for part in section.parts for table in part.tables):
            for name, row in table.rows:
                if name.isdigit():
                    means = [float(cell.text.split()[0]) for cell in row[1:]]
                    best = [mean for mean, cell in zip(means, row[1:], strict=True) if cell.is_best]
                    assert best == [max(means)] * means.count(max(means))

    def test_curves_show_every_mean_and_its_interval(self, run: RunRecord) -> None:
        section = found(levels_section(Cases(run)))
        figures = part(section, "Over all layers, iterative, rewound to initialisation").figures
        assert [figure.title for figure in figures] == ["All importances", *IMPORTANCES]
        drawing = str(figures[0].drawing)
        assert len(re.findall(r'<circle class="mark ', drawing)) == 3 * len(LEVELS)
        assert [label for _, label in figures[1].legend] == [
            "dense",
            "magnitude",
            "random like magnitude",
            "magnitude, from scratch",
        ]
        left = 100 * sum(left_of(layer, 1, "magnitude") for layer in LAYERS) / TOTAL
        assert f"{left:.2f} % of the weights left" in drawing

    def test_an_importance_that_left_no_weights_has_no_curve(self, run: RunRecord) -> None:
        networks = tuple(
            one.model_copy(update={"weights_left": 0})
            if (one.case.kind, one.case.criterion) == ("ticket", "lamp")
            else one
            for one in run.networks
        )
        section = found(levels_section(Cases(run.model_copy(update={"networks": networks}))))
        shown = part(section, "Over all layers, iterative, rewound to initialisation")
        drawing = str(shown.figures[0].drawing)
        # An axis of logarithms has no place for nothing.
        assert len(re.findall(r'<circle class="mark ', drawing)) == 2 * len(LEVELS)
        assert [label for _, label in shown.figures[0].legend] == ["dense", "magnitude", "softmax"]
        assert "lamp" in shown.tables[0].columns

    def test_verdicts_are_those_of_the_record(self, run: RunRecord) -> None:
        section = found(levels_section(Cases(run)))
        [table] = part(section, "Verdicts").tables
        verdict = next(v for v in run.verdicts if v.case == leveled("lamp", 2))
        assert verdict.against_random is not None
        row = cells(table, "lamp, level 2")
        assert row["verdict"] == verdict.verdict
        assert row["difference to dense, points"] == f"{verdict.mean:+.2f}"
        assert row["difference to random, points"] == f"{verdict.against_random:+.2f}"

    def test_partly_new_weights_are_compared_with_their_own_dense_network(self) -> None:
        run = weights_run()
        own = DENSE.model_copy(update={"weights": "partial-reinit"})
        case = leveled("lamp", 1, weights="partial-reinit")
        first = run.networks[0]
        more = [
            first.model_copy(update={"case": own, "accuracy": 0.5}),
            first.model_copy(update={"case": case, "accuracy": 0.625}),
        ]
        cases = Cases(run.model_copy(update={"networks": (*run.networks, *more)}))
        assert {network.case for network in cases.dense} == {DENSE}
        groups = [p for p in found(levels_section(cases)).parts if "partial-reinit" in p.title]
        assert cells(groups[0].tables[0], "dense")["lamp"] == "50.00"
        assert cells(groups[0].tables[0], "1") == {"sparsity, %": "-", "lamp": "62.50"}


class TestMasks:
    def test_each_importance_has_a_map_of_layers_by_levels(self, run: RunRecord) -> None:
        section = found(layers_section(Cases(run)))
        figures = section.parts[0].figures
        assert [figure.title for figure in figures] == list(IMPORTANCES)
        drawing = str(figures[1].drawing)
        for layer, total in LAYERS.items():
            for level in LEVELS:
                share = 100 * left_of(layer, level, "lamp") / total
                assert f"{layer}, {level}: {share:.4g} % of the weights left" in drawing

    def test_collapsed_layers_are_named_with_their_seeds(self, run: RunRecord) -> None:
        assert found(layers_section(Cases(run))).text[-1] == (
            f"Layers collapsed, and nothing passes them: {leveled('lamp', 4).label()}: fc.weight "
            "(seeds 0, 1, 2)."
        )
        sound = tuple(mask for mask in run.masks if not mask.collapsed)
        section = found(layers_section(Cases(run.model_copy(update={"masks": sound}))))
        assert "No layer collapsed" in section.text[-1]

    def test_overlap_is_of_all_importances_together(self, run: RunRecord) -> None:
        shown = part(found(overlap_section(Cases(run))), "Overlap of magnitude, lamp, softmax")
        [table] = shown.tables
        for level in LEVELS:
            row = cells(table, str(level))
            shares = [0.8 ** (1.5 * level) + seed / 100 for seed in SEEDS]
            chance = 0.8 ** (2 * level)
            assert row["of surviving"] == spread([100 * share for share in shares])
            assert row["of all"] == spread([100 * share * 0.8**level for share in shares])
            times = statistics.fmean(share / chance for share in shares)
            assert float(row["times chance"]) == pytest.approx(times, rel=0.01)
        pairs = str(shown.figures[1].drawing)
        share = 100 * (0.8 ** LEVELS[-1] + 0.01)
        assert f"lamp, softmax: {share:.4g} % of the smaller ticket shared" in pairs

    def test_two_importances_need_no_pairs(self, run: RunRecord) -> None:
        two = tuple(
            overlap
            for overlap in run.overlaps
            if {case.criterion for case in overlap.cases} == {"lamp", "softmax"}
        )
        cases = Cases(run.model_copy(update={"overlaps": two}))
        shown = part(found(overlap_section(cases)), "Overlap of lamp, softmax")
        assert len(shown.tables[0].rows) == len(LEVELS)
        assert [figure.title for figure in shown.figures] == ["By level"]

    def test_pairs_alone_are_not_all_importances(self, run: RunRecord) -> None:
        pairs = tuple(overlap for overlap in run.overlaps if len(overlap.cases) == 2)
        cases = Cases(run.model_copy(update={"overlaps": pairs}))
        shown = part(found(overlap_section(cases)), "Overlap of magnitude, lamp, softmax")
        assert shown.tables[0].rows == ()
        [figure] = shown.figures
        share = 100 * (0.8 ** LEVELS[-1] + 0.01)
        drawing = str(figure.drawing)
        assert f"lamp, softmax: {share:.4g} % of the smaller ticket shared" in drawing

    def test_spread_and_sign_flips_leave_out_what_there_is_not(self, run: RunRecord) -> None:
        [table] = part(found(overlap_section(Cases(run))), "Spread").tables
        row = cells(table, leveled("lamp", 4).label())
        assert row["spread, shared"] == spread([0.01, 0.011, 0.012], 4)
        assert row["sign flips, shared, %"] == "5.00 ± 0.00"
        assert row["sign flips, others, %"] == "-"

    def test_survival_is_summed_over_seeds(self, run: RunRecord) -> None:
        table = part(found(overlap_section(Cases(run))), "Survival").tables[0]
        kept, chance = 40 + 41 + 42, 3 * 25
        assert cells(table, "conv1.weight") == {
            "shared": "180",
            "kept again": str(kept),
            "by chance": f"{chance:.1f}",
            "difference, %": f"{100 * (kept / chance - 1):+.1f}",
        }
        assert cells(table, "fc.weight")["difference, %"] == "-"
        assert cells(table, "all layers")["kept again"] == str(kept)


class TestStability:
    def test_tickets_stand_beside_random_masks(self, run: RunRecord) -> None:
        lengths, angles = found(stability_section(Cases(run))).parts[0].tables
        row = cells(lengths, leveled("magnitude", 4, Step(epoch=2)).label())
        # One and three parts of noise, less by the epochs after which they split.
        mine, control = 12 / 3 + 1, 12 * 3 / 3 + 1
        assert row["to data order: ticket"] == f"{mine:.2f} ± 1.00"
        assert row["to data order: random"] == f"{control:.2f} ± 1.00"
        assert row["to data order: ratio"] == f"{control / mine:.2f}x"
        accuracies = [
            100 * accuracy_of(leveled("magnitude", 4, Step(epoch=2)), seed) for seed in SEEDS
        ]
        assert row["accuracy: ticket, %"] == spread(accuracies)
        row = cells(angles, leveled("lamp", 4).label())
        assert row["to pruning: ticket"] == "21.00 ± 1.00"
        assert row["to pruning: ratio"] == f"{61 / 21:.2f}x"

    def test_a_control_without_its_ticket_has_a_row(self, run: RunRecord) -> None:
        alone = tuple(s for s in run.stabilities if s.case.kind == "random")
        changed = run.model_copy(update={"stabilities": alone, "connectivities": ()})
        table = found(stability_section(Cases(changed))).parts[0].tables[0]
        row = cells(table, twin(leveled("lamp", 4)).label())
        assert row["to data order: ticket"] == row["to data order: ratio"] == "-"
        assert row["to data order: random"] == "37.00 ± 1.00"

    def test_curves_are_of_what_went_back_to_several_steps(self, run: RunRecord) -> None:
        shown = part(found(stability_section(Cases(run))), "Against the step")
        assert len(shown.figures) == 5
        names = [label for _, label in shown.figures[0].legend]
        assert names == ["magnitude", "random like magnitude"]
        one_step = tuple(s for s in run.stabilities if s.case.rewound_to == START)
        changed = run.model_copy(update={"stabilities": one_step, "connectivities": ()})
        assert len(found(stability_section(Cases(changed))).parts) == 1

    def test_curves_say_in_what_they_differ(self, run: RunRecord) -> None:
        def names(*others: dict[str, object]) -> list[str]:
            more = tuple(
                one.model_copy(update={"case": one.case.model_copy(update=other)})
                for other in ({}, *others)
                for one in run.stabilities
                if one.case.kind == "ticket"
            )
            changed = run.model_copy(update={"stabilities": more, "connectivities": ()})
            shown = part(found(stability_section(Cases(changed))), "Against the step")
            return [label for _, label in shown.figures[0].legend]

        assert names() == ["magnitude"]
        assert names({"level": 2}) == ["magnitude, level 4", "magnitude, level 2"]
        assert names({"scope": "layer"}) == [
            "magnitude, over all layers, iterative",
            "magnitude, each layer the same share, iterative",
        ]
        assert names({"level": 2, "schedule": "one-shot"}) == [
            "magnitude, level 4, over all layers, iterative",
            "magnitude, level 2, over all layers, one-shot",
        ]

    def test_connectivity_counts_the_stable_seeds(self, run: RunRecord) -> None:
        shown = part(found(stability_section(Cases(run))), "Linear")
        [table] = shown.tables
        assert cells(table, leveled("magnitude", 4).label()) == {
            "instability, points": "10.00 ± 0.00",
            "stable seeds": "0 of 3",
        }
        row = cells(table, leveled("magnitude", 4, Step(epoch=5)).label())
        assert row["stable seeds"] == "3 of 3"
        titles = [figure.title for figure in shown.figures]
        assert titles[0] == "Instability, points"
        assert "Error on the line, level 4, rewound to epoch 5" in titles

    def test_steps_are_iterations_where_batches_are_known(self, run: RunRecord) -> None:
        steps = [Step(epoch=1, iteration=2), START]
        places, axis = rewind_places(Cases(run), steps)
        # 1437 images in batches of 64.
        assert (places, axis) == ({START: 0, steps[0]: 23 + 2}, "rewound to iteration")
        blind = Cases(run.model_copy(update={"spec": {}}))
        assert rewind_places(blind, steps)[0] == {START: 0, steps[0]: 1}


class TestStructures:
    def test_there_is_a_table_for_each_measure_matched(self, structures: RunRecord) -> None:
        section = found(structures_section(Cases(structures)))
        titles = [part.title for part in section.parts]
        assert titles == [
            f"Equal {name}, scored at initialisation" for name in ("parameters", "filters", "MACs")
        ]
        columns = [part.tables[0].columns for part in section.parts]
        assert columns == [
            ("blocks", "filters", "weights"),
            ("blocks", "filters"),
            ("blocks", "filters", "weights"),
        ]

    def test_costs_are_shares_of_the_dense_network_of_the_seed(self, structures: RunRecord) -> None:
        rows = rivals_of(Cases(structures))["params"]
        row = next(row for key, row in rows.items() if key[1:] == ("snip", 2))
        assert row["blocks"].case == ticket("snip", 2)
        share = 1 - 2 * 4_718_592 / 69_124_736
        assert row["blocks"].macs_ratio == pytest.approx(share)
        assert row["blocks"].seconds_ratio == pytest.approx(share)
        assert row["blocks"].latency_ratio == pytest.approx((0.5 + 6 * share) / 6.5)
        assert row["weights"].latency_ratio == pytest.approx(1)
        assert row["weights"].macs_ratio == pytest.approx(0.88)
        assert row["filters"].params == round(467_946 * 0.88)

    def test_the_sentences_are_drawn_from_the_figures(self, structures: RunRecord) -> None:
        loss, latency = part(found(structures_section(Cases(structures))), "Equal par").text
        by_case = {verdict.case: verdict for verdict in structures.verdicts}
        means = {
            name: statistics.fmean(
                by_case[ticket(criterion, p, START, START, **other)].mean
                for criterion in ("snip", "grasp")
                for p in (1, 2, 3)
            )
            for name, other in (
                ("blocks", {}),
                ("filters", {"structure": "filters", "matched": "params"}),
                ("weights", {"structure": "weights", "matched": "params"}),
            )
        }
        assert ", ".join(f"{name} {mean:+.2f}" for name, mean in means.items()) in loss
        assert f"{max(means, key=lambda name: means[name]).capitalize()} come out best" in loss
        assert "weights 0.88x MACs and 1.00x latency (stays above)" in latency
        assert "(follows)" in latency

    def test_without_intervals_the_best_is_no_finding(self, structures: RunRecord) -> None:
        single = tuple(verdict_on(v.case, {0: v.differences[0]}) for v in structures.verdicts)
        changed = structures.model_copy(update={"verdicts": single})
        [loss, _] = part(found(structures_section(Cases(changed))), "Equal par").text
        assert "nothing says that this is more than chance" in loss

    def test_what_is_not_judged_is_no_loss(self, structures: RunRecord) -> None:
        def without(structure: str) -> Part:
            judged = tuple(v for v in structures.verdicts if v.case.structure != structure)
            changed = structures.model_copy(update={"verdicts": judged})
            return part(found(structures_section(Cases(changed))), "Equal par")

        shown = without("weights")
        row = dict(shown.tables[0].rows)["snip, p=2"]
        assert [cell.text == "not judged" for cell in row] == [False, False, True]
        assert f"{round(467_946 * 0.88):,.0f} parameters" in row[2].small
        # No sentence on losses: of latency, which needs no verdict, there is one.
        [latency] = shown.text
        assert latency.startswith("Means, as shares of dense: blocks")
        drawing = str(shown.figures[0].drawing)
        assert "filters, p=2:" in drawing
        assert "weights, p=2:" not in drawing

    def test_what_was_not_timed_has_no_latency(self, structures: RunRecord) -> None:
        def timed(*which: str) -> Part:
            networks = tuple(
                one
                if one.case.kind == "dense" or one.case.structure in which
                else one.model_copy(update={"latency_ms": None})
                for one in structures.networks
            )
            changed = structures.model_copy(update={"networks": networks})
            return part(found(structures_section(Cases(changed))), "Equal par")

        some = timed("blocks", "filters")
        assert "weights" not in some.text[1]
        assert "filters 0.88x MACs" in some.text[1]
        assert [figure.title for figure in some.figures][:2] == ["snip", "grasp"]
        assert "weights" not in re.sub(r"<text.*?</text>", "", str(some.figures[2].drawing))
        row = dict(some.tables[0].rows)["snip, p=2"]
        assert "latency not measured" in row[2].small
        none = timed()
        assert len(none.text) == 1
        assert "latency" not in none.text[0]
        assert [figure.title for figure in none.figures] == ["snip", "grasp"]

    def test_table_3_has_the_filters_of_one_block(self, structures: RunRecord) -> None:
        table = paper_tables(structures)[-1]
        filters, layers = dict(table.rows)["filters"], dict(table.rows)["layers"]
        assert [cell.case for cell in layers] == [ticket("snip", 1), ticket("grasp", 1)]
        for cell, name in zip(filters, ("snip", "grasp"), strict=True):
            case = ticket(name, 1, structure="filters", matched="filters")
            assert cell.verdict == next(v for v in structures.verdicts if v.case == case)
        assert "prunes no filters" not in table.notes[0]


class TestFiles:
    def test_each_analysis_is_a_table(self, run: RunRecord, tmp_path: Path) -> None:
        files = write_run_report(run, tmp_path)
        rows = {
            name: list(csv.DictReader(io.StringIO((tmp_path / name).read_text("utf-8"))))
            for name in files
            if name.endswith(".csv")
        }
        assert len(rows["masks.csv"]) == sum(len(mask.layers) for mask in run.masks)
        assert len(rows["overlaps.csv"]) == len(run.overlaps)
        assert len(rows["connections.csv"]) == len(run.connections)
        assert len(rows["survivals.csv"]) == 2 * len(run.survivals)
        assert len(rows["connectivities.csv"]) == 11 * len(run.connectivities)
        for row, stability in zip(rows["stabilities.csv"], run.stabilities, strict=True):
            assert float(row["to_order_l2"]) == stability.to_order.l2
            assert float(row["to_pruning_degrees"]) == stability.to_pruning.degrees
            assert (row["criterion"], row["level"]) == (stability.case.criterion, "4")
        assert rows["overlaps.csv"][0]["criterion"] == "magnitude;lamp;softmax"
        last = rows["networks.csv"][-1]
        assert (int(last["weights_total"]), last["structure"]) == (TOTAL, "weights")
        page = (tmp_path / "report.html").read_text("utf-8")
        assert all(f'href="{name}"' in page for name in files if name != "report.html")

    def test_names_from_the_file_are_text(self, run: RunRecord) -> None:
        evil = "<script>x</script>"
        masks = tuple(
            mask.model_copy(update={"layers": {evil: (1, 2)}, "collapsed": (evil,)})
            for mask in run.masks
        )
        assert "<script" not in page_html(run.model_copy(update={"masks": masks}))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
class TestBrowser:
    @pytest.mark.parametrize("width", [390, 1280])
    def test_it_reads_without_scrolling_sideways(
        self, run: RunRecord, structures: RunRecord, tmp_path: Path, width: int
    ) -> None:
        with Browser.open(tmp_path / "profile") as browser:
            for record in (run, structures):
                (tmp_path / record.name).mkdir()
                write_run_report(record, tmp_path / record.name)
                browser.show(tmp_path / record.name / "report.html", width)
                assert browser.problems == []
                browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert browser.ask("document.documentElement.scrollWidth") <= width
