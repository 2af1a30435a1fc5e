"""Write the results in `benchmarks/README.md` again, from the files in `benchmarks/results/`.

python benchmarks/document.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import RESULTS
from _results import MET, MISSED

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- results: written by `python benchmarks/document.py`, never by hand -->"
END = "<!-- end of results -->"

Result = Mapping[str, Any]


def document(folder: Path = RESULTS) -> str:
    """Return the results of a folder as Markdown, a section a file."""
    parts = []
    for name, section in SECTIONS.items():
        for suffix in ("", "_2_threads", "_cuda"):
            path = folder / f"{name}{suffix}.json"
            if path.exists():
                result = json.loads(path.read_text())
                parts += [f"### {path.stem}", _machine(result["machine"]), *section(result)]
    return "\n\n".join(part for part in parts if part)


def with_results(text: str, results: str) -> str:
    """Return a document with what lies between its markers replaced."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"the document lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


# --- a section for each script --------------------------------------------------------------------


def _analysis_scaling(result: Result) -> Iterator[str]:
    seconds = result["median_cpu_seconds"]
    yield _table(
        ["blocks", "seconds of CPU, median"],
        [[size, f"{found:.2f}"] for size, found in seconds.items()],
    )
    yield _targets(
        [
            _target(
                "1000 blocks over 100",
                result["ratio_1000_to_100"],
                at_most=result["target_at_most"],
            )
        ]
    )


def _ticket_overhead(result: Result) -> Iterator[str]:
    low, high = result["target"]
    what = f"ResNet56 ticket over hand-written, batch {result['batch']}"
    yield _targets([_target(what, result["ratio_median"], at_least=low, at_most=high)])


def _scoring(result: Result) -> Iterator[str]:
    for part, title in (("time", "time"), ("memory", "peak memory over a training step's")):
        rows = [
            [net, what, *_with_range(row["ratio"], row["range"]), _verdict(row["target"], row)]
            for net, found in result["nets"].items()
            for what, row in found.get(part, {}).items()
            if isinstance(row, Mapping) and "ratio" in row
        ]
        if rows:
            yield _table(["network", "criterion", title, "range", "target"], rows)


def _verdict(at_most: float, row: Mapping[str, Any]) -> str:
    return f"at most {at_most}: {MET if row['ratio'] <= at_most else MISSED}"


def _table4(result: Result) -> Iterator[str]:
    settings = result["settings"]
    yield (
        f"Reductions in percent of dense; *in italics what the paper printed*. A step is forward, "
        f"backward and SGD at batch {settings['batch']}, {settings['rounds']} rounds in turns; "
        "quartiles in brackets. CO2 follows from the time: same watts, same grid."
    )
    for network in ("resnet32", "resnet56"):
        if network in result:
            yield f"**{network}**"
            yield _network_of_table4(result[network])
    yield _targets(result["targets"])
    yield TABLE4_NOTES


def _network_of_table4(rows: Mapping[str, Any]) -> str:
    head = [
        "p", "off each stage", "FLOPs", "memory", "step over dense", "training speed-up",
        "CO2", "forward over dense, batch 1",
    ]  # fmt: skip
    lines = []
    for name, row in rows.items():
        own, published = row["counted"], row.get("published") or {}
        if name == "dense" or "training" not in row:
            continue
        training = row["training"]
        lines.append(
            [
                name.removeprefix("p="),
                ", ".join(map(str, own["per_stage"])),
                _beside(own["flops_percent"], published.get("flops_percent"), 3),
                _beside(own["memory_percent"], published.get("memory_percent"), 2),
                " ".join(_with_range(training["ratio"], training["quartiles"])),
                _beside(training["speed_up"], published.get("training_speed_up"), 2),
                _beside(training["co2_percent"], published.get("co2_percent"), 2),
                f"{row['latency']['1']['ratio']:.3f}" if "latency" in row else "",
            ]
        )
    return _table(head, lines)


