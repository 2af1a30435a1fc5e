"""Runs on weights and filters against their steps done by hand with plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from typer.testing import CliRunner

from blockprune import find_blocks
from blockprune.cli import app
from blockprune.costs import block_costs
from blockprune.data import load_digits
from blockprune.errors import CriterionError, SpecError
from blockprune.lottery import RunRecord, Spec, read_specs, run
from blockprune.lottery.cases import Moments, cases_of
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.state import load_state
from blockprune.lottery.training import evaluate, train
from blockprune.lottery.work import order_seed
from blockprune.report import read_run
from tests.lottery_models import SPEC, Tiny, network, tiny

LAYERS = ("stem", "blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "head")
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=64)


def spec(**changes: Any) -> Spec:
    base = {key: value for key, value in SPEC.items() if key not in ("criteria", "p")}
    return Spec.parse({**base, "seeds": 1, **changes})


def final(folder: Path, stage: str) -> dict[str, Tensor]:
    return load_state(folder / "stages" / stage / "final.safetensors").weights


def masks(folder: Path, stage: str) -> dict[str, Tensor]:
    """Return the mask that a trained stage was told of, read with nothing of the package."""
    manifest = json.loads((folder / "stages" / stage / "manifest.json").read_text())
    return load_file(folder / "stages" / manifest["inputs"]["cut"]["mask"] / "mask.safetensors")


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[f"{layer}.weight"].double().flatten() for layer in LAYERS])


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    folder = tmp_path_factory.mktemp("levels")
    asked = spec(
        levels={
            "importances": ["magnitude", "l1"],
            "count": 2,
            "share": 0.5,
            "partial_reinit": True,
        },
        stability={"alphas": 3},
    )
    return run(asked, folder), folder


class TestLevels:
    def test_two_rounds_by_hand(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        data = load_digits(test_share=0.8)
        torch.manual_seed(0)
        first = {name: value.clone() for name, value in tiny().state_dict().items()}

        def trained(keep: dict[str, Tensor]) -> Tiny:
            """Train under torch's own masks, from the first weights."""
            model = tiny()
            model.load_state_dict(first)
            for layer in LAYERS:
                module = model.get_submodule(layer)
                torch_prune.custom_from_mask(module, "weight", keep[f"{layer}.weight"])
            train(model, data.train, RECIPE)
            for layer in LAYERS:
                torch_prune.remove(model.get_submodule(layer), "weight")
            return model

        keep = {f"{layer}.weight": torch.ones_like(first[f"{layer}.weight"]) for layer in LAYERS}
        model = trained(keep)
        assert network(record, kind="dense").accuracy == evaluate(model, data.test).accuracy
        for level in (1, 2):
            values = flat(model.state_dict()).abs()
            alive = flat(keep) > 0
            # Half of what is left goes, the first of equals first.
            order = sorted(alive.nonzero().flatten().tolist(), key=lambda at: (values[at], at))
            alive[order[: len(order) // 2]] = False
            parts = alive.split([keep[f"{layer}.weight"].numel() for layer in LAYERS])
            keep = {
                f"{layer}.weight": part.reshape(first[f"{layer}.weight"].shape).float()
                for layer, part in zip(LAYERS, parts, strict=True)
            }
            model = trained(keep)
            same = {"criterion": "magnitude", "weights": "rewind"}
            ticket = network(record, kind="ticket", level=level, **same)
            assert masks(folder, ticket.stage).keys() == keep.keys()
            assert all(masks(folder, ticket.stage)[k].equal(v > 0) for k, v in keep.items())
            assert ticket.accuracy == evaluate(model, data.test).accuracy
            state = final(folder, ticket.stage)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[name], value)
            total = len(values)
            assert (ticket.weights_left, ticket.weights_total) == (int(alive.sum()), total)
            dense = network(record, kind="dense")
            assert ticket.params == dense.params - total + int(alive.sum())

    def test_masked_weights_are_zero_at_the_end(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        masked = [one for one in record.networks if one.case.structure == "weights"]
        assert len(masked) == 2 * 2 * (1 + 1 + 1 + 1)
        for one in masked:
            state = final(folder, one.stage)
            for name, keep in masks(folder, one.stage).items():
                assert state[name][~keep].eq(0).all(), (one.case.label(), name)
                assert state[name][keep].ne(0).any(), (one.case.label(), name)

    def test_controls_have_the_ticket_s_proportions(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        by_case = {(one.case.kind, one.case.criterion, one.case.level): one for one in record.masks
                   if one.case.weights != "partial-reinit"}  # fmt: skip
        for criterion in ("magnitude", "l1"):
            for level in (1, 2):
                ticket = by_case["ticket", criterion, level]
                assert by_case["random", criterion, level].layers == ticket.layers
                assert by_case["scratch", criterion, level].layers == ticket.layers
                own, chance = (
                    masks(folder, network(record, **{**same, "kind": kind}).stage)
                    for same in [{"criterion": criterion, "level": level, "weights": "rewind"}]
                    for kind in ("ticket", "random")
                )
                assert any(not own[name].equal(chance[name]) for name in own)
                scratch = network(record, kind="scratch", criterion=criterion, level=level)
                assert all(
                    keep.equal(own[name]) for name, keep in masks(folder, scratch.stage).items()
                )

    def test_overlaps_are_those_of_the_masks(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        assert [one.cases[0].level for one in record.overlaps] == [1, 2]
        for one in record.overlaps:
            a, b = (flat(masks(folder, network(record, **dict(case)).stage)) for case in one.cases)
            both = float((a * b).sum())
            assert one.of_all == pytest.approx(both / len(a))
            assert one.of_surviving == pytest.approx(both / float(a.sum()))
            assert one.expected == pytest.approx(float(b.sum()) / len(b))

    def test_connections_and_survival(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        last = {
            (one.case.criterion, one.case.weights): one
            for one in record.networks
            if one.case.kind == "ticket" and one.case.level == 2
        }
        own = {key: flat(masks(folder, one.stage)) > 0 for key, one in last.items()}
        shared = own["magnitude", "rewind"] & own["l1", "rewind"]
        for found in record.connections:
            rounds = [network(record, kind="dense")]
            for level in (1, 2):
                same = {"criterion": found.case.criterion, "level": level, "kind": "ticket"}
                rounds.append(network(record, weights="rewind", **same))
            values = torch.stack([flat(final(folder, one.stage)) for one in rounds])
            others = own[str(found.case.criterion), "rewind"] & ~shared
            assert (found.overlapping, found.others) == (int(shared.sum()), int(others.sum()))
            for place, where in enumerate((shared, others)):
                chosen = values[:, where]
                assert found.spread[place] == pytest.approx(
                    float(chosen.std(dim=0, correction=0).mean()), rel=1e-6
                )
                flips = (chosen.max(dim=0).values > 0) & (chosen.min(dim=0).values < 0)
                assert found.sign_flips[place] == pytest.approx(float(flips.double().mean()))
        assert len(record.survivals) == 2
        for survival in record.survivals:
            again = own[str(survival.case.criterion), "partial-reinit"] & shared
            assert sum(kept for _, kept, _ in survival.layers.values()) == int(again.sum())
            assert sum(total for total, _, _ in survival.layers.values()) == int(shared.sum())

    def test_partly_new_weights_keep_the_shared_ones(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        [trunk] = [
            json.loads(path.read_text())
            for path in folder.glob("stages/dense-*/manifest.json")
            if "masks" in json.loads(path.read_text())["inputs"]["from"]
        ]
        found = [
            load_file(folder / "stages" / name / "mask.safetensors")
            for name in trunk["inputs"]["from"]["masks"]
        ]
        expected = {
            flat(masks(folder, network(record, kind="ticket", level=2, weights="rewind",
                                       criterion=name).stage)).sum().item()
            for name in ("magnitude", "l1")
        }  # fmt: skip
        assert {float(flat(mask).sum()) for mask in found} == expected

    def test_stability_by_hand(self, levels: tuple[RunRecord, Path]) -> None:
        record, folder = levels
        assert {one.case.kind for one in record.stabilities} == {"ticket", "random"}
        for one in record.stabilities:
            trained = network(record, **dict(one.case))
            keep = flat(masks(folder, trained.stage))
            own = flat(final(folder, trained.stage)) * keep
            dense = flat(final(folder, network(record, kind="dense").stage)) * keep
            assert one.to_pruning.l2 == pytest.approx(float((own - dense).norm()), rel=1e-6)
            cosine = own @ dense / (own.norm() * dense.norm())
            assert one.to_pruning.degrees == pytest.approx(
                float(torch.rad2deg(torch.arccos(cosine))), abs=1e-3
            )
            assert one.to_order.l2 > 0

    def test_the_twin_differs_in_the_order_of_the_data_alone(
        self, levels: tuple[RunRecord, Path]
    ) -> None:
        _, folder = levels
        told = [
            json.loads(path.read_text())["inputs"]
            for path in folder.glob("stages/ticket-*/manifest.json")
        ]
        twins = [one for one in told if one["recipe"]["seed"] == order_seed(0)]
        assert len(twins) == 4
        for twin in twins:
            same = {**twin, "recipe": {**twin["recipe"], "seed": 0}}
            assert same in told

    def test_a_line_ends_in_its_networks(self, levels: tuple[RunRecord, Path]) -> None:
        record, _ = levels
        assert len(record.connectivities) == 4
        for one in record.connectivities:
            trained = network(record, **dict(one.case))
            assert one.alphas == (0.0, 0.5, 1.0)
            assert one.errors[0] == pytest.approx(1 - trained.accuracy)
            ends = (one.errors[0] + one.errors[-1]) / 2
            assert one.instability == pytest.approx(max(one.errors) - ends)

    def test_of_three_importances_all_and_every_two_overlap(self, tmp_path: Path) -> None:
        asked = spec(
            levels={"importances": ["magnitude", "lamp", "synflow"], "count": 1, "share": 0.5},
            controls={"random": False, "scratch": False},
            recipe={**SPEC["recipe"], "epochs": 1},
        )
        record = run(asked, tmp_path)
        assert record.failures == {}
        kept = {
            one.case.criterion: flat(masks(tmp_path, one.stage)).bool()
            for one in record.networks
            if one.case.level
        }
        found = {tuple(case.criterion for case in one.cases): one for one in record.overlaps}
        assert sorted(map(len, found)) == [2, 2, 2, 3]
        for names, one in found.items():
            members = [kept[name] for name in names]
            shared = torch.stack(members).all(0).sum().item()
            fewest = min(int(keep.sum()) for keep in members)
            total = len(members[0])
            assert one.of_all == pytest.approx(shared / total)
            assert one.of_surviving == pytest.approx(shared / fewest)
            by_chance = math.prod(int(keep.sum()) / total for keep in members) * total / fewest
            assert one.expected == pytest.approx(by_chance)

    def test_one_shot_levels_and_layers(self, tmp_path: Path) -> None:
        asked = spec(
            levels={
                "importances": "magnitude",
                "count": 3,
                "schedule": ["iterative", "one-shot"],
                "scope": "layers",
                "trained": [1, 3],
            },
            controls={"random": False, "scratch": False},
        )
        record = run(asked, tmp_path)
        assert record.failures == {}
        tickets = {(one.case.schedule, one.case.level): one for one in record.masks}
        assert sorted(tickets) == [
            ("iterative", 1), ("iterative", 2), ("iterative", 3), ("one-shot", 1), ("one-shot", 3)
        ]  # fmt: skip
        kept = {key: sum(k for k, _ in one.layers.values()) for key, one in tickets.items()}
        assert kept["iterative", 3] == kept["one-shot", 3]
        for one in tickets.values():
            density = 0.8**one.case.level
            for left, total in one.layers.values():
                assert abs(left - density * total) <= one.case.level + 1
        # The first one-shot level is the first iterative one, and is trained once.
        assert len({one.stage for one in record.networks if one.case.level == 1}) == 1


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    pytest.importorskip("torch_pruning", reason="needs the extra: pip install blockprune[filters]")
    folder = tmp_path_factory.mktemp("structures")
    asked = spec(
        model={"name": "blockprune:resnet20", "arguments": {"in_channels": 1}},
        recipe={"epochs": 1, "lr": 0.05, "batch_size": 64},
        criteria="snip",
        p=1,
        structures=["blocks", "filters", "weights"],
        matched_by=["params", "macs", "filters"],
        latency={"batch": 2, "repeats": 2},
    )
    return run(asked, folder), folder


class TestStructures:
    def test_as_much_goes_of_each(self, side_by_side: tuple[RunRecord, Path]) -> None:
        record, _ = side_by_side
        assert record.failures == {}
        dense = network(record, kind="dense")
        of_blocks = network(record, kind="ticket", structure="blocks")
        model = nn.Module.eval(_resnet20())
        analysis = find_blocks(model, torch.zeros(1, 1, 8, 8))
        [gone] = of_blocks.removed
        costs = block_costs(analysis)[gone]
        for one in record.networks:
            if one.case.matched == "filters":
                assert one.filters == of_blocks.filters
            elif one.case.structure == "weights" and one.case.matched == "params":
                assert one.params == dense.params - costs.params
            elif one.case.structure == "weights":
                # The last weight to go may be worth more than was missing.
                assert 0 <= dense.macs - costs.macs - one.macs < 64
            elif one.case.structure == "filters":
                asked = costs.params if one.case.matched == "params" else costs.macs
                missing = (dense.params - one.params) if one.case.matched == "params" else (
                    dense.macs - one.macs
                )  # fmt: skip
                assert 0.9 * asked < missing <= asked
        assert all(one.latency_ms for one in record.networks)

    def test_filters_leave_narrower_states(self, side_by_side: tuple[RunRecord, Path]) -> None:
        record, folder = side_by_side
        narrow = [one for one in record.networks if one.case.structure == "filters"]
        assert len(narrow) == 3 * 3
        for one in narrow:
            state = final(folder, one.stage)
            for name, lost in one.narrowed.items():
                dense = final(folder, network(record, kind="dense").stage)[f"{name}.weight"]
                assert state[f"{name}.weight"].shape[0] == dense.shape[0] - lost
            assert sum(one.narrowed.values()) == (network(record, kind="dense").filters or 0) - (
                one.filters or 0
            )

    def test_a_killed_run_ends_alike(self, side_by_side: tuple[RunRecord, Path]) -> None:
        record, folder = side_by_side
        for kind in ("mask", "filters", "evaluation"):
            for stage in sorted(folder.glob(f"stages/{kind}-*"))[:2]:
                for file in stage.iterdir():
                    file.unlink()
                stage.rmdir()
        again = run(Spec.model_validate(record.spec), folder, command=record.command)
        assert again.without_times() == record.without_times()


def _resnet20() -> nn.Module:
    from blockprune.models import resnet20

    return resnet20(in_channels=1)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "criteria is an empty list"),
            ({"criteria": "snip"}, "p is an empty list"),
            ({"stability": {}, "criteria": "snip", "p": 1}, "which is not there"),
            ({"criteria": "snip", "p": 1, "matched_by": "macs"}, "matched_by means nothing"),
            ({"criteria": "snip", "p": 1, "matched_p": 1}, "matched_p means nothing"),
            (
                {"criteria": "snip", "p": [1, 2], "structures": "filters", "matched_p": 3},
                "is to be a part of p",
            ),
            (
                {"criteria": "snip", "p": 1, "structures": "weights", "matched_by": "filters"},
                "cannot be matched by filters",
            ),
            (
                {"criteria": "snip", "p": 1, "structures": ["blocks", "weights"],
                 "schedule": "iterative"},
                "is for blocks alone",
            ),
            ({"levels": {"importances": []}}, "levels.importances is an empty list"),
            ({"levels": {"importances": "l1", "share": 1.0}}, "levels.share"),
            ({"levels": {"importances": "l1", "count": 2, "controls_at": 3}}, "levels are 1 .. 2"),
            (
                {"levels": {"importances": "l1", "count": 2}, "stability": {"levels": [0]}},
                "stability.levels = [0]: levels are 1 .. 2",
            ),
            ({"levels": {"importances": "l1", "partial_reinit": True}}, "two importances or more"),
            ({"levels": {"importances": "l1", "trained": 3}}, 'is of "one-shot" levels'),
            (
                {"levels": {"importances": "l1", "schedule": "one-shot", "trained": [1, 3],
                            "controls_at": 2}},
                "levels [2] are named",
            ),
            (
                {"levels": {"importances": ["l1", "l2"], "partial_reinit": True},
                 "weights": "reinit"},
                'needs "rewind"',
            ),
            ({"weights": "partial-reinit", "levels": {"importances": "l1"}}, "no policy of its"),
            ({"levels": {"importances": "l1"}, "stability": {"alphas": 1}}, "a line has two ends"),
        ],
    )  # fmt: skip
    def test_by_the_spec(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as caught:
            spec(**changes)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"levels": {"importances": "magnitud"}}, "Did you mean magnitude"),
            ({"levels": {"importances": "random"}}, "random ones are a control"),
            ({"criteria": "cka", "p": 1, "structures": "weights"}, "'cka' ranks no weights"),
            ({"criteria": "cka", "p": 1, "structures": "filters"}, "'cka' ranks no filters"),
        ],
    )
    def test_before_any_work(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises((SpecError, CriterionError)) as caught:
            run(spec(**changes), tmp_path)
        assert message in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_a_network_without_inner_filters(self, tmp_path: Path) -> None:
        pytest.importorskip(
            "torch_pruning", reason="needs the extra: pip install blockprune[filters]"
        )
        with pytest.raises(SpecError, match="no convolution inside a residual branch"):
            run(spec(criteria="snip", p=1, structures="filters"), tmp_path)


def test_only_some_tickets_have_others_beside_them() -> None:
    asked = spec(criteria="snip", p=[1, 2], structures=["blocks", "filters"], matched_p=1, seeds=1)
    found = cases_of(asked, [1, 2], Moments(epochs=2, per_epoch=6))
    beside = {(case.structure, case.p) for case in found if case.kind == "ticket"}
    assert beside == {("blocks", 1), ("blocks", 2), ("filters", 1)}


class TestSuites:
    SHARED = """
        p = 1
        criteria = "snip"
        recipe = { epochs = 2, lr = 0.1 }
        [[runs]]
        name = "a"
        model = { name = "blockprune:resnet20" }
        """

    def read(self, folder: Path, text: str) -> tuple[Spec, ...]:
        file = folder / "suite.toml"
        file.write_text(text)
        return read_specs(file)

    def test_runs_share_what_they_do_not_say(self, tmp_path: Path) -> None:
        text = self.SHARED + (
            '[[runs]]\nname = "b"\nmodel = { name = "blockprune:resnet32" }\n'
            "recipe = { epochs = 3 }\n"
        )
        a, b = self.read(tmp_path, text)
        assert (a.name, a.recipe.epochs, a.recipe.lr) == ("a", 2, 0.1)
        assert (b.name, b.recipe.epochs, b.recipe.lr) == ("b", 3, 0.1)
        assert b.model.name == "blockprune:resnet32"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("runs = []", "is a list of tables"),
            ("runs = 3", "is a list of tables"),
            ("[[runs]]\np = 1", "is named None"),
            ('[[runs]]\nname = "../up"', "is named '../up'"),
            ('[[runs]]\nname = "report"', "is named 'report'"),
            (SHARED + '[[runs]]\nname = "A"', "two runs have one name"),
            (SHARED + '[[runs]]\nname = "b"\ncriterio = 1', "run b cannot be used"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(SpecError) as caught:
            self.read(tmp_path, text)
        assert message in str(caught.value)

    def test_each_run_has_its_folder_and_its_report(self, tmp_path: Path) -> None:
        shared = {key: value for key, value in SPEC.items() if key != "name"}
        runs = [{"name": name, "p": p} for name, p in (("one", 1), ("two", 2))]
        text = json.dumps({**shared, "seeds": 1, "runs": runs})
        (tmp_path / "suite.json").write_text(text)
        out = tmp_path / "out"
        command = ["lottery", "run", str(tmp_path / "suite.json"), "--out", str(out)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        for name, p in (("one", 1), ("two", 2)):
            record = read_run(out / name)
            assert (record.name, network(record, kind="ticket").case.p) == (name, p)
        told = CliRunner().invoke(app, ["report", str(out)])
        assert told.exit_code == 0, told.output
        index = (out / "report" / "index.html").read_text()
        assert "one/report/report.html" in index
        assert "two/report/report.html" in index
