"""What compiled code calls in place of an op that can be called directly, and by which keys."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import lowering
from torch._inductor.utils import run_and_get_code

import fuseplan
from fuseplan.dialect import ops
from tests.helpers import randn

OP: Any = ops.fused_add_rms_norm_pad.implementation("torch")
EPS = 1e-6


def normed(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def layers(x: Tensor, residual: Tensor, weight: Tensor, product: Tensor) -> Tensor:
    for _ in range(3):
        residual = residual + x
        x = torch.relu(torch.nn.functional.pad(normed(residual, weight), (0, 8)) @ product)
    return x


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the op is called with directly."""
    seen: list[tuple[Any, ...]] = []

    def direct(*given: Any) -> Any:
        seen.append(given)
        return OP(*given[1:])

    monkeypatch.setattr(OP, "direct", direct, raising=False)
    for known in (lowering.lowerings, lowering._maybe_layout_constraints):
        known.pop(OP, None)
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield seen
    lowering.lowerings.pop(OP, None)


def given(rows: int) -> tuple[Tensor, ...]:
    return randn(rows, 64), randn(rows, 64, seed=1), randn(64, seed=2), randn(72, 64, seed=3) / 8


def check(compiled: Any, arguments: tuple[Tensor, ...]) -> list[str]:
    result, code = run_and_get_code(compiled, *arguments)
    torch.testing.assert_close(result, layers(*arguments), rtol=2**-6, atol=2**-6)
    return code


def test_layers_that_are_alike_share_a_key(calls: list[tuple[Any, ...]]) -> None:
    compiled = fuseplan.compile(layers, config=fuseplan.PassConfig(force=("act_padding",)), dynamic=False)
    (code,) = check(compiled, given(3))
    assert len(re.findall(r"torch\.ops\.fuseplan\.fused_add_rms_norm_pad\.default\.direct\(", code)) == 3
    keys = [key for key, *_ in calls]
    assert len(calls) == 3
    assert len(set(keys[1:])) == 1
    (digest,) = keys[1]
    assert re.fullmatch("[0-9a-f]{16}", digest)


def test_a_key_has_the_values_of_symbols(calls: list[tuple[Any, ...]]) -> None:
    compiled = fuseplan.compile(layers, config=fuseplan.PassConfig(force=("act_padding",)))
    for rows in (3, 5):
        arguments = given(rows)
        for each in arguments[:2]:
            torch._dynamo.mark_dynamic(each, 0)
        check(compiled, arguments)
    assert {key[1] for key, *_ in calls} == {3, 5}
    assert len({key[0] for key, *_ in calls[1::3]}) == 1


def of_one(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    padded, total = OP(x, residual, weight, eps, "gpt_oss", 8)
    result: Tensor = padded.sum() + total.sum()
    return result


def test_other_numbers_strides_and_dtypes_have_other_keys(calls: list[tuple[Any, ...]]) -> None:
    from fuseplan.rewriting.direct import lower

    lowering.make_fallback(OP, warn=False)
    lowering.lowerings[OP] = lower(OP)
    x, residual, weight, _ = given(3)
    turned = x.t().contiguous().t()
    for arguments in (
        (x, residual, weight, EPS),
        (x, residual, weight, 1e-5),
        (turned, residual, weight, EPS),
        (x.float(), residual.float(), weight.float(), EPS),
        (x[:2], residual[:2], weight, EPS),
        (x, residual, weight, EPS),
    ):
        torch._dynamo.reset()
        got = torch.compile(of_one, dynamic=False)(*arguments)
        torch.testing.assert_close(got, of_one(*arguments), rtol=2**-6, atol=2**-6)
    keys = [key for key, *_ in calls]
    assert keys[-1] == keys[0]
    assert len(set(keys)) == 5
    assert calls[2][1].stride() == turned.stride()
