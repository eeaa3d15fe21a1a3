"""A model with compile ranges is to its user what `torch.compile` makes of it."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fuseplan

pytestmark = pytest.mark.usefixtures("by_code_at_night")

WIDTH = 32
RANGES = (fuseplan.CompileRange(start=1, end=4), fuseplan.CompileRange(start=5, end=16))
REPORTS: list[fuseplan.Report] = []


class Block(nn.Module):
    """A padded RMSNorm whose result depends on a weight, a buffer and an attribute."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.norm(x), (0, 16)) * self.scale + self.shift

    def method(self) -> str:
        return "of the block"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    REPORTS.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def ranged(model: Any, **arguments: Any) -> Any:
    config = fuseplan.PassConfig(policy="ordered(act_padding)", compile_ranges=RANGES)
    return fuseplan.compile(model, config=config, on_report=REPORTS.append, **arguments)


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": saved,
}  # fmt: skip


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_computes_with_its_own_weights(make: Callable[[Any], Any], used: bool) -> None:
    model, x = ranged(Block()), torch.randn(3, WIDTH)
    before = model(x) if used else None
    clone = make(model)
    assert type(clone).__name__ == type(torch.compile(Block())).__name__ == "OptimizedModule"
    clone.norm.weight.zero_()
    clone.shift += 2.0
    for rows in (3, 6):
        assert clone(torch.randn(rows, WIDTH)).eq(2.0).all()
    torch.testing.assert_close(model(x), model._orig_mod(x))
    assert before is None or torch.equal(before, model(x))
    assert [each.fused["act_padding"] for each in REPORTS] == [1] * len(REPORTS)


def test_copies_share_what_was_compiled_and_report_to_the_same_callback() -> None:
    model = ranged(Block())
    model(torch.randn(3, WIDTH))
    assert copy.copy(model)._orig_mod is model._orig_mod
    clone = copy.deepcopy(model)
    clone(torch.randn(3, WIDTH))
    assert [each.graphs[0].range for each in REPORTS] == [(1, 4)]
    clone(torch.randn(6, WIDTH))
    assert [each.graphs[0].range for each in REPORTS] == [(1, 4), (5, 16)]


def seen(model: Any, x: Tensor) -> dict[str, Any]:
    """What a user sees who does to a compiled block what can be done to a module."""
    block, found = model._orig_mod, dict[str, Any]()
    found["types"] = [isinstance(model, each) for each in (nn.Module, Block)], type(model).__name__
    found["state"] = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    found["modules"] = [name for name, _ in model.named_modules()], [name for name, _ in model.named_buffers()]
    found["loaded"] = str(model.load_state_dict(model.state_dict()))
    model.fresh = 3
    found["set"] = block.fresh, "fresh" in vars(model)
    del model.fresh
    found["deleted"] = hasattr(block, "fresh"), hasattr(model, "fresh")
    found["modes"] = [(each().training, block.norm.training, block.training) for each in (model.eval, model.train)]
    block.eval()
    found["mode of the original"] = model.training
    found["methods"] = model.method(), "method" in dir(model), repr(model)
    model.norm = nn.RMSNorm(WIDTH, eps=1e-6)
    found["submodule"] = block.norm is model.norm
    found["moved"] = model.double().norm.weight.dtype, model.float()(x).dtype
    calls: list[str] = []
    handles = [
        model.register_forward_hook(lambda module, args, result: calls.append(type(module).__name__)),
        model.register_forward_pre_hook(lambda module, args: calls.append(f"before {type(module).__name__}")),
    ]
    model(x)
    model.forward(x)
    found["hooks of the compiled module"] = calls
    handles[0].remove(), handles[1].remove()
    for name, module in {"block": block, "norm": block.norm}.items():
        handle = module.register_forward_hook(lambda module, args, result: result * 0)
        found[f"hook of {name}"] = float(model(x).abs().max())
        handle.remove()
        handle = module.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        found[f"pre-hook of {name}"] = float(model(x).abs().max())
        handle.remove()
    found["without hooks"] = bool(model(x).any())
    model.scale = 0.0
    found["attribute"] = float(model(x).abs().max()), block.scale
    with pytest.raises(TypeError) as raised:
        len(model)
    found["length"] = str(raised.value)
    found["marks"] = model._torchdynamo_orig_callable == block.forward, model._torchdynamo_wrapper_id == id(model)
    found["wrapped"] = list(nn.Sequential(model).state_dict())
    outer = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    found["inlined"] = float(outer(x).max())
    return found


def test_all_that_can_be_done_to_a_module_does_what_it_does_under_torch_compile() -> None:
    x = torch.randn(3, WIDTH)
    assert seen(ranged(Block()), x) == seen(torch.compile(Block(), backend="eager"), x)


def test_containers_keep_their_length_and_items() -> None:
    model = ranged(nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), nn.ConstantPad1d((0, 16), 0.0)))
    assert (len(model), type(model.get_submodule("_orig_mod.0"))) == (2, nn.RMSNorm)
    assert model(torch.randn(3, WIDTH)).shape == (3, WIDTH + 16)


def test_functions_and_bound_methods_keep_their_names_and_can_be_compiled_again() -> None:
    block, x = Block(), torch.randn(3, WIDTH)

    def function(x: Tensor) -> Any:
        return block(x)

    for given in (function, block.forward):
        compiled = ranged(given)
        assert (compiled.__name__, compiled.__wrapped__) == (given.__name__, given)
        torch.testing.assert_close(compiled(x), block(x))
        again: Any = torch.compile(compiled, backend="eager", fullgraph=True)
        assert again._torchdynamo_orig_callable == given
        assert torch.equal(again(x), block(x))


def test_what_is_switched_off_is_the_model_itself() -> None:
    block = Block()
    with pytest.warns(fuseplan.FuseplanWarning, match="switched off"):
        assert ranged(block, disable=True) is block
