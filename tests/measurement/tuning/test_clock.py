"""Interleaving, the slowest rank, how many calls make a repeat, and a busy machine; no clock is read."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuseplan.measurement.tuning import Ranks, Times, busy, interleaved
from fuseplan.measurement.tuning.clock import MOST_CALLS, Subject

CPU = torch.device("cpu")


class Scripted(Subject):
    """A subject whose calls take as long as a function of the repeat says."""

    def __init__(self, name: str, log: list[str], lasts: Callable[[int], int], sets: int = 1) -> None:
        super().__init__(lambda arguments: None, [[]] * sets)
        self.name, self.log, self.lasts, self.timed = name, log, lasts, 0

    def time_ns(self) -> int:
        self.log.append(self.name)
        self.timed += 1
        return self.lasts(self.timed) * self.count


class SlowRank(Ranks):
    """A second rank on which everything takes longer by a microsecond a call, as far as it is timed."""

    def exchange(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value, {name: [time + 1000 * 2000 for time in times] for name, times in value.items()}]
        return [value, value]


def test_a_summary_is_the_median_and_the_quartiles() -> None:
    assert Times.of([50, 10, 30, 20, 40]) == Times(median_ns=30, spread_ns=20)
    assert Times.of([7, 7, 7, 7, 7]) == Times(median_ns=7, spread_ns=0)


def test_repeats_are_interleaved_and_begin_with_another_one_each_time() -> None:
    log: list[str] = []
    subjects = {name: Scripted(name, log, lambda repeat: 5000) for name in "abc"}
    times = interleaved(subjects, 5, Ranks(), CPU, least_ns=1)
    assert "".join(log[-15:]) == "abcbcacababcbca"
    assert times == {name: [5000] * 5 for name in "abc"}


@pytest.mark.parametrize(
    ("lasts", "sets", "count"), [(1_000_000, 1, 3), (1000, 1, MOST_CALLS), (600_000, 8, 8), (10**7, 8, 1)]
)
def test_as_many_calls_make_a_repeat_as_last_long_enough(lasts: int, sets: int, count: int) -> None:
    subject = Scripted("a", [], lambda repeat: lasts, sets)
    assert interleaved({"a": subject}, 5, Ranks(), CPU, least_ns=2_000_000)["a"] == [lasts] * 5
    assert subject.count == count


def test_the_slowest_rank_counts() -> None:
    subject = Scripted("a", [], lambda repeat: 1000)
    times = interleaved({"a": subject}, 5, SlowRank(), CPU, least_ns=1_000_000)
    assert times["a"] == [1000 + round(1000 * 2000 / subject.count)] * 5


def test_calls_take_turns_over_the_sets() -> None:
    seen: list[int] = []
    subject = Subject(lambda arguments: seen.append(len(arguments)), [[], [torch.ones(1)]])
    subject.settle(5)
    assert subject.time_ns() > 0
    assert seen == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("load", "processors", "expected"), [(9.3, 2, True), (0.4, 2, False), (20.0, 128, False)])
def test_a_busy_machine_is_named(load: float, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    notes = busy()
    assert bool(notes) == expected
    if expected:
        assert notes == ["this machine is busy (load 9.3 on 2 processors): other work changes the times"]
