"""fuseplan's Triton kernels on GPUs. Skipped where there are none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fuseplan.dialect import ops
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.attention import ATTENTION_RULES
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from fuseplan.rules.families.linear import LINEAR_RULES
from fuseplan.rules.families.linear_norm import LINEAR_NORM_RULES
from fuseplan.rules.families.rotary import ROTARY_RULES, QkNormRope
from fuseplan.rules.families.scaled_linear import SCALED_LINEAR_RULES
from fuseplan.testing import check_rule
from tests.rules.test_rules import arguments_of

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
FP8 = bool(GPUS) and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a GPU")]

TRITON = [each for each in BUILT_IN_PROVIDERS if each.name == "triton"]
APART = {*ROTARY_RULES, *CACHED_ROTARY_RULES, *ATTENTION_RULES, *CACHED_ATTENTION_RULES}
OTHERS = [rule for rule in BUILT_IN_RULES if rule not in APART and rule.op.name in TRITON[0].implements]


@pytest.fixture
def group(ranks: int) -> Iterator[None]:
    """Of so many ranks, one of which is here."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", ROTARY_RULES, ids=["heads last", "heads first"])
def test_qk_norm_rope_holds(rule: QkNormRope) -> None:
    samples = arguments_of(rule, torch.device("cpu"))
    assert check_rule(rule, providers=TRITON, samples=samples, device="cuda").cases["triton"] >= len(samples) + 12


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("rule", "ranks"),
    [(rule, ranks) for rule in OTHERS for ranks in ((2, 4) if rule.op.collective else (2,))],
    ids=lambda each: each.op.name if isinstance(each, Rule) else f"{each} ranks",
)
def test_fused_ops_hold(rule: Rule) -> None:
    # Kernels of linear layers take neither float32 nor weights that are transposed, those of fp8 nothing else.
    further = 10 if rule in (*LINEAR_RULES, *LINEAR_NORM_RULES) else 8 if rule in SCALED_LINEAR_RULES else 12
    assert check_rule(rule, providers=TRITON, device="cuda").cases["triton"] >= len(rule.op.samples) + further


@pytest.mark.skipif(not FP8, reason="needs tensor cores that take fp8 from shared memory")
@pytest.mark.parametrize("rows", [1, 8, 17, 32])
@pytest.mark.parametrize("use_fast_accum", [True, False])
@pytest.mark.parametrize(
    ("width", "features"),
    [
        (4096, (4096,)),
        (14336, (4096,)),
        (4096, (4096, 1024, 1024)),
        (4096, (14336, 14336)),
        (208, (48, 80)),
        (2880, (33,)),
    ],
)
def test_layers_in_fp8_are_as_near_as_torchs_and_the_same_every_time(
    rows: int, use_fast_accum: bool, width: int, features: tuple[int, ...]
) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)

    def quantised(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randn(shape, device="cuda", generator=generator)
        scale = values.abs().amax(-1, keepdim=True) / 448
        return (values / scale).to(torch.float8_e4m3fn), scale

    (x, scale), weights = quantised(rows, width), [quantised(each, width) for each in features]
    op = (ops.skinny_scaled_linear, ops.merged_scaled_linear_pair, ops.merged_scaled_linear_triple)[len(features) - 1]
    biases = [torch.randn(each, device="cuda", generator=generator).bfloat16() for each in features]
    arguments = x, scale, *(w for w, _ in weights), *(own.t() for _, own in weights), *biases, use_fast_accum
    runs = [op.implementation("triton")(*arguments) for _ in range(3)]
    first, *others = [found if isinstance(found, tuple) else (found,) for found in runs]
    for index, ((codes, own), bias) in enumerate(zip(weights, biases, strict=True)):
        assert all(torch.equal(first[index], other[index]) for other in others)
        exact = (x.double() * scale) @ (codes.double() * own).t() + bias
        most = exact.abs().amax(-1, keepdim=True)
        assert ((first[index].double() - exact).abs() <= most * 2**-7).all()
        if features[index] % 16 == 0:
            # torch 2.11's cuBLAS takes no bias with fast accumulation at this width, so torch adds it apart.
            torchs = torch._scaled_mm(
                x, codes.t(), scale, own.t(), None if (is_apart := use_fast_accum and width == 14336) else bias,
                out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum,
            )  # fmt: skip
            torchs = torchs + bias if is_apart else torchs
            off = [((each.double() - exact).norm() / exact.norm()).item() for each in (first[index], torchs)]
            assert off[0] <= 1.1 * off[1] + 1e-4


@pytest.mark.parametrize("rows", [1, 8, 17, 32])
@pytest.mark.parametrize(("width", "features"), [(4096, 4096), (14336, 4096), (2880, 2880), (8192, 1024), (1000, 512)])
def test_programs_that_share_a_width_yield_the_same_every_time(rows: int, width: int, features: int) -> None:
    """And what torch's product and norm yield, but for the order of sums."""
    generator = torch.Generator("cuda").manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    x, weight = drawn(rows, width).bfloat16(), (drawn(features, width) * width**-0.5).bfloat16()
    residual, norm_weight = drawn(rows, features).bfloat16(), (1 + drawn(features) / 8).bfloat16()
    op = ops.skinny_linear_add_rms_norm
    arguments = (x, weight, None, residual, norm_weight, 1e-5, "llama")
    first = op.implementation("triton")(*arguments)
    for _ in range(20):
        again = op.implementation("triton")(*arguments)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for own, wanted in zip(first, op.reference(*arguments), strict=True):
        torch.testing.assert_close(own, wanted, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_reduces_between_peers(ranks: int) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "tests/gpu/run_all_reduce.py"], check=False, capture_output=True, text=True, cwd=ROOT,
        env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14
    assert not any(found.values()), found
