"""What a fusion yields lies in memory as the graph promised, wherever somebody can tell: a copy, or no fusion."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch.nn import functional as F

from fuseplan.dialect import define, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.explanation.capture import capture
from fuseplan.graph.surgery import copy_graph
from fuseplan.matching import ExternalMatch, Match, Matches, find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS, provider_of
from fuseplan.record import Nearness, Reason
from fuseplan.rewriting import apply
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.layout import shares, significant_strides
from tests.helpers import HIDDEN, all_reduce, llama, randn, written

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
PADDING = {"act_padding": RULES["act_padding"]}
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
X, R = randn(6, HIDDEN), randn(6, HIDDEN, seed=1)
Model = Callable[..., Any]


def stamp(x: Tensor, v: Tensor) -> None:
    x.add_(v[: x.shape[0], : x.shape[1]])


def stamp_both(x: Tensor, y: Tensor) -> None:
    x.add_(1)
    y.mul_(2)


def second_in_memory(x: Tensor) -> Tensor:
    """Elements at places in memory that follow from no size of x."""
    return x.as_strided((3,), (HIDDEN,), 1).clone()


@pytest.fixture(scope="module", autouse=True)
def own_ops() -> Iterator[None]:
    with torch.library._scoped_library("layouts_test", "DEF") as library:
        library.define("stamp(Tensor(a!) x, Tensor v) -> ()")
        library.define("stamp_both(Tensor(a!) x, Tensor(b!) y) -> ()")
        library.define("second_in_memory(Tensor x) -> Tensor")
        for kernel in (stamp, stamp_both, second_in_memory):
            library.impl(kernel.__name__, kernel, "CompositeExplicitAutograd")
        library.impl("second_in_memory", lambda x: x.new_empty((3,)), "Meta")
        yield


def graph_of(model: Model, inputs: Sequence[Tensor], *, dynamic: bool = False) -> fx.GraphModule:
    """The graph with the norm; bodies of higher-order ops are graphs of their own."""
    graphs = capture(model, inputs, {}, dynamic=dynamic).graphs
    (found,) = [gm for gm in graphs if gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default)]
    return found


def matches_in(graph: fx.Graph, rules: Any = PADDING) -> Matches:
    return find_matches(canonicalize(graph), rules, BUILT_IN_PROVIDERS[:1])


def rewritten(gm: fx.GraphModule, rules: Any = PADDING) -> tuple[fx.GraphModule, list[Match]]:
    copy = fx.GraphModule(gm, copy_graph(gm.graph)[0])
    canonical = canonicalize(copy.graph)
    chosen = [*find_matches(canonical, rules, BUILT_IN_PROVIDERS[:1]).candidates]
    apply(canonical, chosen)
    return copy, chosen


def layout(values: Sequence[Any]) -> list[Any]:
    """Strides and offsets, and which tensors share memory."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    places = [(significant_strides(value), value.storage_offset()) for value in tensors]
    return [
        places,
        [(i, j) for i, j in itertools.combinations(range(len(tensors)), 2) if overlap(tensors[i], tensors[j])],
    ]


def overlap(left: Tensor, right: Tensor) -> bool:
    """Whether the ranges from the first to the last element have bytes in common."""
    if not shares(left, right):
        return False
    ranges = []
    for each in (left, right):
        extent = 1 + sum((size - 1) * step for size, step in zip(each.shape, each.stride(), strict=True))
        ranges.append((each.data_ptr(), each.data_ptr() + extent * each.element_size()))
    (a, b), (c, d) = ranges
    return a < d and c < b


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    names = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    tensors = iter(inputs)
    sizes = [next(tensors) if isinstance(value, Tensor) else inputs[0].shape[0] for value in names]
    with torch.no_grad():
        return list(fx.Interpreter(gm).run(*(s.clone() if isinstance(s, Tensor) else s for s in sizes)))


