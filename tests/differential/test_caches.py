"""What passes, checks and gates of one's own do may depend on anything: a warm compile cache never serves what they did
under other circumstances.
"""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fuseplan
from fuseplan.config import PassConfig
from fuseplan.providers import Offer
from fuseplan.record import Reason, Refusal, Report
from tests.differential.settings import MINE, NormRelu
from tests.helpers import llama

VARIABLE = "DIFFERENTIAL_SCALE"
HELD = {"scale": 1.0}
BY_DAY = 3


KINDS = ("environment", "file", "module", "slots", "tensor", "closure")
pytestmark = pytest.mark.filterwarnings("ignore")


class Slotted:
    __slots__ = ("scale",)
    scale: float


def circumstances(kind: str, folder: Path) -> tuple[Callable[[float], object], Callable[[], float]]:
    """Sets a number, and looks it up, where a function of the user's may have it."""
    path, slotted, tensor, held = folder / "scale", Slotted(), torch.ones(()), {"scale": 1.0}
    kinds: dict[str, tuple[Callable[[float], object], Callable[[], float]]] = {
        "environment": (lambda scale: os.environ.update({VARIABLE: str(scale)}), lambda: float(os.environ[VARIABLE])),
        "file": (lambda scale: path.write_text(str(scale)), lambda: float(path.read_text())),
        "module": (lambda scale: HELD.update(scale=scale), lambda: HELD["scale"]),
        "slots": (lambda scale: setattr(slotted, "scale", scale), lambda: slotted.scale),
        "tensor": (tensor.fill_, lambda: float(tensor)),
        "closure": (lambda scale: held.update(scale=scale), lambda: held["scale"]),
    }
    return kinds[kind]


def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y, _ = llama(x, None, w)
    return F.pad(llama(x + 1, None, w)[0], (0, 8)), y.relu() * 2.0


def as_pass(look_up: Callable[[], float]) -> dict[str, Any]:
    return {"passes": [_rescaling(look_up)]}


def as_hook(look_up: Callable[[], float]) -> dict[str, Any]:
    return {"options": {"post_grad_custom_post_pass": _rescaling(look_up)}}


def _rescaling(look_up: Callable[[], float]) -> Callable[[fx.Graph], None]:
    def rescale(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            if node.args[1] == 2.0:
                node.args = (node.args[0], look_up())

    return rescale


def as_check(look_up: Callable[[], float]) -> dict[str, Any]:
    class Choosy(NormRelu):
        def check(self, m: Any) -> Refusal | None:
            return m.refuse(Reason.SIZE, "x", "not today") if look_up() > 4 else None

    return {"rules": [Choosy()], "providers": [MINE], "config": PassConfig(policy="ordered(norm_relu)")}


def as_gate(look_up: Callable[[], float]) -> dict[str, Any]:
    def accepts(m: Any) -> Refusal | None:
        return Refusal(reason=Reason.SIZE, detail="not today") if look_up() > 4 else None

    gated = replace(MINE, implements={name: Offer(accepts=accepts) for name in MINE.implements})
    return {"rules": [NormRelu()], "providers": [gated], "config": PassConfig(policy="ordered(norm_relu)")}


DOORS = (as_pass, as_hook, as_check, as_gate)


def seen(arguments: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, int]]]:
    """What a compilation yields, and what its reports say is fused."""
    torch._dynamo.reset()
    reports: list[Report] = []
    compiled = fuseplan.compile(model, on_report=reports.append, **arguments)
    with torch.inference_mode():
        results = compiled(torch.ones(4, 16), torch.ones(16))
    return list(results), [{rule: count for rule, count in report.fused.items() if count} for report in reports]


@pytest.mark.parametrize(
    "index", [pytest.param(index, marks=[pytest.mark.nightly] * (index >= BY_DAY)) for index in range(60)]
)
def test_a_warm_cache_knows_the_circumstances(
    index: int, first_seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = first_seed + index
    rng = random.Random(seed)
    kind, door = rng.choice(KINDS), rng.choice(DOORS)
    change, look_up = circumstances(kind, tmp_path)
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fuseplan"))
    for scale in rng.sample((3.0, 5.0), 2):
        change(scale)
        results, fused = seen(door(look_up))
        case = f"seed {seed}: {door.__name__} that looks at the {kind}: {scale}"
        if door in (as_pass, as_hook):
            assert float(results[1][0, 0]) == pytest.approx(scale, rel=1e-3), case
        else:
            assert fused == [{"norm_relu": 1} if scale <= 4 else {}], case
