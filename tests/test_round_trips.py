"""Tickets of published architectures on their way through the rest of the ecosystem.

The oracle is the dense model, taken the same way, with forward hooks that zero the branches.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.ops import MultiScaleRoIAlign

import blockprune
from tests.oracle import Hook, call, difference, disagreements, flatten, outcome

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra: pip install 'blockprune[onnx]' onnxruntime",
)
each_mode = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


# ---------------------------------------------------------------- the models


def _resnet() -> nn.Module:
    return resnet18(num_classes=5)


def _vit() -> nn.Module:
    return VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)


def _efficientnet() -> nn.Module:
    rows = [MBConvConfig(1, 3, 1, 16, 16, 2, 0.5, 1.0), MBConvConfig(4, 3, 2, 16, 32, 3, 0.5, 1.0)]
    return EfficientNet(rows, 0.2, 0.2, num_classes=5, last_channel=32)


def _detector() -> nn.Module:
    net = resnet18()
    backbone: Any = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
    backbone.out_channels = 128
    return FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        rpn_post_nms_top_n_test=5,
        box_score_thresh=0.0,
    )


def _images(batch: int = 2) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)),)


def _image_list(batch: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(batch)
    return ([torch.rand(3, 64, 64, generator=generator) for _ in range(batch)],)


# The model, its inputs, and for each branch that is removed the module whose output it is.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, str]]] = {
    "resnet": (_resnet, _images, {"layer1.1": "layer1.1.bn2", "layer3.1": "layer3.1.bn2"}),
    "vit": (
        _vit,
        _images,
        {
            "encoder.layers.encoder_layer_1.self_attention": (
                "encoder.layers.encoder_layer_1.dropout"
            ),
            "encoder.layers.encoder_layer_2.mlp": "encoder.layers.encoder_layer_2.mlp",
        },
    ),
    "efficientnet": (
        _efficientnet,
        _images,
        {
            "features.1.1": "features.1.1.stochastic_depth",
            "features.2.1": "features.2.1.stochastic_depth",
        },
    ),
    "detector": (_detector, _image_list, {"backbone.4.1": "backbone.4.1.bn2"}),
}
every = pytest.mark.parametrize("name", MODELS)
classifiers = pytest.mark.parametrize("name", ["resnet", "vit", "efficientnet"])


@functools.cache
def _dense(name: str) -> nn.Module:
    """Return the dense model; shared, so a test that changes it takes a copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[name][0]()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a zero bias, and a scale of one, would hide a mistake
                nn.init.uniform_(parameter, 0.1, 0.3)
            elif not parameter.any():  # a head of zeros would hide every one
                nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


@functools.cache
def _ticket(name: str) -> nn.Module:
    """Return the ticket, cut and verified; shared as well."""
    _, inputs, branches = MODELS[name]
    return blockprune.remove_blocks(_dense(name), list(branches), inputs())


def _off(name: str) -> list[Hook]:
    return [Hook(path) for path in MODELS[name][2].values()]


def _run(model: nn.Module, inputs: Any) -> list[Any]:
    with torch.no_grad():
        return flatten(call(model, inputs))[0]


def _assert_equal(found: list[Any], wanted: list[Any], ulps: float = 0.0) -> None:
    assert len(found) == len(wanted) > 0
    problems = [difference(a, b, ulps) for a, b in zip(found, wanted, strict=True)]
    assert problems == [None] * len(wanted)


def _assert_is_ticket(ticket: nn.Module, dense: nn.Module, name: str, inputs: Any) -> None:
    """Hold a ticket against a dense model with zeroed branches, in eval mode."""
    mine = outcome(ticket, inputs, train=False, backward=False)
    theirs = outcome(dense, inputs, train=False, backward=False, zeros=_off(name))
    assert disagreements(mine, theirs) == []


def _perturbed(name: str) -> nn.Module:
    """Return a ticket with weights of its own, as after training."""
    ticket = copy.deepcopy(_ticket(name))
    with torch.no_grad():
        for parameter in ticket.parameters():
            parameter.mul_(1.125)
    return ticket


# ---------------------------------------------------------------- as files and copies


@every
def test_the_ticket_is_the_dense_model_with_zeroed_branches(name: str) -> None:
    for batch in (2, 1, 3):
        _assert_is_ticket(_ticket(name), _dense(name), name, MODELS[name][1](batch))


