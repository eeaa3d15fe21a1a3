"""fuseplan's Triton kernels on a GPU. Skipped where there is none."""

import pytest
import torch

from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules.rotary import ROTARY_RULES, QkNormRope
from fuseplan.testing import check_rule
from tests.rules.test_rules import arguments_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TRITON = [each for each in BUILT_IN_PROVIDERS if each.name == "triton"]


@pytest.mark.parametrize("rule", ROTARY_RULES, ids=["heads last", "heads first"])
def test_qk_norm_rope_holds(rule: QkNormRope) -> None:
    samples = arguments_of(rule, torch.device("cpu"))
    assert check_rule(rule, providers=TRITON, samples=samples, device="cuda").cases["triton"] >= len(samples) + 12