TABLE4_NOTES = """\
The paper contradicts itself. Its FLOPs are truncated to two decimals (15.00 for 15.010), 45.00 is
45.029. Its row p = 4 of ResNet32 has the FLOPs of 5 blocks and the memory of 4. Its memory fits the
formula, 4 bytes x (layer outputs + parameters), only with a dense network that takes 1.026
(ResNet32) or 1.023 to 1.024 (ResNet56) times what the formula gives, and with these removals;
`memory_baseline_factor` in the JSON is that factor, row by row. Its CO2 cells are multiples of 1/27
and 1/45, as if made of kilograms rounded to two decimals."""


def _against_peers(result: Result) -> Iterator[str]:
    settings = result["settings"]
    yield (
        "Latency of the ticket over that of each other network, timed in turns; quartiles in "
        f"brackets. Batch 1: {settings['rounds']} rounds."
    )
    peers = ("dense", "by_hand", "identity", "width", "sibling")
    rows = [
        [
            network,
            size,
            *(
                " ".join(_with_range(row["ratio"], row["quartiles"])) if row else "-"
                for row in (found["ticket_over"].get(peer) for peer in peers)
            ),
        ]
        for network, sizes in result.get("latency", {}).items()
        for size, found in sizes.items()
    ]
    names = {"by_hand": "written by hand", "identity": "`Identity` by hand"}
    yield _table(["network", "batch", *(names.get(peer, peer) for peer in peers)], rows)
    yield _sizes(result.get("networks", {}))
    yield from _pruning(result)
    yield _targets(result["targets"])
    yield from _skipped(result)


def _sizes(networks: Mapping[str, Any]) -> str:
    return _table(
        ["network", "blocks off", "MACs kept", "width's MACs over ticket's", "sibling"],
        [
            [
                name,
                len(row["removed"]),
                f"{row['macs']['ticket'] / row['macs']['dense']:.3f}",
                _share(row["macs"], "width"),
                f"{row['sibling']}, {_share(row['macs'], 'sibling')}" if "sibling" in row else "-",
            ]
            for name, row in networks.items()
            if "macs" in row
        ],
    )


def _share(macs: Mapping[str, int], what: str) -> str:
    return f"{macs[what] / macs['ticket']:.3f}" if what in macs else "-"


def _pruning(result: Result) -> Iterator[str]:
    rows = []
    for network, row in result.get("time_to_prune", {}).items():
        seconds = {what: f"{found / 1e3:.2f}" for what, found in row["median_ms"].items()}
        memory = result.get("memory_to_prune", {}).get(network, {}).get("peak_bytes", {})
        rows.append(
            [
                network,
                *(seconds[what] for what in ("ticket", "ticket_unverified", "width")),
                *(
                    f"{memory[what] / 2**20:.0f}" if what in memory else "-"
                    for what in ("ticket", "width")
                ),
            ]
        )
    if rows:
        yield _table(
            [
                "network",
                "s to prune",
                "s, `verify=False`",
                "s, width",
                "peak MiB",
                "peak MiB, width",
            ],
            rows,
        )


def _ticket_costs(result: Result) -> Iterator[str]:
    networks = result.get("networks", {})
    steps = list(dict.fromkeys(step for row in networks.values() for step in row))
    yield (
        f"Time of the ticket over that of its dense model; up to {1 + result['settings']['noise']} "
        "is no difference."
    )
    rows = [[step, *(_cell(row.get(step)) for row in networks.values())] for step in steps]
    yield _table(["", *networks], rows)
    missed = [row["what"] for row in result["targets"] if not row["met"]]
    yield f"Longer than dense: {', '.join(missed) or 'nothing'}."
    yield from _skipped(result)


def _cell(row: Mapping[str, Any] | None) -> str:
    return " ".join(_with_range(row["ratio"], row["quartiles"])) if row else "-"


