"""Graphs that vLLM 0.22 gave its post-grad pass on two GPUs, of gpt-oss-120b: pieces between attentions, as printed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.providers import PROFILES
from tests.graph.canonical.engine_ops import defined
from tests.graph.canonical.test_vllm import SCHEMAS, two_ranks, vllm_ops

__all__ = ["two_ranks", "vllm_ops"]

GRAPHS = Path(__file__).with_name("graphs")
TOKENS = 8
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32, "i64": torch.int64}
MOE = (
    "(Tensor(a!) hidden_states, Tensor router_logits, Tensor? shared_experts_input, Tensor? input_ids, str layer_name, "
    "int hidden_dim_unpadded) -> Tensor"
)


@pytest.fixture(scope="module", autouse=True)
def experts() -> Iterator[None]:
    with defined({"vllm::moe_forward": MOE}, {"vllm::moe_forward": lambda states, *others: torch.empty_like(states)}):
        yield


def piece(name: str) -> fx.Graph:
    """A graph, with fake values for a few tokens. A placeholder without a type is the name of a layer."""
    text = (GRAPHS / f"vllm-0.22-gpt-oss-120b-tp2-{name}-piece.txt").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(re.sub(r"device\(type='cuda', index=\d\)", "device(type='cpu')", text), scope)
    gm = fx.symbolic_trace(scope["GraphModule"]())
    (signature,) = re.findall(r"def forward\(self, (.*)\):", text)
    # What takes no argument of the graph's is a constant by now.
    mode, values = FakeTensorMode(allow_non_fake_inputs=True), list[Any]()
    for given in re.findall(r'arg\d+_1(?:: "([^"]*)")?', signature):
        tensor = re.fullmatch(r"(\w+)\[(.*)\]", given)
        if tensor is None:
            values.append(TOKENS if given.startswith("Sym") else "model.layers.0.mlp.experts")
            continue
        shape = [TOKENS if size == "s72" else int(size) for size in tensor[2].split(", ")]
        with mode:
            values.append(torch.empty(shape, dtype=DTYPES[tensor[1]]))
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*values)
    return gm.graph


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("first", {"all_reduce[2880]": 1, "rms_norm[2880]": 1}),
        ("layer", {"all_reduce[2880]": 2, "fused_add_rms_norm[2880]": 2}),
    ],
)
def test_every_norm_is_recognised_and_every_all_reduce_goes_into_one(
    name: str, norms: dict[str, int], two_ranks: str
) -> None:
    manager = PostGradPassManager(
        PassConfig(policy="ordered(allreduce_rms)"), device=PROFILES["h200"], engine_groups=lambda: {"tp:0": two_ranks}
    )
    analysis = manager.analyze(piece(name))
    found = {op: n for op, n in analysis.canonical.recognized().items() if "norm" in op or "all_reduce" in op}
    assert found == norms
    decision = manager.decide(analysis, manager.config.chosen_policy, "graph_0")
    counts = manager.report("graph_0", analysis, decision).count(manager.rules)
    assert counts["allreduce_rms"] == norms["all_reduce[2880]"]


def test_the_schemas_are_those_of_the_graphs() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in GRAPHS.iterdir())
    called = set(re.findall(r"torch\.ops\.(vllm|vllm_ir|_C)\.(\w+)\.default", text))
    assert {f"{space}::{op}" for space, op in called} - {"vllm::moe_forward"} <= set(SCHEMAS)