@every
def test_safetensors(name: str, tmp_path: Path) -> None:
    build, inputs, branches = MODELS[name]
    ticket = _perturbed(name)
    blockprune.save_ticket(ticket, tmp_path / "ticket.safetensors")
    loaded = blockprune.load_ticket(build(), tmp_path / "ticket.safetensors").eval()
    assert blockprune.plan_of(loaded) == blockprune.plan_of(ticket)
    assert set(blockprune.plan_of(loaded).remove) == set(branches)
    _assert_equal(_run(loaded, inputs(3)), _run(ticket, inputs(3)))


@every
def test_deepcopy(name: str) -> None:
    inputs, ticket = MODELS[name][1], _ticket(name)
    before = _run(ticket, inputs())
    twin = copy.deepcopy(ticket)
    assert blockprune.plan_of(twin) == blockprune.plan_of(ticket)
    _assert_equal(_run(twin, inputs()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    _assert_equal(_run(ticket, inputs()), before)


# ---------------------------------------------------------------- compilers and exporters


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@classifiers
def test_compile(name: str, backend: str) -> None:
    inputs = MODELS[name][1]
    torch.compiler.reset()
    ticket = copy.deepcopy(_ticket(name))
    compiled = torch.compile(ticket, backend=backend, fullgraph=True)
    with torch.no_grad():
        _assert_equal([compiled(*inputs())], _run(ticket, inputs()), ulps=8)
    assert blockprune.plan_of(ticket) == blockprune.plan_of(_ticket(name))
    torch.compiler.reset()


def test_compiled_tickets_train_like_others() -> None:
    torch.compiler.reset()
    gradients = []
    for wrap in (lambda ticket: ticket, functools.partial(torch.compile, backend="aot_eager")):
        ticket = copy.deepcopy(_ticket("resnet")).train()
        wrap(ticket)(*_images(4)).square().sum().backward()
        gradients.append({name: p.grad for name, p in ticket.named_parameters()})
    plain, compiled = gradients
    largest = max(float(grad.abs().max()) for grad in plain.values())
    for key, grad in plain.items():
        assert torch.allclose(compiled[key], grad, rtol=0, atol=1e-5 * largest), key
    torch.compiler.reset()


@classifiers
def test_export_for_every_batch_size(name: str, tmp_path: Path) -> None:
    inputs, ticket = MODELS[name][1], copy.deepcopy(_ticket(name)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ticket, inputs(), dynamic_shapes=({0: batch},))
    # Nothing of what was removed is in the file.
    kept = {key for key, _ in ticket.named_parameters()}
    assert {key for key, _ in program.named_parameters()} == kept
    torch.export.save(program, tmp_path / "ticket.pt2")
    loaded = torch.export.load(tmp_path / "ticket.pt2").module()
    for size in (2, 5):
        _assert_equal([loaded(*inputs(size))], _run(ticket, inputs(size)), ulps=8)


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@classifiers
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    inputs, ticket = MODELS[name][1], copy.deepcopy(_ticket(name)).eval()
    path = tmp_path / "ticket.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(
        ticket, inputs(), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (2, 3):
        given = {session.get_inputs()[0].name: inputs(size)[0].numpy()}
        (found,) = session.run(None, given)
        (wanted,) = _run(ticket, inputs(size))
        # Other kernels sum in another order.
        assert torch.allclose(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- wrappers


@every
def test_data_parallel(name: str) -> None:
    inputs, ticket = MODELS[name][1], _ticket(name)
    wrapped = nn.DataParallel(ticket)
    _assert_equal(_run(wrapped, inputs()), _run(ticket, inputs()))
    names = [f"module.{block}" for block in MODELS[name][2]]
    again = blockprune.remove_blocks(nn.DataParallel(_dense(name)), names, inputs())
    keys = {f"module.{key}" for key in ticket.state_dict()}
    assert again.state_dict().keys() == wrapped.state_dict().keys() == keys
    _assert_equal(_run(again, inputs()), _run(ticket, inputs()))


@classifiers
def test_distributed_data_parallel(name: str, tmp_path: Path) -> None:
    inputs = MODELS[name][1]
    ticket = copy.deepcopy(_ticket(name)).eval()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        # Each parameter that is left takes part: none has to be looked for.
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(ticket))
        wrapped(*inputs()).square().sum().backward()
    finally:
        distributed.destroy_process_group()
    ticket(*inputs()).square().sum().backward()
    reduced = dict(wrapped.module.named_parameters())
    for key, parameter in ticket.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(reduced[key].grad, parameter.grad), key


# How a ticket, or a model, is wrapped where it is trained.
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": functools.partial(torch.compile, backend="eager"),
    "data_parallel": nn.DataParallel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_ticket_is_saved_as_the_ticket(wrapper: str, tmp_path: Path) -> None:
    ticket = copy.deepcopy(_ticket("resnet"))
    wrapped = WRAPPERS[wrapper](ticket)
    assert blockprune.plan_of(wrapped) == blockprune.plan_of(ticket)
    with torch.no_grad():
        next(wrapped.parameters()).add_(1.0)  # as training through the wrapper would
    blockprune.save_ticket(wrapped, tmp_path / "ticket.safetensors")
    loaded = blockprune.load_ticket(_dense("resnet"), tmp_path / "ticket.safetensors")
    assert loaded.state_dict().keys() == ticket.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], v) for key, v in ticket.state_dict().items())


