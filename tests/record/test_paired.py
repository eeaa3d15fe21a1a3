"""Paired differences: right ends, the promised confidence, and how many repeats would settle one."""

import random

import pytest
from scipy import stats

from fuseplan.record.paired import CONFIDENCE, Paired, _skipped


def test_what_slows_both_down_is_no_difference() -> None:
    disturbed = [1000, 1350, 825, 2700, 1000, 1400, 900, 1000, 3000]
    found = Paired.of([time + 20 for time in disturbed], disturbed)
    assert (found.difference_ns, found.low_ns, found.high_ns, found.is_clear) == (20, 20, 20, True)


def test_a_difference_no_larger_than_what_it_moves_by_is_unclear() -> None:
    found = Paired.of([10, 400, 30, 380, 20, 390, 25, 410, 15], [200] * 9)
    assert not found.is_clear
    assert not found.is_even(200)
    assert Paired.of([1001] * 9, [1000] * 9).is_even(1000)


@pytest.mark.parametrize("count", [6, 9, 15, 25, 40])
def test_ends_are_those_of_the_signed_rank_distribution(count: int) -> None:
    total = count * (count + 1) // 2
    tail = (1 - CONFIDENCE) / 2
    skipped = _skipped(count)

    def p_value(rank_sum: int) -> float:
        # Of differences 1 .. count, those make up the rank sum whose ranks are taken as positive.
        signs, left = [], rank_sum
        for rank in range(count, 0, -1):
            signs.append(rank if rank <= left else -rank)
            left -= rank if rank <= left else 0
        return float(stats.wilcoxon(signs, alternative="less", method="exact").pvalue)

    assert p_value(skipped - 1) <= tail
    assert p_value(skipped) > tail
    assert skipped < total / 2


@pytest.mark.parametrize("count", [9, 60])
def test_the_interval_holds_the_difference_as_often_as_it_says(count: int) -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(400):
        noise = [chance.gauss(0, 100) for _ in range(count)]
        found = Paired.of([round(1050 + each) for each in noise], [1000] * count)
        held += found.low_ns <= 50 <= found.high_ns
    assert 0.92 <= held / 400 <= 0.99


def test_as_many_repeats_as_it_advises_make_it_clear() -> None:
    chance = random.Random(1)

    def sample(count: int) -> Paired:
        return Paired.of([round(1050 + chance.gauss(0, 100)) for _ in range(count)], [1000] * count)

    unclear = next(each for each in (sample(9) for _ in range(100)) if not each.is_clear and each.difference_ns > 30)
    assert unclear.repeats_needed is not None
    assert unclear.repeats_needed > 9
    assert sample(4 * unclear.repeats_needed).is_clear
    assert Paired(difference_ns=0, low_ns=-50, high_ns=50, repeats=9).repeats_needed is None