def _lottery(result: Result) -> Iterator[str]:
    yield (
        "Whether an experiment on digits shows what the papers found on their own data, decided by "
        "rule from intervals paired over seeds, or by all seeds being of one mind. Digits are "
        "small and easy: what is undecided here may well show elsewhere."
    )
    for run in result["runs"]:
        dense = ", ".join(f"{accuracy:.2f}" for accuracy in run["dense_percent"])
        yield (
            f"**{run['name']}** (`examples/{run['example']}.toml`): {run['trainings']} trainings, "
            f"{run['training_seconds'] / 60:.0f} minutes of training; dense {dense} %. "
            f"{_counted(run['verdicts'])}"
        )
        if run["findings"]:
            yield _table(
                ["claim", "paper", "here", "figures"],
                [[f["claim"], f["paper"], f["decision"], f["figures"]] for f in run["findings"]],
            )
        side_by_side = [
            row for row in run["verdicts"] if "latency" in row and " like p=" in row["case"]
        ]
        if side_by_side:
            columns = ["difference, points", "parameters", "MACs", "latency", "training"]
            yield "Over the dense network, means over seeds:"
            yield _table(
                ["network", *columns],
                [
                    [
                        row["case"],
                        f"{row['mean']:+.2f}",
                        *(f"{row[key]:.3f}" for key in ("params", "macs", "latency", "training")),
                    ]
                    for row in run["verdicts"]
                    if row["kind"] == "ticket"
                ],
            )


def _counted(verdicts: Iterable[Result]) -> str:
    found = [row["verdict"] for row in verdicts if row["kind"] == "ticket"]
    words = ", ".join(f"{found.count(word)} {word}" for word in dict.fromkeys(found))
    return f"Of {len(found)} kinds of ticket: {words}."


def _recovery_efficientnet(result: Result) -> Iterator[str]:
    methods = result["methods"]
    yield (
        f"{len(result['removed'])} blocks removed by `kl`: {', '.join(result['removed'])}. Fitted "
        f"to {result['fitted_to']} crops of {result['fitted_photos']} photos, tested on "
        f"{result['tested_on']} crops of {result['tested_photos']} others."
    )
    yield _table(
        ["method", "top-1 agreement", "top-5 agreement", "KL", "ridges", "seconds of CPU"],
        [
            [
                name,
                *(f"{row['value'][part]:.3f}" for part in ("top1", "top5", "kl")),
                ", ".join(f"{ridge:g}" for ridge in row.get("ridges", ())),
                f"{row['seconds']:.0f}",
            ]
            for name, row in methods.items()
        ],
    )
    yield _targets(
        [
            _target(
                f"top-1 agreement after {name}",
                methods[name]["value"]["top1"],
                at_least=0.7,
                at_most=1.0,
            )
            for name in ("refit", "moments")
        ]
    )


def _recovery_cost(result: Result) -> Iterator[str]:
    yield (
        f"A refit of ResNet-50 without four blocks, on {result['images']} images of "
        f"{result['size']}x{result['size']} in batches of {result['batch']}; passes are plain "
        "forward passes of the dense network, over the same images. Reading runs each image up to "
        "each gap, in both models; finding blocks, trials and proofs run two images, and cost the "
        "same for any number of them. `spread` removes the last block of each stage."
    )
    rows = result["cuts"]
    yield _table(
        ["cut", "gaps", "a pass, s", "reading, s", "solves, s", "the rest, s", "passes", "of 512"],
        [
            [
                name,
                len(row["gaps"]),
                *(
                    f"{seconds:.1f}"
                    for seconds in (
                        sum(row["forward_seconds"]) / 2,
                        row["reading_seconds"],
                        row["solve_seconds"],
                        row["fixed_seconds"],
                    )
                ),
                f"{row['passes']:.2f}",
                f"{row['passes_of_512']:.2f}",
            ]
            for name, row in rows.items()
        ],
    )
    if "peak_bytes" in result:
        peaks = ", ".join(f"{k} {v / 2**20:.0f}" for k, v in result["peak_bytes"].items())
        yield (
            f"Peak of resident memory above model, ticket and images, in MiB: {peaks}. The model "
            f"has {result['model_bytes'] / 2**20:.0f}, the largest Gram matrix "
            f"{result['gram_bytes'] / 2**20:.1f}."
        )
    yield _targets(
        [
            _target(f"passes for 512 images, {name}", row["passes_of_512"], at_most=4.0)
            for name, row in rows.items()
        ]
    )