def metas_of(gm: fx.GraphModule) -> Any:
    """What the graph itself says of its results."""
    return [node.meta["val"] for node in gm.graph.output_node().all_input_nodes]


def check(model: Model, inputs: Sequence[Tensor], copies: int, *, dynamic: bool = False, rules: Any = PADDING) -> None:
    """The rewritten graph computes the same, and lays it out alike."""
    gm = graph_of(model, inputs, dynamic=dynamic)
    after, chosen = rewritten(gm, rules)
    assert [len(match.copied) for match in chosen] == [copies]
    expected, actual = run(gm, inputs), run(after, inputs)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=2**-6, atol=2**-6)
    assert layout(actual) == layout(expected)
    assert [str(value.stride()) for value in metas_of(after)] == [str(value.stride()) for value in metas_of(gm)]


def padded(y: Tensor) -> Tensor:
    return F.pad(y, (0, 8))


def normed(x: Tensor, w: Tensor) -> Tensor:
    return llama(x, None, w)[0]


def returns(view: Callable[[Tensor], Any]) -> Model:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return padded(y), view(y)

    return model


SEEN: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda y: y,
    "two views, which share it": lambda y: (y, y[:, 1:], y.relu()),
    "a clone, which Inductor leaves out": lambda y: y.clone(),
    "rows": lambda y: y[1:],
    "columns": lambda y: y[:, 1:],
    "transposed": lambda y: y.t(),
    "reshaped": lambda y: y.view(2, 3, HIDDEN),
    "as bytes": lambda y: y.view(torch.uint8),
    "as wider integers": lambda y: y.view(torch.int32) + 1,
    "opaque": lambda y: torch.ops.layouts_test.second_in_memory(y[:]),
    "opaque view": lambda y: torch.ops.layouts_test.second_in_memory(y[1:]),
    "written at an index": lambda y: y.index_put((torch.tensor([1]),), torch.ones(HIDDEN, dtype=y.dtype)),
    "written in a slice": lambda y: torch.slice_scatter(y, y[:2] * 2, 0, 2, 4),
}


@pytest.mark.parametrize("reader", SEEN)
def test_who_can_tell_where_a_value_lies_gets_a_copy(reader: str) -> None:
    check(returns(SEEN[reader]), (X, W), copies=1)


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda y: y.relu(),
    "pointwise view": lambda y: y[:, 1:].relu(),
    "matmul": lambda y: y @ y.t(),
    "reshaped, then pointwise": lambda y: y.view(2, 3, HIDDEN) * 2,
    "cat": lambda y: torch.cat([y, y], -1),
    "rows by index": lambda y: y[torch.tensor([2, 0])],
    "parts": lambda y: y.split(16, -1)[1].relu(),
    "as a source": lambda y: torch.slice_scatter(y.new_zeros(8, HIDDEN), y, 0, 1, 7),
}


@pytest.mark.parametrize("reader", UNSEEN)
def test_who_reads_elements_alone_reads_the_slice(reader: str) -> None:
    check(returns(UNSEEN[reader]), (X, W), copies=0)


@pytest.mark.parametrize("order", [("opaque", "pointwise"), ("pointwise", "opaque"), ("reshaped", "matmul")])
def test_layers_that_differ_in_a_reader_are_told_apart(order: tuple[str, str]) -> None:
    def model(x: Tensor, w: Tensor) -> list[Any]:
        results = []
        for reader in order:
            y = normed(x, w)
            results += [padded(y), (SEEN | UNSEEN)[reader](y)]
            x = x + y.relu()
        return results

    found = matches_in(graph_of(model, (X, W)).graph).candidates
    assert [bool(match.copied) for match in found] == [reader in SEEN for reader in order]
    assert [bool(match.loose) for match in found] == [reader in UNSEEN for reader in order]


Padded = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Any, Any, Any]]

