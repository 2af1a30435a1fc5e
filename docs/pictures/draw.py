"""Draw the pictures of these pages: `python docs/pictures/draw.py` writes the SVG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
SHORTCUT, BRANCH, KEPT, INK, PALE = "#0072b2", "#d55e00", "#bcc2c8", "#222222", "#f3f5f7"

REFUSED = (
    ("projection_shortcut", "1x1 conv", "branch"),
    ("independent_operands", None, None),
    ("scaled_shortcut", "times 2", "branch"),
    ("shape_change", "pad", "branch"),
    ("branch_escapes", None, "branch"),
    ("mutates_shortcut", None, "ReLU_"),
    ("no_parameters", None, "dropout"),
    ("opaque", None, "?"),
)


def text(
    x: float, y: float, what: str, *, size: int = 12, color: str = INK, at: str = "middle"
) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{at}"'
    return f'<text {place} font-size="{size}" fill="{color}">{what}</text>'


def path(points: str, color: str, *, is_dashed: bool = False, arrow: bool = True) -> str:
    dashes = ' stroke-dasharray="5 4"' if is_dashed else ""
    end = f' marker-end="url(#to{color[1:]})"' if arrow else ""
    return f'<path d="{points}" fill="none" stroke="{color}" stroke-width="2"{dashes}{end}/>'


def box(x: float, y: float, what: str, color: str, *, width: float = 84, height: float = 26) -> str:
    """Return a labelled box around a centre."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" '
        f'rx="4" fill="#ffffff" stroke="{color}" stroke-width="2"/>' + text(x, y + 4, what)
    )


def merge(x: float, y: float) -> str:
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#ffffff" stroke="{INK}" stroke-width="2"/>'
        f'<path d="M{x - 6:g} {y:g}H{x + 6:g}M{x:g} {y - 6:g}V{y + 6:g}" stroke="{INK}" '
        'stroke-width="2"/>'
    )


def frame(x: float, y: float, width: float, height: float, color: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{PALE}" '
        f'stroke="{color}" stroke-width="1.5" stroke-dasharray="6 4"/>'
    )


def residual(x: float, y: float, shortcut: str | None, branch: str | None) -> list[str]:
    """Return one merge: the shortcut runs down at `x`, the branch to its right."""
    parts = [
        path(f"M{x} {y}V{y + 118}", SHORTCUT),
        path(f"M{x} {y + 18}H{x + 82}V{y + 130}H{x + 13}", BRANCH),
        merge(x, y + 130),
        path(f"M{x} {y + 140}V{y + 164}", INK),
    ]
    parts += [box(x + 82, y + 72, branch, BRANCH, width=70)] if branch else []
    parts += [box(x, y + 72, shortcut, SHORTCUT, width=66)] if shortcut else []
    return parts


def picture_of_a_block() -> str:
    parts = [text(150, 28, "dense", size=15), text(470, 28, "ticket", size=15)]
    parts += [
        box(95, 62, "layer", KEPT),
        path("M95 75V262", SHORTCUT),
        path("M95 100H200V275H108", BRANCH),
        *(
            box(200, 128 + 32 * place, what, BRANCH)
            for place, what in enumerate(("conv", "norm", "ReLU", "conv"))
        ),
        merge(95, 275),
        path("M95 285V318", INK),
        box(95, 333, "layer", KEPT),
        text(86, 190, "shortcut", color=SHORTCUT, at="end"),
        text(254, 182, "branch", color=BRANCH, at="start"),
        text(76, 280, "merge", at="end"),
        box(470, 62, "layer", KEPT),
        path("M470 75V318", SHORTCUT),
        box(470, 333, "layer", KEPT),
        text(485, 195, "what enters the merge", at="start"),
        text(485, 212, "is the shortcut alone", at="start"),
        path("M330 195H390", INK),
    ]
    return _svg(640, 365, parts)


