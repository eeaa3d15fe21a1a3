"""What QK norm + rotary embedding costs: a kernel of the queries and one of the keys, or one of both."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.planner.costs import HARDWARE, CostModel, Region
from fuseplan.rules.families import find_sites
from tests.helpers import quickly_traced
from tests.planner.parts import NORM, Rotation
from tests.rotary import HEAD, K_HEADS, Q_HEADS, batched, flat, heads_first, heads_last

TOKENS, WIDTH = 64, 128
REGION = Region(
    core=NORM, tokens=TOKENS * 32, width=WIDTH, tail=Rotation(q_heads=32, k_heads=8, angles=2 * WIDTH),
)  # fmt: skip
ANGLES, WEIGHT, HEAD_BYTES = TOKENS * 2 * WIDTH * 2, WIDTH * 2, TOKENS * WIDTH * 2


@pytest.mark.parametrize("device", sorted(HARDWARE))
def test_one_kernel_in_place_of_two(device: str) -> None:
    hardware = HARDWARE[device]
    model = CostModel(hardware)
    q, k = model.unfused(REGION)
    launch = hardware.launch.value + hardware.generated_norm.value
    for kernel, heads in ((q, 32), (k, 8)):
        assert kernel.launch == pytest.approx(launch, abs=1)
        assert kernel.memory == pytest.approx(hardware.memory_ns(2 * heads * HEAD_BYTES + ANGLES + WEIGHT), abs=1)
    (fused,) = model.fused(REGION, "triton")
    assert fused.launch == pytest.approx(hardware.launch.value, abs=1)
    assert fused.memory == pytest.approx(hardware.memory_ns(80 * HEAD_BYTES + ANGLES + 2 * WEIGHT), abs=1)
    assert len(model.fused(REGION, "torch")) == 2 * NORM.eager_kernels + Rotation.eager_kernels
    # Where another fusion takes the norm of the queries, they are rotated alone.
    alone, keys = model.epilogue(REGION)
    assert alone.memory == pytest.approx(hardware.memory_ns(64 * HEAD_BYTES + ANGLES), abs=1)
    assert keys == k


class Counted(TorchDispatchMode):
    """How many ops that aren't views run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "norms", "writes"),
    [("rotary_embedding", 0, 0), ("qk_norm_rope", 2, 0), ("rope_cache", 0, 4), ("qk_norm_rope_cache", 2, 4)],
)
def test_a_reference_launches_no_more_kernels_than_it_is_priced_at(name: str, norms: int, writes: int) -> None:
    for sample in ops[name].samples:
        arguments = sample.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        with Counted() as counted:
            ops[name].kernel("torch")(*arguments)
        assert 0 < counted.count <= norms * NORM.eager_kernels + Rotation.eager_kernels + writes


@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_a_site_is_the_queries_norm_with_all_that_the_fusion_takes(layout: str) -> None:
    function, inputs, tokens = (heads_first(), batched(), 10) if layout == "heads first" else (heads_last(), flat(), 7)
    angles = 2 * HEAD if layout == "heads first" else HEAD
    canonical = canonicalize(quickly_traced(function, *inputs))
    q, k = find_sites(canonical)
    tail = Rotation(q_heads=Q_HEADS, k_heads=K_HEADS, angles=angles)
    shape = q.shape(tokens * Q_HEADS)
    assert shape.tails == (tail,)
    assert k.shape(tokens * K_HEADS).tails == ()
    assert shape.signature == f"rms_norm -> rotary {Q_HEADS}+{K_HEADS} heads {HEAD} bfloat16 llama"
    region = [node for node in canonical.graph.nodes if node.op == "call_function" and node.meta.get("val") is not None]
    inside = {q.core, k.core, *q.tails, *(node for node in region if "permute" in str(node.target))}
    taken = q.taken(inside)
    assert taken is not None
    assert taken.tail == tail
    assert k.taken(inside) is None