@pytest.mark.parametrize(
    "around", [nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Sequential(nn.ReLU()), nn.Linear(2, 2)]
)
def test_a_module_around_no_ticket_has_no_plan(around: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(blockprune.TicketError, match=rf"this {type(around).__name__} is not"):
        blockprune.plan_of(around)
    with pytest.raises(blockprune.TicketError, match="not a ticket"):
        blockprune.save_ticket(around, tmp_path / "ticket.safetensors")
    both = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(_ticket("resnet")))
    with pytest.raises(blockprune.TicketError, match="this Sequential is not a ticket"):
        blockprune.plan_of(both)


# The proof listens to every module, and torch says that its compiled ones may not notice.
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_blocks_beside_a_compiled_part_are_found() -> None:
    inputs, model = MODELS["resnet"][1](), copy.deepcopy(_dense("resnet"))
    model.layer1 = torch.compile(model.layer1, backend="eager")
    analysis = blockprune.find_blocks(model, inputs)
    assert analysis.names == ("layer2.1", "layer3.1", "layer4.1")
    assert [r.detail for r in analysis.rejections if r.name == "layer1"] == [
        "it was compiled, so nothing inside can be seen: cut before you compile"
    ]
    ticket = blockprune.remove_blocks(model, "layer3.1", inputs)
    assert blockprune.plan_of(ticket).remove == ("layer3.1",)


def test_blocks_are_not_cut_out_of_what_was_compiled() -> None:
    inputs = MODELS["resnet"][1]()
    model = torch.compile(copy.deepcopy(_dense("resnet")), backend="eager")
    inside = blockprune.find_blocks(model, inputs).names[0]
    assert "_orig_mod" in inside
    with pytest.raises(blockprune.TraceError, match=r"what torch\.compile returned"):
        blockprune.remove_blocks(model, inside, inputs)
    again = torch.compile(copy.deepcopy(_ticket("resnet")), backend="eager")
    left = blockprune.find_blocks(again, inputs).names
    with pytest.raises(blockprune.TraceError, match=r"the model is what torch\.compile"):
        blockprune.remove_blocks(again, left[:1], inputs)


# ---------------------------------------------------------------- other numbers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@classifiers
def test_dynamic_quantisation(name: str) -> None:
    quantise = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this torch has no torch.ao.quantization; torchao is its successor")
    inputs, kinds = MODELS[name][1], {nn.Linear}
    dense = quantise(copy.deepcopy(_dense(name)), kinds)
    ticket = quantise(copy.deepcopy(_ticket(name)), kinds)
    assert sum("quantized" in type(m).__module__ for m in ticket.modules()) > 0
    with torch.no_grad():
        handles = [
            dense.get_submodule(hook.path).register_forward_hook(lambda *args: args[-1] * 0)
            for hook in _off(name)
        ]
        wanted = dense(*inputs())
        for handle in handles:
            handle.remove()
        assert not torch.equal(wanted, _dense(name)(*inputs()))
        _assert_equal([ticket(*inputs())], [wanted], ulps=8)