def _recovery_smollm2(result: Result) -> Iterator[str]:
    dense = result["dense"]
    yield (
        f"Whole layers of {result['layers']} removed by `block_influence`; fitted to "
        f"{result['fitted_to_tokens']} tokens of some manuals, tested on "
        f"{result['tested_on_tokens']} of another. Dense perplexity {math.exp(dense):.1f}. What is "
        "closed is a share of the gap in log perplexity."
    )
    rows, closed = [], {}
    for count, ticket in result["tickets"].items():
        cut = ticket["methods"]["nothing"]["value"]
        for name, row in ticket["methods"].items():
            share = closed[count, name] = (cut - row["value"]) / (cut - dense)
            rows.append(
                [
                    count,
                    name,
                    f"{math.exp(row['value']):.1f}",
                    f"{100 * share:.0f} %",
                    ", ".join(f"{ridge:g}" for ridge in row.get("ridges", ())),
                    f"{row['seconds']:.0f}",
                ]
            )
    head = ["layers removed", "method", "perplexity", "closed", "ridges", "seconds of CPU"]
    yield _table(head, rows)
    if ("6", "refit") in closed:
        refit = closed["6", "refit"]
        targets = [_target("closed by refit, six removed", refit, at_least=0.4, at_most=1.0)]
        if ("6", "map") in closed:
            more = refit - closed["6", "map"]
            targets.append(_target("closed by refit more than by map", more, at_least=0, at_most=1))
        yield _targets(targets)


def _recovery_minilm(result: Result) -> Iterator[str]:
    yield (
        f"Fitted to {result['fitted_to']} sentences of some manuals, tested on "
        f"{result['tested_on']} of another: mean cosine of the embeddings with the dense ones, and "
        "rank correlation of the similarities of all pairs with theirs. Removed by "
        "`block_influence`."
    )
    names = list(next(iter(result["tickets"].values()))["methods"])
    for part, title in (("cosine", "cosine"), ("spearman", "rank correlation")):
        yield _table(
            [f"removed: {title}", *names],
            [
                [key, *(f"{ticket['methods'][name]['value'][part]:.3f}" for name in names)]
                for key, ticket in result["tickets"].items()
            ],
        )
    worse = min(
        ticket["methods"]["refit"]["value"][part] - ticket["methods"][other]["value"][part]
        for ticket in result["tickets"].values()
        for part in ("cosine", "spearman")
        for other in names
        if other != "refit"
    )
    yield _targets([_target("least lead of refit over another", worse, at_least=0, at_most=1)])


def _recovery_fashion(result: Result) -> Iterator[str]:
    yield (
        f"ResNet32 on {result['images']} images of {result['size']}x{result['size']}, "
        f"{result['epochs']} epochs, {len(result['runs'])} seeds; means of the test accuracy in "
        f"percent. Dense {result['dense']:.1f}, after one epoch more "
        f"{result['dense_one_epoch_more']:.1f}."
    )
    names = list(next(iter(result["means"].values())))
    yield _table(
        ["blocks removed", *names],
        [[key, *(f"{row[name]:.1f}" for name in names)] for key, row in result["means"].items()],
    )
    six = result["means"].get("6 one-shot")
    if six is not None and "refit, distilled" in six:
        refit, dense = six["refit"], result["dense"]
        yield "Six of thirteen out, one-shot; differences in points:"
        yield _targets(
            [
                _target("refit above nothing", refit - six["nothing"], at_least=30, at_most=100),
                _target("refit above norms", refit - six["norms"], at_least=4, at_most=100),
                _target("refit above map", refit - six["map"], at_least=2, at_most=100),
                _target("dense above refit", dense - refit, at_least=-100, at_most=3),
                _target(
                    "dense above refit, distilled",
                    dense - six["refit, distilled"],
                    at_least=-100,
                    at_most=1,
                ),
            ]
        )


