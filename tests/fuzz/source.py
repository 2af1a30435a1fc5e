"""From a recipe to the text of a program that defines its network, runnable by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fuzz.recipe import Layer, Loop, Part, Recipe, Region, Unit

__all__ = ["source_of"]

C, WIDTH = 4, 8  # channels of images, width of tokens
SHAPES = {0: (5, 6), 1: (3, 8), 2: (3, 6, 6), 3: (3, 4, 4, 4)}

HELPERS = {
    "keep": """
def keep(owner, key, value):
    call = owner.calls[key] = owner.calls.get(key, -1) + 1
    off = (key, call) in owner.off or (key, None) in owner.off
    return value * 0.0 if off else value
""",
    "DropPath": """
class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        return x * keep / 0.7
""",
    "FunctionalDrop": """
class FunctionalDrop(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.2, training=self.training)
""",
    "FunctionalRelu": """
class FunctionalRelu(nn.Module):
    def forward(self, x):
        return F.relu(x, inplace=True)
""",
    "Scale": """
class Scale(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.gamma
""",
    "Plain": """
class Plain(nn.Module):
    def __init__(self, shape, dtype):
        super().__init__()
        self.scale = (torch.rand(shape) + 0.5).to(dtype)

    def forward(self, x):
        return x * self.scale
""",
    "Mode": """
class Mode(nn.Module):
    def forward(self, x):
        return x * 0.5 if self.training else x
""",
    "Stubborn": """
class Stubborn(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x) if x.mean() > 100 else -self.f(x)
""",
    "Gate": """
class Gate(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x * torch.sigmoid(self.f(x.mean(tuple(range(2, x.ndim)), keepdim=True)))
""",
    "Attention": """
class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))
""",
    "Multihead": """
