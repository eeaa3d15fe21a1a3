"""What was verified once is not verified again, and never believed of other hardware, versions or kernels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.caching import fingerprint
from fuseplan.record import Verification
from fuseplan.verification import outcomes
from tests.helpers import HIDDEN, post_grad, randn
from tests.verification.fused_norm import WEIGHT, model, provider, reference, right, yields_nan
from tests.verification.test_faults import fuse


class Calls:
    """How often a kernel ran. Data that a kernel names would be part of what the kernel is."""

    def __init__(self) -> None:
        self.count = 0


CALLS = Calls()


def counted(x: Tensor, *rest: Any) -> Any:
    CALLS.count += 1
    return reference(x, *rest)


@pytest.fixture(scope="module")
def traced() -> fx.Graph:
    return post_grad(model, randn(5, HIDDEN), randn(5, HIDDEN, seed=1), WEIGHT, dynamic=True)


@pytest.fixture(autouse=True)
def _uncounted() -> None:
    CALLS.count = 0


def test_a_second_compilation_runs_no_kernel(traced: fx.Graph) -> None:
    mine, wrong = provider(counted), provider(yields_nan)
    _, first = fuse(traced, mine)
    assert CALLS.count == 5
    _, second = fuse(traced, mine)
    assert CALLS.count == 5
    assert [each.from_cache for each in (*first.verified, *second.verified)] == [False, True]
    assert (first.verified[0].worst, first.verified[0].tokens) == (second.verified[0].worst, second.verified[0].tokens)
    fuse(traced, wrong)
    _, report = fuse(traced, wrong)
    assert (report.verified[0].from_cache, [*report.applied]) == (True, []), "what is wrong is remembered, too"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (torch, "__version__", "99.0"), (fingerprint, "_local_devices", lambda: ["another GPU"]),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024"),
    ],
    ids=["torch", "gpu", "capability"],
)  # fmt: skip
def test_other_hardware_and_versions_are_another_question(
    traced: fx.Graph, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    mine = provider(counted)
    fuse(traced, mine)
    monkeypatch.setattr(where, name, value)
    _, report = fuse(traced, mine)
    assert not report.verified[0].from_cache


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"rule": 3}', b"[" * 40_000, b"x" * 2**17])
def test_a_broken_file_is_no_outcome(traced: fx.Graph, cold: Path, content: bytes) -> None:
    mine = provider(counted)
    fuse(traced, mine)
    (path,) = cold.glob("*.json")
    assert json.loads(path.read_text())["passed"] is True
    path.write_bytes(content)
    _, report = fuse(traced, mine)
    assert report.verified[0].passed
    assert not report.verified[0].from_cache
    assert CALLS.count == 10


def test_a_cache_that_cannot_be_written_to_fails_nothing(traced: fx.Graph, cold: Path) -> None:
    cold.parent.mkdir(parents=True)
    cold.write_text("a file where the folder should be")
    _, report = fuse(traced, provider(right))
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 1}
    outcomes.save("key", Verification(rule="r", op="o", provider="p", signature="s"))
    assert outcomes.load("key") is None