def _converted(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@every
def test_other_precision(name: str, dtype: torch.dtype) -> None:
    if name == "detector" and dtype == torch.bfloat16:
        pytest.skip("torchvision has no non-maximum suppression in bfloat16 on the CPU")
    inputs = _converted(MODELS[name][1](), dtype)
    dense = copy.deepcopy(_dense(name)).to(dtype)
    after = copy.deepcopy(_ticket(name)).to(dtype)
    before = blockprune.remove_blocks(dense, list(MODELS[name][2]), inputs)
    _assert_is_ticket(after, dense, name, inputs)
    _assert_equal(_run(before, inputs), _run(after, inputs))
    assert {p.dtype for p in before.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_channels_last(name: str) -> None:
    layout = torch.channels_last
    inputs = (_images()[0].contiguous(memory_format=layout),)
    dense = copy.deepcopy(_dense(name)).to(memory_format=layout)
    before = blockprune.remove_blocks(dense, list(MODELS[name][2]), inputs)
    after = copy.deepcopy(_ticket(name)).to(memory_format=layout)
    for ticket in (before, after):
        _assert_is_ticket(ticket, dense, name, inputs)
        maps = [p for p in ticket.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=layout) for p in maps)


@classifiers
def test_meta_device(name: str) -> None:
    """A ticket is cut without any weights, and gets them afterwards."""
    build, inputs, branches = MODELS[name]
    with torch.device("meta"):
        dense = build().eval()
    (images,) = inputs()
    ticket = blockprune.remove_blocks(dense, list(branches), images.to("meta"), verify=False)
    assert all(parameter.is_meta for parameter in ticket.parameters())
    wanted = _ticket(name).state_dict()
    assert {k: v.shape for k, v in ticket.state_dict().items()} == {
        k: v.shape for k, v in wanted.items()
    }
    ticket.to_empty(device="cpu").load_state_dict(wanted)
    _assert_equal(_run(ticket, inputs()), _run(_ticket(name), inputs()))


def test_without_values_there_is_nothing_to_verify() -> None:
    with torch.device("meta"):
        dense, images = _resnet(), torch.empty(2, 3, 32, 32)
    with pytest.raises(blockprune.VerificationError, match=r"meta device.* verify=False"):
        blockprune.remove_blocks(dense, ["layer1.1"], images)


# ---------------------------------------------------------------- parameters


@every
def test_half_of_the_parameters_frozen(name: str) -> None:
    dense = copy.deepcopy(_dense(name))
    for parameter in list(dense.parameters())[::2]:
        parameter.requires_grad_(False)
    frozen = {key: not p.requires_grad for key, p in dense.named_parameters()}
    ticket = blockprune.remove_blocks(dense, list(MODELS[name][2]), MODELS[name][1]())
    kept = dict(ticket.named_parameters())
    assert {key: not p.requires_grad for key, p in kept.items()} == {k: frozen[k] for k in kept}
    if name == "detector":
        return  # in eval mode, boxes carry no gradients that two kernels agree on
    inputs = MODELS[name][1]()
    mine = outcome(ticket, inputs, train=False)
    theirs = outcome(dense, inputs, train=False, zeros=_off(name))
    assert disagreements(mine, theirs, ulps=32) == []
    assert mine.gradients is not None
    assert {k for k, grad in mine.gradients.items() if grad is None} == {
        k for k in kept if frozen[k]
    }


@each_mode
@classifiers
def test_parametrised_weights(name: str, train: bool, tmp_path: Path) -> None:
    _, inputs, branches = MODELS[name]
    dense = copy.deepcopy(_dense(name))
    for module in list(dense.modules()):
        if type(module) in (nn.Conv2d, nn.Linear):
            parametrizations.weight_norm(module)
    ticket = blockprune.remove_blocks(dense, list(branches), inputs(4))
    mine = outcome(ticket, inputs(4), train=train, backward=False, salt=1)
    theirs = outcome(dense, inputs(4), train=train, backward=False, salt=1, zeros=_off(name))
    if not (train and name == "efficientnet"):  # a hook there also hides the draw of its branch
        assert disagreements(mine, theirs) == []
    assert any(".parametrizations." in key for key in ticket.state_dict())
    blockprune.save_ticket(ticket, tmp_path / "ticket.safetensors")
    loaded = blockprune.load_ticket(dense, tmp_path / "ticket.safetensors", verify=False)
    _assert_equal(_run(loaded.eval(), inputs()), _run(ticket.eval(), inputs()))
    wanted = _run(loaded, inputs())
    for module in list(ticket.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert not any(".parametrizations." in key for key in ticket.state_dict())
    _assert_equal(_run(ticket, inputs()), wanted)


def test_gradients_that_are_not_numbers_do_not_hide_the_others() -> None:
    """The gradient of a normalised weight of zeros is 0 / 0, in the dense model as well."""
    dense = copy.deepcopy(_dense("resnet"))
    nn.init.zeros_(dense.fc.weight)
    parametrizations.weight_norm(dense.fc)
    ticket = blockprune.remove_blocks(dense, ["layer1.1"], _images())
    dense(*_images()).sum().backward()
    ticket(*_images()).sum().backward()
    for model in (dense, ticket):
        assert model.fc.parametrizations.weight.original1.grad.isnan().any()
