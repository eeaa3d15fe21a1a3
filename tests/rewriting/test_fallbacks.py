"""Inductor knows fused ops before it lowers a graph, where it would write out all that they read when it meets them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import lowering
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import ops
from fuseplan.rewriting import fallbacks
from tests.helpers import randn


def layers(x: Tensor, residual: Tensor, weight: Tensor, norm_weight: Tensor) -> Tensor:
    """Of each the next one reads both results, of the norm and of the sum."""
    for _ in range(3):
        residual = residual + F.linear(x, weight)
        wide = residual.float()
        x = norm_weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return x


@pytest.mark.parametrize("is_slow", [True, False])
def test_inductor_is_told_first_where_it_would_take_long(is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    overload: Any = ops.skinny_linear_add_rms_norm.implementation("torch")
    met = []

    def make_fallback(target: Any, *args: Any, **kwargs: Any) -> Any:
        met.append(target)
        return lowering.make_fallback(target, *args, **kwargs)

    monkeypatch.setattr(fallbacks, "IS_SLOW", is_slow)
    monkeypatch.setattr(torch._inductor.graph, "make_fallback", make_fallback)
    for known in (lowering.lowerings, lowering._maybe_layout_constraints):
        known.pop(overload, None)
    torch._dynamo.reset()
    given = (randn(3, 1, 64), randn(3, 1, 64, seed=1), randn(64, 64, seed=2) / 8, randn(64, seed=3))
    flags: dict[str, Any] = dict.fromkeys(("fuse_skinny_linear", "fuse_add_rms_norm"), True)
    config = fuseplan.PassConfig(force=("skinny_linear_add_rms_norm",), **flags)
    caches = torch._inductor.config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False)
    with torch.no_grad(), caches[0], caches[1]:
        got = fuseplan.compile(layers, config=config, fullgraph=True)(*given)
    torch.testing.assert_close(got, layers(*given), rtol=2**-6, atol=2**-6)
    assert (overload in met) is not is_slow
    # Inductor's own choice, in either case.
    assert lowering.maybe_layout_constraints(overload) is lowering.constrain_to_fake_tensors
