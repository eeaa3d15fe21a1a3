"""What alternatives save: by the model, by a table, and how sizes and noise are weighed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fuseplan.dialect import define, ops
from fuseplan.planner.alternatives import MAX_ENUMERATED, break_ties, compatible
from fuseplan.planner.costs import Provenance
from fuseplan.planner.doubt import weighted
from fuseplan.planner.pose import Problem, pose
from fuseplan.planner.prices import Prices
from fuseplan.planner.pricing import sizes_of
from fuseplan.providers import provider_of
from fuseplan.rules import Rule
from tests.planner.posing import (
    MODEL,
    PROVIDERS,
    TORCH,
    by_provider,
    contested,
    matched,
    measured,
    pads_of,
    problem_of,
    somebodys,
    twice,
)
from tests.planner.test_candidates import together
from tests.planner.test_packing import tie

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("span", "sizes"),
    [((1, 64), (1, 8, 64)), ((2, 8), (2, 4, 8)), ((5, 5), (5,)), ((1, 2), (1, 2)), ((10, 1000), (10, 100, 1000))],
)
def test_a_range_is_priced_at_both_ends_and_the_geometric_middle(span: tuple[int, int], sizes: tuple[int, ...]) -> None:
    assert sizes_of(span) == sizes


@pytest.mark.parametrize(
    ("savings", "unfused", "expected"),
    [([7], [1000], 7), ([10, 30], [100, 300], 30), ([0, 50, 10], [10, 100, 1000], 17), ([2, 4], [0, 4], 6),
     ([-10, -10, -10], [100, 100, 100], -10)],
)  # fmt: skip
def test_savings_are_weighed_by_what_they_are_of(savings: list[int], unfused: list[int], expected: int) -> None:
    assert weighted(savings, unfused) == expected


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        ({}, {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}),
        ({"conflicts": frozenset({(0, 2)})}, {(0,), (1,), (2,), (0, 1), (1, 2)}),
        ({"requires": frozenset({(2, 0)})}, {(0,), (1,), (0, 1), (0, 2), (0, 1, 2)}),
        ({"together": (frozenset({1, 2}),)}, {(0,), (1, 2), (0, 1, 2)}),
    ],
)
def test_alternatives_are_the_subsets_in_which_nothing_conflicts(
    constraints: dict[str, Any], expected: set[tuple[int, ...]]
) -> None:
    found = list(compatible((2, 0, 1), tie(0, 0, 0, **constraints)))
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("values", "noise", "expected"),
    [
        # The best lies within its noise of no fusion: none wins.
        ({"0": 10, "1": -50}, {"": 0, "0": 10, "1": 0}, {"0": 0, "1": -50}),
        ({"0": 11, "1": -50}, {"": 0, "0": 10, "1": 0}, {"0": 11, "1": -50}),
        # The noise of what loses counts as well.
        ({"0": 100, "1": 60}, {"": 0, "0": 1, "1": 40}, {"0": 60, "1": 60}),
        ({"0": 100, "1": 60}, {"": 0, "0": 1, "1": 39}, {"0": 100, "1": 60}),
        ({"0": 100}, {"": 100, "0": 1}, {"0": 0}),
        # Three that tie are level with the least of them.
        ({"0": 100, "1": 95, "2": 92}, {"": 0, "0": 8, "1": 0, "2": 0}, {"0": 92, "1": 92, "2": 92}),
        # Of equals the fewest candidates are the best, whose noise counts.
        ({"01": 100, "2": 100, "3": 90}, {"": 0, "01": 10, "2": 0, "3": 0}, {"01": 100, "2": 100, "3": 90}),
    ],
)
def test_margins_inside_the_noise_are_ties(
    values: dict[str, int], noise: dict[str, int], expected: dict[str, int]
) -> None:
    saved, spread, level = (
        {frozenset(map(int, name)): value for name, value in each.items()} for each in (values, noise, expected)
    )
    assert break_ties(saved, spread) == level


UNFUSED_NS = 1182 + 1046  # the norm reads 4200 bytes and writes 4000, the pad reads 2000 and writes 2560
TRITON_NS = 1000 + 88  # reads 4200, writes 2560 and 2000
TORCH_NS = 15 * 1080 + 1026 + 1240


def test_the_model_prices_a_site_with_and_without_a_fusion() -> None:
    given = problem_of()
    assert by_provider(given, given.priced.costs) == {"triton": TRITON_NS, "torch": TORCH_NS}
    saved = {"triton": UNFUSED_NS - TRITON_NS, "torch": UNFUSED_NS - TORCH_NS}
    assert by_provider(given, given.program.savings_ns) == saved
    assert given.priced.unfused == [UNFUSED_NS]
    assert set(given.priced.provenance) == {Provenance.MODELLED}
    # Of a static graph whose inputs are no token ids nobody knows the tokens.
    assert given.priced.tokens == (1,)


def test_the_model_adds_what_a_fusion_leaves_of_its_site() -> None:
    given = problem_of(contested, providers=PROVIDERS[1:])
    ring, pad = 3200 + 375, 1046
    unfused = ring + UNFUSED_NS
    exchange = 1000 + 400 + 40 + 375
    taken = {"act_padding": TRITON_NS, "allreduce_rms": exchange + 82, "allreduce_rms_padding": exchange + 88}
    left = {"act_padding": ring, "allreduce_rms": pad, "allreduce_rms_padding": 0}
    assert {each.rule: cost for each, cost in zip(given.candidates, given.priced.costs, strict=True)} == taken
    for candidate, saving in zip(given.candidates, given.program.savings_ns, strict=True):
        assert saving == unfused - taken[candidate.rule] - left[candidate.rule], candidate.rule
    assert given.priced.unfused == [unfused]


def test_a_dynamic_graph_is_priced_at_every_size_of_its_range() -> None:
    given = problem_of(dynamic=True, span=(10, 1000))
    assert given.priced.tokens == (10, 100, 1000)
    by_size = [problem_of(dynamic=True, span=(size, size)) for size in (10, 100, 1000)]
    for index in range(2):
        savings = tuple(each.priced.savings[index][0] for each in by_size)
        assert given.priced.savings[index] == savings
        assert given.priced.costs[index] == by_size[1].priced.costs[index]
        assert given.program.savings_ns[index] == weighted(savings, given.priced.unfused)
    assert given.priced.unfused == [each.priced.unfused[0] for each in by_size]
    assert given.saved_by_size([0, 1]) == [sum(each.program.savings_ns) for each in by_size]


def test_sites_of_one_component_are_priced_together() -> None:
    """`together` ties both pads to one component, whose unfused time is that of both sites."""
    given = problem_of(twice, rules=together(together=True), dynamic=True, span=(10, 1000), providers=TORCH)
    assert given.components == [(0, 1)]
    alone = problem_of(twice, dynamic=True, span=(10, 1000), providers=TORCH)
    assert alone.components == [(0,), (1,)]
    assert given.priced.unfused == alone.priced.unfused
    assert given.priced.savings == alone.priced.savings
    for savings, value in zip(given.priced.savings, given.program.savings_ns, strict=True):
        assert value == weighted(savings, given.priced.unfused)


padded_relu = define(
    "pricing_test_padded_relu", "(Tensor x, int right) -> Tensor", samples=(), fused=True,
    reference=lambda x, right: torch.relu(ops.pad.reference(x, right)), fake=ops.pad.fake,
)  # fmt: skip
MINE = provider_of("pricing_test", {padded_relu: padded_relu.reference})


class PaddedRelu(Rule):
    """pad -> relu -> relu  =>  one op, around no core that the model knows."""

    name, flags, op, core = "padded_relu", (), padded_relu, ops.pad

    def pattern(self, x: Any, right: Any) -> Any:
        return aten.relu.default(aten.relu.default(ops.pad(x, right)))

    def replacement(self, x: Any, right: Any) -> Any:
        return padded_relu(x, right)


def test_what_the_model_does_not_know_saves_a_launch_for_each_op_less() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return aten.relu.default(aten.relu.default(ops.pad(x, 28)))

    given = problem_of(model, rules=[PaddedRelu()], providers=[MINE], dynamic=True, span=(1, 64))
    assert (given.priced.savings, given.priced.costs) == ([(2000,) * 3], [None])
    assert given.priced.unfused == [0, 0, 0]


@pytest.mark.parametrize(("saving_us", "expected"), [(None, 1000), (2.5, 2500), (0.0, 0)])
def test_somebodys_pass_saves_what_its_owner_says_or_a_launch(saving_us: float | None, expected: int) -> None:
    canonical, _ = matched(lambda x, r, w: (aten.relu.default(x),), dynamic=True)
    (relu,) = canonical.original.find_nodes(op="call_function", target=aten.relu.default)
    match = somebodys(relu, saving_us=saving_us, emits=("theirs",))
    given = pose(canonical, [], [match], Prices(model=MODEL), (1, 64))
    assert (given.priced.savings, given.priced.costs) == ([(expected,) * 3], [None])
    # Whoever hands a pass over wants it applied: an assumed price will do.
    assert given.priced.provenance == [Provenance.ASSUMED if saving_us is None else Provenance.DECLARED]
    assert given.unpriced == given.program.forbidden == frozenset()
    assert given.candidates[0].op == "theirs"


ALL = {"": [(5000, 10)], "triton": [(2000, 20)], "torch": [(9000, 30)]}


def test_a_table_prices_a_component_as_a_whole() -> None:
    prices = Prices(model=MODEL, table=measured(problem_of(), ALL))
    given = problem_of(prices=prices)
    assert by_provider(given, given.program.savings_ns) == {"triton": 3000, "torch": -4000}
    assert by_provider(given, given.priced.costs) == {"triton": 2000, "torch": 9000}
    assert set(given.priced.provenance) == {Provenance.MEASURED}
    assert given.priced.unfused == [5000]
    index = {each.provider: i for i, each in enumerate(given.candidates)}
    expected = {frozenset({index["triton"]}): 3000, frozenset({index["torch"]}): -4000}
    assert given.program.alternatives == {frozenset({0, 1}): expected}


def read_at_each(rows: Mapping[str, Any]) -> Problem:
    """Of a table of 10 and 40 tokens."""
    plain = problem_of(dynamic=True, span=(10, 40))
    return problem_of(dynamic=True, span=(10, 40), prices=Prices(model=MODEL, table=measured(plain, rows, (10, 40))))


def test_a_table_is_read_at_every_size() -> None:
    same = [(1000, 0), (4000, 0)]
    given = read_at_each({"": same, "triton": [(500, 0), (1000, 0)], "torch": same})
    assert given.priced.tokens == (10, 20, 40)
    assert by_provider(given, given.priced.savings)["triton"] == (500, 2000 - 667, 3000)
    assert by_provider(given, given.priced.costs)["triton"] == 667
    assert given.priced.unfused == [1000, 2000, 4000]
    weighed = weighted((500, 1333, 3000), (1000, 2000, 4000))
    assert by_provider(given, given.program.savings_ns) == {"triton": weighed, "torch": 0}


def test_the_largest_spread_of_all_sizes_is_the_noise() -> None:
    unfused, torchs = [(1000, 1), (4000, 7)], [(2000, 0), (5000, 0)]
    given = read_at_each({"": unfused, "triton": [(990, 300), (3960, 2)], "torch": torchs})
    assert by_provider(given, given.program.savings_ns)["triton"] == 0


@pytest.mark.parametrize("missing", ["", "triton", "torch"])
@pytest.mark.parametrize("source", ["auto", "measured", "modelled"])
def test_a_row_that_is_missing_sends_the_whole_component_to_the_model(missing: str, source: str) -> None:
    rows = {name: times for name, times in ALL.items() if name != missing}
    given = problem_of(prices=Prices(model=MODEL, table=measured(problem_of(), rows), source=source))
    modelled = source != "measured"
    assert set(given.priced.provenance) == {Provenance.MODELLED if modelled else Provenance.MEASURED}
    if modelled:
        assert given.program.savings_ns == problem_of().program.savings_ns
    elif missing:
        (alternatives,) = given.program.alternatives.values()
        assert len(alternatives) == 1
        assert by_provider(given, given.priced.costs)[missing] is None
        assert by_provider(given, given.priced.savings)[missing] == ()
    else:
        # Without what the others are compared with there is nothing to choose, and no time to show.
        assert given.program.alternatives == {frozenset({0, 1}): {}}
        assert given.priced.unfused == [0]


@pytest.mark.parametrize("count", [MAX_ENUMERATED, MAX_ENUMERATED + 1])
def test_large_components_are_not_looked_up(count: int) -> None:
    """A table from which only the unfused row can be read, and that is all there is, is asked up to a number."""
    alone = [provider for provider in PROVIDERS if provider.name == "triton"]
    many = pads_of(*[28] * count)
    plain = problem_of(many, providers=alone)
    assert [len(each) for each in plain.components] == [count]
    table = measured(plain, {"": [(5000, 10)]})
    given = problem_of(many, providers=alone, prices=Prices(model=MODEL, table=table, source="measured"))
    expected = Provenance.MEASURED if count == MAX_ENUMERATED else Provenance.MODELLED
    assert set(given.priced.provenance) == {expected}
