"""What of this installation works here: each part imported, and made to do one small real thing.

Nothing but this package and the standard library is imported until a part is tried, so that a part
that does not import is an answer and no traceback. Texts name no person, path or machine: they are
for reports to strangers.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, Literal

from packaging.requirements import InvalidRequirement, Requirement

__all__ = ["Finding", "examine", "versions"]

_PACKAGE: Final = "blockprune"
_BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
_BROWSER_SECONDS: Final = 20
_LONGEST_DETAIL: Final = 200

# A path up to its last part, on any system.
_FOLDERS: Final = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\"]+)+[/\\]")


class _Absent(Exception):
    """A part is not on this machine; the message says what that means."""


@dataclass(frozen=True)
class Finding:
    """What was found of one part.

    Attributes:
        part: its name: of a package, or of something else on this machine.
        is_core: whether the package is of no use without it.
        state: "works" (it did what was tried), "absent", or "broken" (it is there, and failed).
        version: of the package; None where it has none or is absent.
        detail: what was tried, what went wrong, or how to get it.
    """

    part: str
    is_core: bool
    state: Literal["works", "absent", "broken"]
    version: str | None
    detail: str


@dataclass(frozen=True)
class _Part:
    """A part, and how to try it.

    Attributes:
        name: of the package as pip knows it, or of something that pip knows nothing of.
        module: that the package is imported by; None: it is no package.
        trial: does one small thing with the module, and says what; raises whatever it likes.
        is_core: whether nothing works without it.
    """

    name: str
    module: str | None
    trial: Callable[[Any], str]
    is_core: bool = False


def examine() -> tuple[Finding, ...]:
    """Return what was found of every part, those of the core first.

    Example:
        ``[finding.part for finding in examine() if finding.state == "broken"]``
    """
    return tuple(_examined(part) for part in _PARTS)


def versions() -> dict[str, str]:
    """Return what a report of a bug needs to say of this machine, in the order it is read in.

    Example:
        >>> from blockprune.doctor import versions
        >>> list(versions())[:3]
        ['blockprune', 'Python', 'system']
    """
    found = {
        _PACKAGE: _version(_PACKAGE) or "not installed",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in dict.fromkeys(requirement.name for requirement in _requirements(_PACKAGE)):
        if name != _PACKAGE:
            found[name] = _version(name) or "not installed"
    return found | _torch_facts()


def _torch_facts() -> dict[str, str]:
    try:
        import torch
    # Whatever its import raises, a report says that it does.
    except Exception as error:
        return {"CUDA": f"torch does not import: {type(error).__name__}"}
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    built = torch.version.cuda or "none"
    return {
        "CUDA": f"built with {built}; {', '.join(devices) or 'no device'}",
        "threads": f"{torch.get_num_threads()} of torch, {os.cpu_count()} cores",
    }


def _examined(part: _Part) -> Finding:
    version = _version(part.name) if part.module else None
    try:
        with _quiet():
            module = _imported(part)
            detail = part.trial(module)
        state: Literal["works", "absent", "broken"] = "works"
    except _Absent as error:
        state, detail = "absent", str(error)
    # A part that fails fails in any way there is; that is what is to be told.
    except Exception as error:
        state = "broken"
        detail = _without_folders(f"{type(error).__name__}: {error}".split("\n")[0])
        detail = detail[:_LONGEST_DETAIL]
    return Finding(part.name, part.is_core, state, version, detail)


def _imported(part: _Part) -> Any:
    """Return the module of a part, None where it has none.

    Raises:
        _Absent: it is not installed, which is not the same as that it does not import.
    """
    if part.module is None:
        return None
    try:
        return importlib.import_module(part.module)
    except ModuleNotFoundError as error:
        if error.name is None or part.module.split(".")[0] != error.name.split(".")[0]:
            raise
        extras = _extras(part.name)
        wanted = f"'{_PACKAGE}[{extras[0]}]'" if extras else part.name
        raise _Absent(f"pip install {wanted}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what packages print and warn of as they are tried."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _try_requirements(_: None) -> str:
    """Compare what is installed with what this package asks for."""
    asked = [r for r in _requirements(_PACKAGE) if r.marker is None or r.marker.evaluate()]
    for requirement in asked:
        _check_version(_PACKAGE, requirement)
    return f"{len(asked)} required packages are there, none too old"


def _try_torch(torch: Any) -> str:
    weight = torch.ones(2, 2, requires_grad=True)
    (weight @ weight).sum().backward()
    if weight.grad.tolist() != [[4.0, 4.0], [4.0, 4.0]]:
        raise RuntimeError("a gradient is wrong")
    return "a gradient was computed"


def _try_torchvision(torchvision: Any) -> str:
    """Run an operation that torchvision compiles against one version of torch."""
    import torch

    for requirement in _requirements("torchvision"):
        if requirement.name == "torch":
            _check_version("torchvision", requirement)
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([0.5, 0.9])
    if torchvision.ops.nms(boxes, scores, 0.5).tolist() != [1]:
        raise RuntimeError("non-maximum suppression kept the wrong box")
    return "a compiled operation was run; made for this torch"


def _try_pruning(blockprune: Any) -> str:
    from blockprune.models import resnet20
    from blockprune.randomness import preserved_rng

    with preserved_rng():
        ticket = blockprune.prune(resnet20(), "l1", 1)
    [gone] = blockprune.plan_of(ticket).remove
    return f"a ResNet20 was pruned of {gone}, and verified"


def _try_torch_pruning(torch_pruning: Any) -> str:
    from torch import nn, ones

    first, second = nn.Linear(4, 4), nn.Linear(4, 2)
    net = nn.Sequential(first, second)
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=ones(1, 4))
    graph.get_pruning_group(first, torch_pruning.prune_linear_out_channels, idxs=[0]).prune()
    if tuple(second.weight.shape) != (2, 3):
        raise RuntimeError("a column is left where its row went")
    return "one output of a layer was pruned"


def _try_peft(peft: Any) -> str:
    from torch import nn, ones

    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["0"]), net)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    if net(ones(1, 2)).shape != (1, 2) or len(names) != 2 or "lora" not in names[0]:
        raise RuntimeError("a layer was given no adapter")
    return "a layer was given an adapter"


def _try_timm(timm: Any) -> str:
    timm.create_model("resnet10t", num_classes=2)
    return "a resnet10t was built"


def _try_transformers(transformers: Any) -> str:
    from torch import tensor

    sizes = {"n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": 4, "n_positions": 4}
    net = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    net(tensor([[0, 1]]))
    return "a GPT-2 of one layer was run"


def _try_distributed(distributed: Any) -> str:
    # In this process, with no port open to others.
    with distributed.Client(processes=False, n_workers=1, dashboard_address=None) as client:
        if client.submit(sum, [1, 2]).result() != 3:
            raise RuntimeError("a worker adds wrongly")
    return "a worker in this process did a task"


def _try_codecarbon(_: Any) -> str:
    from blockprune.profiling import metered_energy

    parts = metered_energy(lambda: None).parts
    told = ", ".join(f"{p.name} {'measured' if p.measured else 'estimated'}" for p in parts)
    return f"energy was metered offline: {told or 'no part of this machine'}"


def _try_attacks(attacks: Any) -> str:
    import numpy
    from torch import nn

    estimators = importlib.import_module("art.estimators.classification")
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    classifier = estimators.PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (1, 2, 2), 2, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = attacks.FastGradientMethod(classifier, eps=0.1)
    attack.generate(numpy.full((1, 1, 2, 2), 0.5, numpy.float32))
    return "an image was attacked by FGSM"


def _try_onnxruntime(onnxruntime: Any) -> str:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", *ends)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=_IR_VERSION
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    import numpy

    [found] = session.run(None, {"x": numpy.array([-1.0, 2.0], numpy.float32)})
    if found.tolist() != [0.0, 2.0]:
        raise RuntimeError("a ReLU is wrong")
    return "a graph of one node was run"


# Of ONNX 1.13: what every onnxruntime of today reads.
_IR_VERSION: Final = 8


def _try_onnxscript(onnxscript: Any) -> str:
    del onnxscript
    return "imported; torch.onnx.export needs it"


def _try_tensorboard(_: Any) -> str:
    from torch.utils import tensorboard

    with tempfile.TemporaryDirectory() as folder:
        writer = tensorboard.SummaryWriter(folder)
        writer.add_scalar("loss", 1.0, 1)
        writer.close()
    return "a curve was written"


def _try_cuda(_: None) -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise _Absent(f"no device; torch was built {f'with CUDA {built}' if built else 'without'}")
    ones = torch.ones(2, 2, device="cuda")
    if (ones @ ones).sum().item() != 8:
        raise RuntimeError("a product is wrong")
    return f"a product was computed on {torch.cuda.get_device_name()}"


def _try_browser(_: None) -> str:
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise _Absent("no Chromium; only tests of the report page need it")
    ran = subprocess.run(
        [found, "--version"], capture_output=True, text=True, timeout=_BROWSER_SECONDS, check=True
    )
    return f"{ran.stdout.strip()}; for tests of the report page"


_PARTS: Final = (
    _Part("requirements", None, _try_requirements, is_core=True),
    _Part("torch", "torch", _try_torch, is_core=True),
    _Part("torchvision", "torchvision", _try_torchvision, is_core=True),
    _Part("blockprune", "blockprune", _try_pruning, is_core=True),
    _Part("torch-pruning", "torch_pruning", _try_torch_pruning),
    _Part("peft", "peft", _try_peft),
    _Part("timm", "timm", _try_timm),
    _Part("transformers", "transformers", _try_transformers),
    _Part("distributed", "distributed", _try_distributed),
    _Part("codecarbon", "codecarbon", _try_codecarbon),
    _Part("adversarial-robustness-toolbox", "art.attacks.evasion", _try_attacks),
    _Part("onnxruntime", "onnxruntime", _try_onnxruntime),
    _Part("onnxscript", "onnxscript", _try_onnxscript),
    _Part("tensorboard", "tensorboard", _try_tensorboard),
    _Part("CUDA", None, _try_cuda),
    _Part("Chromium", None, _try_browser),
)


def _requirements(package: str) -> list[Requirement]:
    """Return what a package requires, its extras included; empty where it is not installed."""
    found = []
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    for text in texts:
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            # Of a package from before the form was fixed: it says nothing that can be checked.
            continue
    return found


def _extras(package: str) -> list[str]:
    """Return the extras of this package that bring another one, the developers' own last."""
    names = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
    bring = [
        name
        for name in names
        for requirement in _requirements(_PACKAGE)
        if package in (requirement.name, *requirement.extras)
        and requirement.marker is not None
        and requirement.marker.evaluate({"extra": name})
    ]
    return sorted(dict.fromkeys(bring), key=lambda name: name in ("test", "dev"))


def _check_version(package: str, requirement: Requirement) -> None:
    found = _version(requirement.name)
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        raise RuntimeError(
            f"{package} needs {requirement.name}{requirement.specifier}, found {found or 'none'}"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _without_folders(text: str) -> str:
    return _FOLDERS.sub(".../", text)
