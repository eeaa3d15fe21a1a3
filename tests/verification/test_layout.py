"""What leaves a region is held against the graph's own values in how it lies in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.check import check
from fuseplan.verification.layout import misplaced, shares, significant_strides
from fuseplan.verification.memory import Gathered, Loopback
from fuseplan.verification.region import Region
from fuseplan.verification.specs import Sizes, cases_of
from tests.helpers import HIDDEN, llama, post_grad, randn

functional = torch.ops._c10d_functional
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
X = torch.zeros(4, 8)
OWN = torch.zeros(4, 8)


def wrong(*actual: Tensor, wanted: tuple[Tensor | None, ...], free: tuple[int, ...] = ()) -> str | None:
    return misplaced(actual, wanted, {"x": X, "eps": 1e-6}, free)


WIDE = torch.zeros(4, 16)[:, :8]


@pytest.mark.parametrize(
    ("actual", "wanted", "free"),
    [
        ((OWN,), (OWN.clone(),), ()), ((X[1:],), (X[1:],), ()), ((OWN, OWN[1:]), (X.clone(), None), ()),
        ((WIDE[:1],), (OWN[:1].clone(),), ()), ((WIDE[:0],), (OWN[:0].clone(),), ()),
        ((torch.zeros(4, 16), WIDE), (torch.zeros(4, 16), OWN), (1,)),
    ],
    ids=["alike", "the same", "nothing in the graph", "strides of one element", "of none", "nobody reads by layout"],
)  # fmt: skip
def test_results_that_lie_as_the_graphs_do_are_right(actual: Any, wanted: Any, free: tuple[int, ...]) -> None:
    assert wrong(*actual, wanted=wanted, free=free) is None


def test_strides_and_offsets_count() -> None:
    assert wrong(WIDE, wanted=(OWN,)) == (
        "result 0 is float32[4, 8] with strides (16, 1), and the graph's own value is float32[4, 8] with strides (8, 1)"
    )
    assert "from element 8 on" in str(wrong(torch.zeros(5, 8)[1:], wanted=(OWN,)))


def test_strides_of_two_elements_and_more_count() -> None:
    assert [significant_strides(torch.zeros(*shape)) for shape in ((2, 3), (1, 3), (3, 1), (1, 1), (2, 2, 2))] == [
        [3, 1], [1], [1], [], [4, 2, 1]
    ]  # fmt: skip


def test_what_no_node_has_hides_nothing_behind_it() -> None:
    assert str(wrong(OWN, WIDE, wanted=(None, OWN))).startswith("result 1 is float32[4, 8] with strides (16, 1)")
    assert str(wrong(OWN, WIDE, wanted=(OWN, OWN), free=(0,))).startswith("result 1 is")
    assert wrong(OWN, OWN, wanted=(None, OWN.clone())) is None, "nobody has the other one"


def test_the_graphs_own_values_may_be_of_other_arguments() -> None:
    own = OWN.clone()
    before = {"x": own, "eps": 1e-6}
    for actual, wanted, says in ((X, own, None), (X, X, SHARED.format("its argument x")),
                                 (OWN, own, UNSHARED.format("its argument x"))):  # fmt: skip
        assert misplaced([actual], [wanted], {"x": X, "eps": 1e-6}, (), before) == (says and f"result 0 {says}")


@pytest.mark.parametrize(
    ("left", "right", "is_shared"),
    [
        (X, X[2:], True), (X[0, :1], X[3, 7:], True), (X, OWN, False), (X[0, :1], OWN[0, :1], False),
        (X, X[:0], False), (X[:0], X, False),
    ],
)  # fmt: skip
def test_parts_of_one_memory_share_it_where_they_have_elements(left: Tensor, right: Tensor, is_shared: bool) -> None:
    assert shares(left, right) is is_shared


SHARED = "shares memory with {}, and the graph's own value doesn't"
UNSHARED = "shares no memory with {}, and the graph's own value does"


def test_memory_is_shared_where_the_graph_shares_it_and_nowhere_else() -> None:
    assert wrong(X, wanted=(OWN,)) == f"result 0 {SHARED.format('its argument x')}"
    assert wrong(OWN, wanted=(X,)) == f"result 0 {UNSHARED.format('its argument x')}"
    inside, other = torch.zeros(6, 8)[1:5], OWN.clone()
    assert misplaced((inside,), (OWN,), {"x": inside}, (), {"x": X}) == f"result 0 {SHARED.format('its argument x')}"
    assert wrong(OWN, OWN, wanted=(OWN, other)) == f"result 1 {SHARED.format('result 0')}"
    assert wrong(OWN, other, wanted=(OWN, OWN)) == f"result 1 {UNSHARED.format('result 0')}"


def test_a_slice_where_a_dense_value_is_promised_fails_verification() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, _ = llama(x, None, w)
        return F.pad(y, (0, 8)), y

    canonical = canonicalize(post_grad(model, randn(6, HIDDEN), W))
    rules = {"act_padding": by_name(BUILT_IN_RULES)["act_padding"]}
    (match,) = find_matches(canonical, rules, BUILT_IN_PROVIDERS[:1]).candidates
    (case, *_), region = cases_of(match, Sizes(canonical.graph), (6, 6)), Region.of(canonical, match)
    found = [check(match.rule, "torch", case, seed=1, region=region, free=free) for free in ((), (1,))]
    assert found[0].wrong == (
        "result 1 is bfloat16[6, 64] with strides (72, 1), "
        "and the graph's own value is bfloat16[6, 64] with strides (64, 1)"
    )
    assert found[1].wrong is None


def test_all_reduces_of_one_rank_and_of_all_lie_as_torchs_do(one_rank: str) -> None:
    columns = randn(3, 16, 5).transpose(1, 2)
    own = functional.wait_tensor(functional.all_reduce(columns, "sum", one_rank))
    for mode in (Loopback(), Gathered()):
        with mode:
            seen = functional.wait_tensor(functional.all_reduce(columns, "sum", one_rank))
        assert (seen.stride(), seen.tolist()) == (own.stride(), own.tolist())
