"""Kernels that write to their arguments: what is cached is held against the reference, and all else stays."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.providers import Provider, provider_of
from fuseplan.record import GraphReport, Reason, Report
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from tests.cached import arguments, layer
from tests.helpers import post_grad

RULE = CACHED_ROTARY_RULES[0]
_numbers = itertools.count()


def provider(kernel: Callable[..., Any]) -> Provider:
    name = f"{kernel.__name__}_{next(_numbers)}"
    return provider_of(name, {ops.rope_cache: kernel}, cost=0.0, uuid=kernel.__name__)


def right(*given: Any) -> Tensor:
    q_out, keys, values = ops.rope_cache.reference(*given)
    given[3].copy_(keys)
    given[4].copy_(values)
    return q_out  # type: ignore[no-any-return]


def at_the_start(*given: Any) -> Tensor:
    """It reads no positions."""
    return right(*given[:7], torch.arange(given[2].shape[2]), given[8])


def keys_alone(*given: Any) -> Tensor:
    return right(*given[:4], given[4].clone(), *given[5:])


def unrotated(*given: Any) -> Tensor:
    q_out = right(*given)
    given[3][:, :, given[7]] = given[1]
    return q_out


def a_neighbour_too(*given: Any) -> Tensor:
    q_out = right(*given)
    given[4][:, :, given[7] - 1] = given[2]
    return q_out


FAULTS: dict[Callable[..., Any], str] = {
    at_the_start: r"result 1: element .* is .* where .* is exact",
    keys_alone: r"result 2: element .* is .* where .* is exact",
    unrotated: r"result 1: element .* is .* where .* is exact",
    a_neighbour_too: r"result 2: element .* is .* where .* is exact",
}


def fuse(kernel: Callable[..., Any]) -> GraphReport:
    reports: list[Report] = []
    manager = PostGradPassManager(
        PassConfig(verify="always"), rules=[RULE], providers=[provider(kernel)], on_report=reports.append
    )
    manager(post_grad(layer(), *arguments()))
    (report,) = reports[0].graphs
    return report


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: str(kernel.__name__))
def test_a_wrong_kernel_is_not_applied_and_says_why(kernel: Callable[..., Any]) -> None:
    report = fuse(kernel)
    assert not report.applied
    (warning,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    assert re.search(FAULTS[kernel], warning.detail), warning.detail


def test_a_right_kernel_is_applied() -> None:
    report = fuse(right)
    assert [each.rule for each in report.applied] == ["rope_cache"]
    assert all(each.passed for each in report.verified)
