"""Somebody's code is run with a deadline, apart from what the caller has put up, and what it raises is one clause."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuseplan.verification.deadline import AttemptError, DeadlineError, attempt, within

CPU = torch.device("cpu")


def raising(error: BaseException) -> Callable[[], Any]:
    def function() -> None:
        raise error

    return function


def test_what_ends_in_time_is_returned() -> None:
    assert within(20, lambda: 7, CPU) == 7
    assert attempt(20, lambda: None, CPU) is None
    assert within(20, threading.current_thread, CPU) is not threading.current_thread()
    with torch.inference_mode():
        assert not within(20, torch.is_inference_mode_enabled, CPU)


def test_what_does_not_is_left_behind() -> None:
    start = time.monotonic()
    for run in (within, attempt):
        with pytest.raises(DeadlineError, match=r"^the kernel did not end within 0\.05 s$"):
            run(0.05, lambda: time.sleep(3), CPU)
    assert time.monotonic() - start < 2
    (late, *_) = [each for each in threading.enumerate() if each.name == "fuseplan-verification"]
    assert late.daemon, "it ends with the process"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no\nsuch tile"), "the kernel raises ValueError: no such tile"),
        (MemoryError("1 GB"), "the kernel needs more memory than there is: 1 GB"),
        (torch.OutOfMemoryError("2 GB"), "the kernel needs more memory than there is: 2 GB"),
        (RuntimeError("can't allocate memory"), "the kernel needs more memory than there is: can't allocate memory"),
        (SystemExit(3), "the kernel calls sys.exit(3)"),
    ],
)
def test_what_it_raises_is_told_in_one_clause(error: BaseException, told: str) -> None:
    with pytest.raises(type(error)):
        within(20, raising(error), CPU)
    with pytest.raises(AttemptError) as caught:
        attempt(20, raising(error), CPU)
    assert str(caught.value) == told
    assert not isinstance(caught.value, DeadlineError)


def test_an_interrupt_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(20, raising(KeyboardInterrupt()), CPU)
