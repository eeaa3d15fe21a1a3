"""The graph that a compiler's post-grad passes see: full width, symbolic tokens, one process, no memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.workloads.models import Workload, workload
from tests.workloads.models.conftest import FakeGroup

ALL_REDUCE = "_c10d_functional.all_reduce.default"
WAIT = "_c10d_functional.wait_tensor.default"
PAD = "aten.constant_pad_nd.default"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trace(work: Workload, group: Any = None, tokens: int = 16) -> fx.Graph:
    """The functional graph at the custom post-grad hook, with a symbolic sequence length."""
    graphs: list[fx.Graph] = []

    def compile_nothing(gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        compile_fx._recursive_post_grad_passes(gm, is_inference=True)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=compile_nothing)

    def hook(graph: fx.Graph) -> None:
        graphs.append(fx.Graph())
        graphs[-1].output(graphs[-1].graph_copy(graph, {}))

    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        model = work.build(group)
        (input_ids,) = work.example_inputs(tokens)
        torch._dynamo.mark_dynamic(input_ids, 1)  # an error if anything pins it
        with inductor_config.patch(post_grad_custom_post_pass=hook):
            logits: Tensor = torch.compile(model, backend=backend, fullgraph=True)(input_ids)
    assert logits.shape == (1, tokens, work.config.vocab)
    (graph,) = graphs
    return graph


def count(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def only_user(node: fx.Node) -> fx.Node:
    (user,) = node.users
    return user


@pytest.mark.parametrize("tp", [1, 8, *(pytest.param(tp, marks=pytest.mark.nightly) for tp in (2, 4))])
def test_gpt_oss_120b_traces_whole_at_full_width(fake_group: FakeGroup, tp: int) -> None:
    layers = 2
    found = count(trace(workload("gpt-oss-120b").with_layers(layers), fake_group(tp)))
    parallel = tp > 1
    assert found[ALL_REDUCE] == (layers + 1) * parallel  # behind o_proj, and behind the embedding
    assert found[WAIT] == (layers + 2) * parallel  # and behind the gathered logits
    assert found[PAD] == found["gpt_oss.experts.default"] == found["gpt_oss.attention.default"] == layers
    assert found["aten.rsqrt.default"] == 2 * layers + 1


def test_outer_reduce_shows_every_all_reduce(fake_group: FakeGroup) -> None:
    layers = 2
    found = count(trace(workload("gpt-oss-120b-tiny:outer-reduce").with_layers(layers), fake_group(2)))
    assert found[ALL_REDUCE] == 2 * layers + 1


@pytest.mark.parametrize("name", ["gpt-oss-20b-tiny", "gpt-oss-20b-tiny:outer-reduce"])
def test_all_reduce_reaches_its_norm_undisturbed(fake_group: FakeGroup, name: str) -> None:
    """all_reduce -> wait -> float -> (+ residual) -> norm, with no copy or view between."""
    graph = trace(workload(name).with_layers(2), fake_group(2, rank=1))
    first, *others = graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)
    for reduce in (first, *others):
        wait = only_user(reduce)
        assert str(wait.target) == WAIT
        widened = {str(user.target) for user in wait.users}
        assert "prims.convert_element_type.default" in widened
        # The first reduced sum is the residual itself, read again by the next norm; the others are only added.
        assert len(wait.users) == (2 if reduce is first else 1)
        (wide, *_) = wait.users
        behind = {str(user.target) for user in wide.users}
        assert behind == ({"aten.pow.Tensor_Scalar", "aten.mul.Tensor"} if reduce is first else {"aten.add.Tensor"})


def test_the_pad_shares_its_norm_with_the_router(fake_group: FakeGroup) -> None:
    graph = trace(workload("gpt-oss-20b-tiny").with_layers(2), fake_group(2))
    pads = graph.find_nodes(op="call_function", target=torch.ops.aten.constant_pad_nd.default)
    assert len(pads) == 2
    for pad in pads:
        norm = pad.all_input_nodes[0]
        assert str(only_user(pad).target) == "gpt_oss.experts.default"
        assert {str(user.target) for user in norm.users} == {PAD, "aten.addmm.default"}
        assert pad.args[1] == [0, 512 - 320]


def test_ranks_have_equal_graphs(fake_group: FakeGroup) -> None:
    """They differ in the rank, a constant, that the embedding compares with."""
    lines = [
        str(trace(workload("gpt-oss-20b-tiny").with_layers(1), fake_group(2, rank))).splitlines() for rank in (0, 1)
    ]
    assert len(lines[0]) == len(lines[1])
    differing = [(a, b) for a, b in zip(*lines, strict=True) if a != b]
    assert all("aten.ne.Scalar" in line for pair in differing for line in pair)
    assert len(differing) == 1
