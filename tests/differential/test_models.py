"""Random models under random settings: with fuseplan they compute what they compute without it.

A failure prints the program and the setting; the program's text runs as it stands, so that it can be cut down by hand
to a test in `test_found.py`. `--first-seed N` tries other models than those that are always tried.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch._dynamo.exc import BackendCompilerFailed

from tests.differential.checking import Interpreted, Outcome
from tests.differential.doors import through_doors
from tests.differential.generate import THEMES, generate
from tests.differential.program import Program
from tests.differential.recording import Recorded, record_program
from tests.differential.settings import Setting, direct, draw, fuses, in_ranges
from tests.differential.uses import called_with, draw_steps

Outcomes = list[tuple[Setting, Outcome]]
SETTINGS = 4
"""That each interpreted model is tried under: tracing takes longer than all of them."""


# Random models do what torch warns of, and random settings have no effect that fuseplan warns of.
pytestmark = pytest.mark.filterwarnings("ignore")


class Tally:
    """What became of many models."""

    def __init__(self) -> None:
        self.models = self.fused = self.contradictory = self.not_compiled = 0
        self.rules: Counter[str] = Counter()
        self.failures: list[str] = []

    def add(self, program: Program, outcomes: Outcomes) -> None:
        self.models += 1
        self.fused += any(outcome.fused for _, outcome in outcomes)
        for setting, outcome in outcomes:
            self.contradictory += outcome.contradictory
            self.not_compiled += outcome.not_compiled
            self.rules += outcome.fused
            if outcome.problems:
                fused = " ".join(f"{rule}={count}" for rule, count in outcome.fused.items())
                text = "\n".join((*outcome.problems, f"under {setting}", f"fused: {fused}", str(program)))
                self.failures.append(text)

    def check(self, least: float) -> None:
        """Nothing failed, in so many of the models something was fused, and torch alone could compile nearly all."""
        assert not self.failures, "\n\n".join(self.failures)
        assert self.not_compiled <= max(1, self.models // 10), f"torch.compile failed on {self.not_compiled} models"
        assert self.fused >= least * self.models, f"only {self.fused} of {self.models} models had a fusion"


def drawn(recorded: Recorded, rng: random.Random) -> Setting:
    """A setting that may ask for what there is in a graph."""
    setting = draw(rng)
    return direct(setting, setting.manager().analyze(recorded.copy()).problem.candidates, rng)


def interpreted(program: Program, group: str) -> Outcomes:
    """Interprets the graphs of a program, before the passes and after them, under some settings."""
    rng = random.Random(program.seed)
    outcomes = []
    try:
        recordings = record_program(program, group)
    except BackendCompilerFailed:  # there is no fuseplan in it yet
        return [(Setting(), Outcome(not_compiled=True))]
    for recorded in recordings:
        graph = Interpreted(recorded)
        for _ in range(SETTINGS):
            setting = drawn(recorded, rng)
            outcomes.append((setting, graph.check(setting, rng)))
    return outcomes


def used(program: Program, group: str, *, coded: bool = False) -> Outcomes:
    """Compiles a program under one setting, and uses it. If it isn't coded, Inductor's graphs are interpreted, which
    takes a tenth of the time.
    """
    rng = random.Random(program.seed)
    recorded, *_ = record_program(program, group)
    for _ in range(8):
        setting = drawn(recorded, rng)
        if fuses(setting, recorded.copy()):
            break
    steps = draw_steps(program, rng, rng.choice((0, 1) if coded else (1, 2, 2)))
    if rng.random() < (0.8 if "sizes" in steps else 0.3):
        setting = in_ranges(setting, called_with(program, steps), rng)
    outcome = through_doors(program, setting, steps, group, coded=coded)
    outcome.problems = [f"{problem} ({', '.join(steps)})" for problem in outcome.problems]
    return [(setting, outcome)]


def nightly(*parameters: Any) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.nightly)


def check(
    first: int, size: int, most: int, run: Callable[[Program, str], Outcomes], group: str, theme: str | None = None, *,
    least: float,
) -> None:  # fmt: skip
    """Of models of up to so many statements, those of `size` seeds from the first on."""
    tally = Tally()
    for seed in range(first, first + size):
        program = generate(seed, most=most, theme=theme)
        tally.add(program, run(program, group))
    tally.check(least=least)


@pytest.mark.parametrize(
    ("chunk", "size", "most"), [(0, 6, 4), nightly(1, 6, 4), *(nightly(chunk, 20, 9) for chunk in range(100))]
)
def test_random_models_interpreted(chunk: int, size: int, most: int, one_rank: str, first_seed: int) -> None:
    check(first_seed + size * chunk, size, most, interpreted, one_rank, least=0.25)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("chunk", "size", "most"), [(100, 2, 2), *(nightly(chunk, 25, 5) for chunk in range(8))])
def test_random_ends_interpreted(chunk: int, size: int, most: int, theme: str, one_rank: str, first_seed: int) -> None:
    check(first_seed + size * chunk, size, most, interpreted, one_rank, theme, least=0.25)


@pytest.mark.parametrize(
    ("chunk", "size", "most", "least"), [(0, 2, 2, 0.25), *(nightly(chunk, 20, 5, 0.05) for chunk in range(25))]
)
def test_random_uses(chunk: int, size: int, most: int, least: float, one_rank: str, first_seed: int) -> None:
    check(first_seed + size * chunk, size, most, used, one_rank, least=least)


@pytest.mark.parametrize(
    ("chunk", "size", "most", "least"), [(0, 1, 2, 0.4), *(nightly(chunk, 20, 6, 0.05) for chunk in range(25))]
)
def test_random_models_through_inductor(
    chunk: int, size: int, most: int, least: float, one_rank: str, first_seed: int
) -> None:
    """500 models at night."""
    check(first_seed + size * chunk, size, most, partial(used, coded=True), one_rank, least=least)