NETWORKS = {"mlp": "A residual perceptron of eight blocks", "resnet20": "ResNet20"}


def _recovery_search(result: Result) -> Iterator[str]:
    means = result["means"]
    sets = ", ".join(f"{row['sets']:.0f} sets of {count}" for count, row in means.items())
    yield (
        f"{NETWORKS[result['network']]} on {result['images']} images of "
        f"{result['size']}x{result['size']}, {result['epochs']} epochs, {len(result['runs'])} "
        f"seeds, means. Dense {result['dense_accuracy']:.1f} %, loss {result['dense_loss']:.3f}. "
        f"All {sets} blocks are left out and refitted on {result['scored_on']} training images; "
        f"the loss is that of {result['tested_on']} test images, and in brackets the rank among "
        "all sets. Seconds of CPU are those of the search for the largest sets."
    )
    known = {
        "the best set": "best",
        "the best set on the scoring images": "best_by_scoring_data",
        "the median of all sets": "median",
    }
    rows = [
        [name, *(f"{row[key]:.3f}" for row in means.values()), ""] for name, key in known.items()
    ]
    *_, largest = means.values()
    for name, last in largest["searches"].items():
        found = [row["searches"][name] for row in means.values()]
        losses = (f"{one['loss']:.3f} ({one['rank']:.1f})" for one in found)
        rows.append([name, *losses, f"{last['seconds']:.0f}"])
    yield _table(["what goes", *(f"{count} blocks" for count in means), "seconds of CPU"], rows)


SECTIONS: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "table4": _table4,
    "against_peers": _against_peers,
    "ticket_costs": _ticket_costs,
    "ticket_overhead": _ticket_overhead,
    "scoring": _scoring,
    "analysis_scaling": _analysis_scaling,
    "recovery_efficientnet": _recovery_efficientnet,
    "recovery_fashion": _recovery_fashion,
    "recovery_search": _recovery_search,
    "recovery_cost": _recovery_cost,
    "recovery_smollm2": _recovery_smollm2,
    "recovery_minilm": _recovery_minilm,
    "lottery": _lottery,
}


# --- parts ----------------------------------------------------------------------------------------


def _machine(machine: Mapping[str, Any]) -> str:
    where = machine.get("gpu") or f"{machine['cores']} cores"
    return (
        f"{machine['date']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['architecture']}, {where}, {machine['threads']} thread(s)."
    )


def _target(what: str, value: float, **bounds: float) -> dict[str, Any]:
    met = bounds.get("at_least", value) <= value <= bounds["at_most"]
    return {"what": what, "value": value, **bounds, "met": met}


def _targets(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    return _table(
        ["to reach", "found", "target", ""],
        [
            [
                row["what"],
                f"{row['value']:.3f}",
                f"{row['at_least']} to {row['at_most']}"
                if "at_least" in row
                else f"at most {row['at_most']}",
                MET if row["met"] else MISSED,
            ]
            for row in rows
        ],
    )


def _skipped(result: Result) -> Iterator[str]:
    if result["skipped"]:
        yield "Not measured: " + "; ".join(f"{k} ({v})" for k, v in result["skipped"].items()) + "."


def _with_range(value: float, bounds: Sequence[float]) -> tuple[str, str]:
    return f"{value:.3f}", f"({bounds[0]:.3f} to {bounds[1]:.3f})"


def _beside(own: float, published: float | None, digits: int) -> str:
    return f"{own:.{digits}f}" + ("" if published is None else f" *{published:.2f}*")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    """Fill in the results."""
    README.write_text(with_results(README.read_text(), document()))
    print(f"{README} from {RESULTS}")


if __name__ == "__main__":
    main()