def picture_of_refusals() -> str:
    parts: list[str] = []
    for place, (name, shortcut, branch) in enumerate(REFUSED):
        x, y = 50 + place % 4 * 170, 50 + place // 4 * 225
        parts.append(text(x + 35, y - 16, name, size=13))
        if name == "independent_operands":
            parts += [
                path(f"M{x} {y}V{y + 118}", SHORTCUT),
                path(f"M{x + 82} {y}V{y + 130}H{x + 13}", BRANCH),
                box(x, y + 72, "one", SHORTCUT, width=60),
                box(x + 82, y + 72, "other", BRANCH, width=60),
                merge(x, y + 130),
                path(f"M{x} {y + 140}V{y + 164}", INK),
            ]
            continue
        parts += residual(x, y, shortcut, branch)
        if name == "branch_escapes":
            parts.append(path(f"M{x + 82} {y + 105}H{x + 118}", BRANCH))
        if name == "mutates_shortcut":
            parts.append(path(f"M{x + 47} {y + 72}H{x + 6}", BRANCH, is_dashed=True))
    return _svg(690, 465, parts)


def picture_of_granularity() -> str:
    parts: list[str] = []
    kinds = (
        ("branch: two blocks", ((62, 120), (188, 120)), False),
        ("layer: one block", ((62, 246),), False),
        ("post-norm, layer_approx", ((62, 250),), True),
    )
    for place, (title, frames, is_post_norm) in enumerate(kinds):
        x = 60 + place * 220
        parts.append(text(x + 50, 26, title, size=13))
        parts += [frame(x - 36, y, 187, height, BRANCH) for y, height in frames]
        start = 44
        for y, what in ((70, "attention"), (196, "MLP")):
            bottom = y + (62 if is_post_norm else 84)
            parts += [
                path(f"M{x} {start}V{bottom - 12}", SHORTCUT),
                path(f"M{x} {y + 4}H{x + 90}V{bottom}H{x + 13}", BRANCH),
                box(x + 90, y + 34, what, BRANCH),
                merge(x, bottom),
            ]
            if is_post_norm:
                parts += [
                    path(f"M{x} {bottom + 10}V{bottom + 22}", INK, arrow=False),
                    box(x, bottom + 34, "norm", INK, width=54, height=22),
                ]
            start = bottom + (45 if is_post_norm else 10)
        parts.append(path(f"M{x} {start}V336", INK))
    return _svg(690, 350, parts)


def picture_of_the_flow() -> str:
    steps = (
        ("model", "find_blocks"),
        ("analysis", "score_blocks"),
        ("scores", "make_plan"),
        ("plan", "remove_blocks"),
        ("ticket", None),
    )
    parts: list[str] = []
    for place, (value, call) in enumerate(steps):
        x = 58 + place * 150
        parts.append(box(x, 50, value, SHORTCUT if call else BRANCH))
        if call:
            parts += [path(f"M{x + 44} 50H{x + 103}", INK), text(x + 75, 24, call)]
    return _svg(720, 84, parts)


def picture_of_policies() -> str:
    left, right, k = 150, 610, 265
    rows = (
        ("dense", left, right, KEPT, "weights of the seed"),
        ("rewind", k, right, SHORTCUT, "dense weights of step k"),
        ("learning-rate", k, right, SHORTCUT, "dense final weights"),
        ("reinit", left, right, SHORTCUT, "new weights"),
        ("finetune", right, right + 90, BRANCH, "dense final weights, constant small rate"),
    )
    parts = [
        text(left, 26, "init"),
        text(k, 26, "k = rewound_to"),
        text(right, 26, "final"),
        *(path(f"M{x} 34V262", KEPT, is_dashed=True, arrow=False) for x in (left, k, right)),
    ]
    for place, (name, start, end, color, note) in enumerate(rows):
        y = 64 + 46 * place
        parts += [text(134, y + 4, name, at="end"), path(f"M{start} {y}H{end - 6}", color)]
        is_late = start == right
        parts.append(
            text(
                right - 8 if is_late else start + 8,
                y - 7,
                note,
                size=11,
                at="end" if is_late else "start",
            )
        )
    return _svg(720, 275, parts)


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    heads = "".join(
        f'<marker id="to{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
        for color in (SHORTCUT, BRANCH, KEPT, INK)
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif">\n<defs>{heads}</defs>\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


PICTURES = {
    "block.svg": picture_of_a_block,
    "refusals.svg": picture_of_refusals,
    "granularity.svg": picture_of_granularity,
    "flow.svg": picture_of_the_flow,
    "policies.svg": picture_of_policies,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