IN_PLACE: dict[str, tuple[Padded, int]] = {
    "the norm": (lambda y, total, wide, r: (torch.ops.layouts_test.stamp(y, r), total, y), 1),
    "a view": (lambda y, total, wide, r: (torch.ops.layouts_test.stamp(y[1:, 2:], r), total, y), 1),
    "two results": (lambda y, total, wide, r: (torch.ops.layouts_test.stamp_both(y, total), total, y), 1),
    "the sum alone": (lambda y, total, wide, r: (torch.ops.layouts_test.stamp(total, r), total, y.relu()), 0),
    # The norm is a slice of it, and is read after it.
    "the padded one": (lambda y, total, wide, r: (torch.ops.layouts_test.stamp(wide, padded(r)), wide, y.relu()), 1),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_a_custom_op_works_in_place_on_what_it_worked_on(what: str) -> None:
    write, copies = IN_PLACE[what]

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, r, w)
        wide = padded(y)
        return wide, *write(y, total, wide, r)[1:]

    check(model, (X, R, W), copies=copies)


def test_loops_and_branches_get_what_they_were_traced_with() -> None:
    def loop(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        count = torch.zeros((), dtype=torch.int64)
        _, last = torch.while_loop(lambda i, z: i < 2, lambda i, z: (i + 1, z * 2), (count, y))
        return padded(y), last

    def branch(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return padded(y), torch.cond(x.sum() > 0, lambda z: z * 2, lambda z: z - 1, (y,))

    for model in (loop, branch):
        gm = graph_of(model, (X, W))
        (match,) = matches_in(gm.graph).candidates
        assert len(match.copied) == 1, model


def returns_written(x: Any, w: Any) -> Any:
    y = ops.rms_norm(x, w, 1e-6, "llama")
    return ops.pad(y, 8), aten.relu.default(y)


@pytest.mark.parametrize(("read", "written_to", "copies"), [("norm", "out", 1), ("pad", "out", 0), ("pad", "x", 1)])
def test_a_users_kernel_gets_the_strides_that_it_was_given_as_numbers(read: str, written_to: str, copies: int) -> None:
    """A Triton kernel, as Dynamo puts it into graphs; one that writes elsewhere doesn't write to what is padded."""
    graph = written(returns_written, {"x": X, "w": W})
    (pad,) = graph.find_nodes(op="call_function", target=ops.pad.overload)
    (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    launch = {"kernel_idx": 0, "constant_args_idx": 0, "grid": [(1, 1, 1)], "tma_descriptor_metadata": {}}
    arguments = {"x": pad if read == "pad" else pad.args[0], "out": relu}
    given: dict[str, Any] = {**launch, "kwargs": arguments, "tensors_to_clone": [written_to]}
    with graph.inserting_after(relu):
        graph.call_function(triton_kernel_wrapper_functional, (), given)
    (match,) = matches_in(graph).candidates
    assert [node.name for node in match.copied] == ["rms_norm_default"] * copies


@pytest.mark.parametrize("reader", ["itself", "columns", "transposed", "opaque", "matmul"])
def test_sizes_that_vary(reader: str) -> None:
    check(returns((SEEN | UNSEEN)[reader]), (X, W), copies=reader in SEEN, dynamic=True)


@pytest.mark.parametrize("is_read", [False, True])
def test_ranks_reduce_norm_and_pad(is_read: bool, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(all_reduce(x.sin(), one_rank), r, w)
        return padded(y), y @ y.t() if is_read else y, total

    rules = {"allreduce_rms_padding": RULES["allreduce_rms_padding"]}
    check(model, (X, R, W), copies=not is_read, rules=rules)


def test_results_of_turned_arguments_are_turned() -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, r, w)
        return padded(y), total

    turned = [each.t().contiguous().t() for each in (X, R)]
    gm = graph_of(model, (*turned, W))
    after, (match,) = rewritten(gm)
    assert len(match.copied) == 1
    expected, actual = run(gm, (*turned, W)), run(after, (*turned, W))
    assert actual[1].stride() == expected[1].stride() == (1, 6)
    assert metas_of(after)[1].stride() == (1, 6)


def test_a_sum_that_the_graph_slices_is_no_value_of_its_own(one_rank: str) -> None:
    """The rows of the reduced value lie apart, as no copy does."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = all_reduce(x.sin(), one_rank)[..., :HIDDEN]
        return normed(total, w), total

    gm = graph_of(model, (randn(6, HIDDEN + 32), W))
    found = matches_in(gm.graph, {"allreduce_rms": RULES["allreduce_rms"]})
    assert found.candidates == ()
    (miss,) = found.misses
    assert (miss.refusal.reason, miss.refusal.nearness) == (Reason.LAYOUT, Nearness.REFUSED)
    assert "is returned from the graph: its strides are (96, 1)" in miss.refusal.detail
    assert ".contiguous()" in str(miss.refusal.fix)


def test_a_fusion_that_reads_what_another_yields_reads_what_its_kernel_was_checked_for() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return padded(y), padded(normed(y[:, :HIDDEN], w))

    first, second = matches_in(graph_of(model, (X, W)).graph).candidates
    assert first.copied
    assert not first.loose
    assert not second.copied


def test_what_only_another_pad_of_the_norm_reads_is_not_copied() -> None:
    def model(x: Any, w: Any) -> Any:
        y = ops.rms_norm(x, w, 1e-6, "llama")
        return aten.constant_pad_nd.default(y, [0, 8]), aten.constant_pad_nd.default(y, [0, 16])

    found = matches_in(written(model, {"x": X, "w": W})).candidates
    assert [(match.copied, bool(match.loose)) for match in found] == [((), True)] * 2


def test_what_somebodys_pass_would_read_is_copied() -> None:
    graph = written(returns_written, {"x": X, "w": W})
    (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    nothing: Any = None
    theirs = ExternalMatch(
        owner=nothing, entry=nothing, anchor=relu, consumed=(relu,), ordinal=0, emits=(), found=nothing
    )
    canonical = canonicalize(graph)
    copied = []
    for external in ((), (theirs,)):
        (match,) = find_matches(canonical, PADDING, BUILT_IN_PROVIDERS[:1], external=external).candidates
        copied.append(len(match.copied))
    assert copied == [0, 1]


add_norm_relu = define(
    "layouts_test_norm", "(Tensor x, Tensor residual, Tensor weight, float eps, str rounding) -> (Tensor, Tensor)",
    reference=ops.fused_add_rms_norm.reference, fake=ops.fused_add_rms_norm.fake, samples=[], fused=True,
)  # fmt: skip
MINE = provider_of("layouts_test", {add_norm_relu: ops.fused_add_rms_norm.reference})
Finish = Callable[[Any, Any, Any], Any]


class OwnNorm(Rule):
    """fused_add_rms_norm -> relu  =>  one op, and what `finish(y, total, residual)` makes of its results."""

    name, flags, op, core = "own_norm", (), add_norm_relu, ops.fused_add_rms_norm

    def __init__(self, finish: Finish) -> None:
        self._finish = finish

    def pattern(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        y, total = ops.fused_add_rms_norm(x, residual, weight, eps, rounding)
        return aten.relu.default(y), total

    def replacement(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        fused = add_norm_relu(x, residual, weight, eps, rounding)
        return self._finish(fused[0], fused[1], residual)


def turned(value: Any) -> Any:
    """The same value in columns."""
    columns = aten.clone.default(aten.permute.default(value, [1, 0]), memory_format=torch.contiguous_format)
    return aten.permute.default(columns, [1, 0])


FINISHES: dict[str, tuple[Finish, list[int]]] = {
    "as it comes": (lambda y, total, residual: (y, total), []),
    "turned": (lambda y, total, residual: (turned(y), total), [0]),
    "shared": (lambda y, total, residual: (y, aten.alias.default(y)), [1]),
    "a view of an argument": (lambda y, total, residual: (y, aten.slice.Tensor(residual, 0, 0)), [1]),
    "an argument": (lambda y, total, residual: (aten.alias.default(residual), total), [0]),
}


Read = Callable[[Any, Any, Any, Any], Any]


def own_match(finish: Finish, read: Read) -> Match:
    """The match of that rule in a graph that reads both results, and the two arguments that the norm adds."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y, total = ops.fused_add_rms_norm(x, r, w, 1e-6, "llama")
        return read(aten.relu.default(y), total, x, r)

    rule = OwnNorm(finish)
    rule.validate()
    graph = written(model, {"x": X, "r": R, "w": W})
    (match,) = find_matches(canonicalize(graph), {"own_norm": [rule]}, [MINE]).candidates
    return match


def product(y: Any, total: Any, x: Any, r: Any) -> Any:
    return aten.mm.default(y, aten.permute.default(total, [1, 0]))


def product_later(y: Any, total: Any, x: Any, r: Any) -> Any:
    aten.copy_.default(r, x)
    return product(y, total, x, r)


@pytest.mark.parametrize("finish", FINISHES)
def test_a_users_rule_is_held_to_the_same_and_may_yield_anything_where_nobody_sees_it(finish: str) -> None:
    yields, elsewhere = FINISHES[finish]
    returned: Read = lambda y, total, x, r: (y, total)  # noqa: E731
    for read, copied, loose in ((returned, elsewhere, []), (product, [], elsewhere)):
        match = own_match(yields, read)
        found = [[match.outputs.index(node) for node in nodes] for nodes in (match.copied, match.loose)]
        assert found == [copied, loose]


@pytest.mark.parametrize(
    ("finish", "read", "copies"),
    [
        ("turned", lambda y, total, x, r: (aten.mul.Tensor(y, 2), total), 1),
        ("a view of an argument", product_later, 1),
        ("as it comes", product_later, 0),
    ],
    ids=["strides in another order, through pointwise ops", "an argument that is written to later", "what is its own"],
)
def test_what_is_seen_of_a_users_rule(finish: str, read: Read, copies: int) -> None:
    assert len(own_match(FINISHES[finish][0], read).copied) == copies


def test_a_rewritten_graph_says_how_its_views_lie() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return padded(y), y[:, 2:].t().relu(), y.split(16, -1)[1] + 1

    after, (match,) = rewritten(graph_of(model, (X, W)))
    assert match.loose

    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            real = super().run_node(n)
            if n.op == "call_function" and isinstance(real, Tensor):
                meta = n.meta["val"]
                assert (meta.stride(), meta.storage_offset()) == (real.stride(), real.storage_offset()), n.name
            return real

    with torch.no_grad():
        Checked(after).run(X, W)
    values = [node.meta["val"] for node in after.graph.nodes if getattr(node.target, "is_view", False)]
    tensors = [each for value in values for each in (value if isinstance(value, list) else [value])]
    assert len({each.untyped_storage()._cdata for each in tensors}) == 1


def test_rewriting_leaves_what_matching_read() -> None:
    """Nodes that it copied share their metadata with the original's, of which some lie otherwise now."""
    gm = graph_of(lambda x, w: (padded(y := normed(x, w)), y[:, 2:].t().relu()), (X, W))
    canonical = canonicalize(gm.graph)
    (match,) = find_matches(canonical, PADDING, BUILT_IN_PROVIDERS[:1]).candidates
    known = {node: node.meta["val"] for node in canonical.graph.nodes if node.op == "call_function"}
    originals = {node: known[copy] for copy, node in canonical.origin.items() if copy in known}
    apply(canonical, [match])
    assert match.loose
    assert all(node.meta["val"] is value for node, value in known.items())
    assert any(node.meta["val"] is not originals[node] for node in gm.graph.nodes if node in originals)