class Multihead(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x, _ = self.attention(x, x, x, need_weights=False)
        return x
""",
}

MERGES = {
    "add": "y = {x} + f",
    "radd": "y = f + {x}",
    "iadd": "f += {x}\n        y = f",
    "torch": "y = torch.add(input={x}, other=f)",
    "alpha": "y = torch.add({x}, f, alpha=0.5)",
    "alpha_one": "y = torch.add(f, {x}, alpha=1)",
    "method": "y = {x}.add(f)",
    "add_": "y = f.add_({x})",
    "shortcut_add_": "y = {x}.add_(f)",
}
PARALLEL = {
    "": ["y = x + f", "y = y + {g}"],
    "f + x + g": ["y = f + x + {g}"],
    "f + g + x": ["y = f + {g} + x"],
    "x + (f + g)": ["y = x + (f + {g})"],
    "f + (g + x)": ["y = f + ({g} + x)"],
    "f += g": ["f += {g}", "y = x + f"],
    "dropped": ["y = x + F.dropout(f + {g}, 0.2, training=self.training)"],
}
SHORTCUTS = {"identity": "x", "scaled": "(x * 0.5)", "clone": "x.clone()"}


@dataclass
class _Writer:
    """The classes and helpers that one program needs, in the order of their definition."""

    recipe: Recipe
    switched: bool
    classes: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)

    # ------------------------------------------------------------ operations

    def operation(self, name: str) -> str:
        n, c = self.recipe.dimensions, C if self.recipe.dimensions else WIDTH
        shape = (c, *(1,) * (n - 1)) if n else (c,)
        shape = (*shape, 1) if n else shape
        conv = f"nn.Conv{n}d({c}, {c}, 3, padding=1, bias=False)"
        one = f"nn.Conv{n}d({c}, {c}, 1)" if n else f"nn.Linear({c}, {c})"
        norm = f"nn.BatchNorm{n}d({c}" if n else f"nn.LayerNorm({c}"
        with_helper = {
            "path": "DropPath()",
            "functional_drop": "FunctionalDrop()",
            "functional_relu_": "FunctionalRelu()",
            "scale": f"Scale({shape})",
            "plain": f"Plain({shape}, torch.{self.recipe.dtype})",
            "mode": "Mode()",
            "stubborn": f"Stubborn({one})",
            "gate": f"Gate({one})",
            "attention": f"Attention({c})",
            "multihead": f"Multihead({c})",
        }
        if name in with_helper:
            self.helpers.add(with_helper[name].partition("(")[0])
            return with_helper[name]
        # Of all pools AvgPool3d alone refuses an image smaller than its kernel, which strides make.
        downs = [part for part in self.recipe.body if getattr(part, "shortcut", "") == "down"]
        pool = "1" if n == 3 and downs else "3, 1, 1"
        return {
            "": "nn.Identity()",
            "conv": conv if n else f"nn.Linear({c}, {c}, bias=False)",
            "bias_conv": one,
            "stride": f"nn.Conv{n}d({c}, {c}, 3, stride=2, padding=1)",
            "depthwise": f"nn.Conv{n}d({c}, {c}, 3, padding=1, groups={c})",
            "weight_norm": f"nn.utils.parametrizations.weight_norm({one})",
            "norm": norm + ")",
            "affineless": norm + (", affine=False)" if n else ", elementwise_affine=False)"),
            "untracked": norm + (", track_running_stats=False)" if n else ", bias=False)"),
            "cumulative": norm + (", momentum=None)" if n else ", eps=0.1)"),
            "relu": "nn.ReLU()",
            "relu_": "nn.ReLU(inplace=True)",
            "relu6": "nn.ReLU6()",
            "hardtanh_": "nn.Hardtanh(inplace=True)",
            "gelu": "nn.GELU()",
            "tanh": "nn.Tanh()",
            "drop": "nn.Dropout(0.2)",
            "drop_channels": f"nn.Dropout{n}d(0.2)",
            "pool": f"nn.AvgPool{n}d({pool})",
            "maxpool": f"nn.MaxPool{n}d(3, 1, 1)",
        }[name]

    def part(self, part: Part) -> str:
        if isinstance(part, str):
            return self.operation(part)
        if isinstance(part, Unit):
            return self._unit(part)
        if isinstance(part, Layer):
            return self._layer(part)
        return self._loop(part) if isinstance(part, Loop) else self._region(part)

    def chain(self, parts: tuple[Part, ...]) -> str:
        return f"nn.Sequential({', '.join(map(self.part, parts))})"

    # ------------------------------------------------------------ modules

    def _keep(self, key: str, value: str) -> str:
        if not self.switched:
            return value
        self.helpers.add("keep")
        return f"keep(self, {key}, {value})"

    def _define(self, members: list[str], forward: list[str], arguments: str = "x") -> str:
        name = f"Part{len(self.classes)}"
        lines = [f"class {name}(nn.Module):"]
        if self.switched:
            lines += ["    off = frozenset()", ""]
            members = ["self.calls = {}", *members]
        lines += ["    def __init__(self):", "        super().__init__()"]
        lines += [f"        {member}" for member in members]
        lines += ["", f"    def forward(self, {arguments}):"]
        lines += [f"        {line}" for line in forward]
        self.classes.append("\n".join(lines))
        return f"{name}()"

    def _unit(self, unit: Unit) -> str:
        members = [f"self.f = {self.chain(unit.branch[unit.escapes :])}"]
        given = "h" if unit.begins else "x * mask" if unit.masked else "x"
        forward = []
        if unit.begins:
            members.append(f"self.n = {self.chain(unit.begins)}")
            forward.append("h = self.n(x)")
        if unit.escapes:
            members.append(f"self.e = {self.part(unit.branch[0])}")
            forward += [f"inner = self.e({given})", "f = self.f(inner)"]
        else:
            forward.append(f"f = self.f({given})")
        if unit.drop_path:
            members.append(f"self.path = {self.operation('path')}")
            forward.append("f = self.path(f)")
        if self.switched:
            forward.append(f"f = {self._keep(repr('f'), 'f')}")
        modules = {
            "module": "nn.Identity()",
            "empty": "nn.Sequential()",
            "projection": self.operation("bias_conv"),
            "down": self.operation("stride"),
        }
        if unit.shortcut in modules:
            members.append(f"self.shortcut = {modules[unit.shortcut]}")
        shortcut = SHORTCUTS.get(unit.shortcut, "self.shortcut(x)")
        if unit.parallel:
            members.append(f"self.g = {self.chain(unit.parallel)}")
            g = self._keep(repr("g"), f"self.g({given})")
            forward += [line.format(g=g) for line in PARALLEL[unit.order]]
        else:
            forward.append(MERGES[unit.merge].format(x=shortcut))
        if unit.escapes:
            forward.append("y = y * torch.sigmoid(inner.mean())")
        if unit.after:
            members.append(f"self.after = {self.operation(unit.after)}")
        forward.append("return self.after(y)" if unit.after else "return y")
        return self._define(members, forward, "x, mask" if unit.masked else "x")

    def _layer(self, layer: Layer) -> str:
        drop = ", nn.Dropout(0.2)" if layer.drop else ""
        mlp = f"nn.Linear({WIDTH}, {2 * WIDTH}), nn.GELU(), nn.Linear({2 * WIDTH}, {WIDTH})"
        members = [
            f"self.norm1, self.norm2 = nn.LayerNorm({WIDTH}), nn.LayerNorm({WIDTH})",
            f"self.attention = nn.Sequential({self.operation(layer.kind)}{drop})",
            f"self.mlp = nn.Sequential({mlp}{drop})",
        ]
        forward = []
        for i, key in enumerate(("attention", "mlp"), start=1):
            given = f"self.norm{i}(x)" if layer.norm_first else "x"
            merged = f"x + {self._keep(repr(key), f'self.{key}({given})')}"
            forward.append(f"x = {merged if layer.norm_first else f'self.norm{i}({merged})'}")
        return self._define(members, [*forward, "return x"])

    def _loop(self, loop: Loop) -> str:
        blocks = ", ".join(map(self.chain, loop.branches))
        step = f"x = x + {self._keep('str(i)', 'block(x)')}"
        head = "for i, block in enumerate(self.blocks):"
        forward = [head, f"    {step}", "return x"]
        return self._define([f"self.blocks = nn.ModuleList([{blocks}])"], forward)

    def _region(self, region: Region) -> str:
        items = ", ".join(map(self.part, region.items))
        forward = ["for item in self.items:", "    x = item(x)"]
        forward += ["if x.sum() > 1e9:", "    x = -x", "return x"]
        return self._define([f"self.items = nn.ModuleList([{items}])"], forward)

    # ------------------------------------------------------------ the network

    def network(self) -> str:
        recipe, n = self.recipe, self.recipe.dimensions
        first = f"nn.Conv{n}d(3, {C}, 3, padding=1)" if n else f"nn.Linear(6, {WIDTH})"
        stem = ", ".join([first, *map(self.operation, recipe.stem)])
        body = ",\n            ".join(map(self.part, recipe.body))
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        self.stem = nn.Sequential({stem})"]
        lines += [f"        self.body = nn.ModuleList([\n            {body},\n        ])"]
        lines += [f"        self.head = nn.Linear({C if n else WIDTH}, 3)"]
        lines += [f"        {line}" for line in self._tie()]
        lines += ["", *self._forward()]
        return "\n".join(lines)

    def _tie(self) -> list[str]:
        found = [
            f"self.body[{i}].f[{part.branch.index('conv')}].weight"
            for i, part in enumerate(self.recipe.body)
            if isinstance(part, Unit) and "conv" in part.branch and not part.escapes
        ]
        return [f"{found[1]} = {found[0]}"] if self.recipe.tied and len(found) > 1 else []

    def _forward(self) -> list[str]:
        recipe, masked = self.recipe, _is_masked(self.recipe)
        arguments = "x, mask" if masked else "x"
        if recipe.inputs == "dict":
            lines = ["    def forward(self, batch):", '        x = batch["x"]']
            lines += ['        mask = batch["mask"]'] if masked else []
        else:
            lines = [f"    def forward(self, {arguments}):"]
        lines += ["        x = self.stem(x)", "        seen = [x]"]
        order = [*range(len(recipe.body))]
        order += [] if recipe.again is None else [recipe.again]
        for i in order:
            part = recipe.body[i]
            given = "x, mask" if isinstance(part, Unit) and part.masked else "x"
            lines += [f"        x = self.body[{i}]({given})", "        seen.append(x)"]
        over = tuple(range(2, 2 + recipe.dimensions)) if recipe.dimensions else (1,)
        lines += [f"        y = self.head(x.mean({over}))"]
        if recipe.branching:
            lines += ["        if y.sum() > 1e9:", "            y = -y"]
        if recipe.output == "auxiliary":
            lines += ["        if self.training:", "            return y, x"]
        value = {
            "tuple": "(y, x)",
            "dict": '{"logits": y, "last": x}',
            "list": "[y, None, x]",
            "features": '{"logits": y, "features": seen}',
        }.get(recipe.output, "y")
        if recipe.output != "features":
            lines = [line for line in lines if "seen" not in line]
        return [*lines, f"        return {value}"]


def _is_masked(recipe: Recipe) -> bool:
    return any(isinstance(part, Unit) and part.masked for part in recipe.body)


FREEZE = {
    "half": "    for parameter in list(net.parameters())[::2]:",
    "stem": "    for parameter in net.stem.parameters():",
    "most": "    for parameter in [*net.stem.parameters(), *net.body.parameters()]:",
}


def _functions(recipe: Recipe) -> str:
    """Return the text of `make`, which builds the network, and of `inputs`."""
    make = ["def make():", "    torch.manual_seed(11)", "    net = Net()"]
    make += ["    for module in net.modules():"]
    make += ['        if getattr(module, "running_var", None) is not None:']
    make += ["            module.running_mean.normal_(0, 0.3)"]
    make += ["            module.running_var.uniform_(0.5, 1.5)"]
    if recipe.frozen:
        make += [FREEZE[recipe.frozen], "        parameter.requires_grad_(False)"]
    make += [f"    return net.to(torch.{recipe.dtype})"]
    shape = ", ".join(map(str, SHAPES[recipe.dimensions]))
    inputs = ["def inputs(batch):", "    torch.manual_seed(batch)"]
    inputs += [f"    x = torch.randn(batch, {shape}).to(torch.{recipe.dtype})"]
    pairs, values = '"x": x', "x,"
    if _is_masked(recipe):
        inputs += [f"    mask = torch.rand(1).to(torch.{recipe.dtype})"]
        pairs, values = '"x": x, "mask": mask', "x, mask"
    result = {"kwargs": f"{{{pairs}}}", "dict": f"({{{pairs}}},)"}.get(recipe.inputs, f"({values})")
    return "\n".join(make) + "\n\n\n" + "\n".join([*inputs, f"    return {result}"])


def source_of(recipe: Recipe, *, switched: bool = False) -> str:
    """Return a program that defines `Net`, `make()` and `inputs(batch)`.

    Where `switched`, each branch is multiplied by zero where its module's `off` names it.
    """
    writer = _Writer(recipe, switched)
    network = writer.network()
    head = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    helpers = [text.strip("\n") for name, text in HELPERS.items() if name in writer.helpers]
    return "\n\n\n".join([head.rstrip(), *helpers, *writer.classes, network, _functions(recipe)])
