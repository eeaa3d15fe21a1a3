"""Memory that tells on who uses it wrong."""

import math
import os

import pytest
import torch

from fuseplan.verification import memory
from fuseplan.verification.memory import Poisoned, physical_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_allocated_is_full_of_nan(dtype: torch.dtype) -> None:
    given = torch.ones(3, 4, dtype=dtype)
    with Poisoned():
        made = [
            torch.empty(3, 4, dtype=dtype), torch.empty_like(given), given.new_empty(2),
            torch.empty_strided((2, 2), (2, 1), dtype=dtype), given.new_empty_strided((2, 2), (1, 2)),
        ]  # fmt: skip
        written = torch.zeros(3)
    assert all(each.isnan().all() for each in made)
    assert torch.equal(written, torch.zeros(3))


def test_memory_that_is_not_there_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that promise more memory than there is would end the process over it."""
    monkeypatch.setattr(memory, "physical_memory", lambda: 1000)
    with Poisoned():
        assert torch.empty(250).isnan().all()
        with pytest.raises(MemoryError, match=r"1,004 bytes were asked for; this machine has 1,000"):
            torch.empty(251)
    assert torch.empty(251).shape == (251,)


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**28 < physical_memory() < 2**46
    monkeypatch.delattr(os, "sysconf")
    assert physical_memory() == math.inf
