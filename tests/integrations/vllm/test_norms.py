"""Norms of vLLM round where `fuseplan.graph.canonical.engines` says, in its build for CPUs at least."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")
import vllm._custom_ops  # noqa: F401  (registers them)

from fuseplan.dialect import ops
from tests.helpers import randn

X, R = randn(64, 320).bfloat16(), (3 * randn(64, 320, seed=1)).bfloat16()
W = torch.linspace(0.5, 1.5, 320).bfloat16()


def differing(left: Tensor, right: Tensor) -> float:
    """The share of elements of other bits."""
    return (left != right).float().mean().item()


def test_a_norm_is_rounded_once() -> None:
    y = torch.empty_like(X)
    torch.ops._C.rms_norm(y, X, W, 1e-5)
    assert differing(y, ops.rms_norm.reference(X, W, 1e-5, "gpt_oss")) < 0.001
    assert differing(y, ops.rms_norm.reference(X, W, 1e-5, "llama")) > 0.1


def test_a_sum_is_rounded_before_it_is_normalised() -> None:
    y, total = X.clone(), R.clone()
    torch.ops._C.fused_add_rms_norm(y, total, W, 1e-5)
    expected, residual = ops.fused_add_rms_norm.reference(X, R, W, 1e-5, "gpt_oss")
    assert torch.equal(total, residual)
    assert differing(y, expected) < 0.05  # this build takes the variance of the unrounded sum
    for other in ("llama", "vllm", "fp32"):
        assert differing(y, ops.fused_add_rms_norm.reference(X, R, W, 1e-5, other)[0]) > 0.1
