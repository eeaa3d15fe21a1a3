"""What callers do with a compiled model beside calling it: copies, other weights, attributes, models of one class."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from tests.differential.checking import Seen
from tests.differential.program import Program, Sizes

Steps = tuple[str, ...]
MANY = range(1, 12)
"""Numbers of tokens."""


def draw_steps(program: Program, rng: random.Random, count: int) -> Steps:
    """Calls at all sizes of a program, and further steps among them."""
    kinds = {
        "copy": 3, "scale 0.25": 2, "epsilon 0.125": 1, "load": 2, "another": 3, "layers": 0.7, "hook": 1, "train": 1,
        "sizes": 0.7,
    }  # fmt: skip
    further = rng.choices(list(kinds), list(kinds.values()), k=count)
    if "attend(" not in program.source:  # which compares every row with every other one
        kinds["long"] = 1
    return (*(f"call {run}" for run in range(len(program.sizes))), *further)


def called_with(program: Program, steps: Steps) -> list[int]:
    """The numbers of tokens of all calls, but for one that is longer than any."""
    tokens = [sizes["B"] * (sizes["S"] if "S" in program.leading else 1) for sizes in program.sizes]
    return [*tokens, *(MANY if "sizes" in steps else ())]


class Session:
    """A model and its caller.

    Args:
        program: what is called.
        compiled: makes a compiled module of one; the same call makes all of them.
        prepare: what becomes of arguments.

    Attributes:
        seen: of each call its results, its arguments and the buffers afterwards.
    """

    def __init__(
        self, program: Program, make: Callable[[], nn.Module], compiled: Callable[[nn.Module], Any],
        prepare: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:  # fmt: skip
        self.program, self.make, self.compiled, self.prepare = program, make, compiled, prepare
        self.model = compiled(make())
        self.seen: list[Seen] = []

    def play(self, steps: Steps) -> list[Seen]:
        """Takes all steps, and tells what was seen."""
        with torch.no_grad():
            for step in steps:
                name, *arguments = step.split()
                getattr(self, name)(*arguments)
        return self.seen

    def call(self, run: str = "0", model: Any = None) -> None:
        """One call."""
        self._call(self.model if model is None else model, self.program.inputs(int(run)))

    def _call(self, model: Any, inputs: list[Tensor]) -> None:
        arguments = [self.prepare(each) for each in inputs]
        results = map(_awaited, model(*arguments))
        self.seen.append(Seen.of([*results, *arguments, *model.buffers()]))

    def long(self) -> None:
        """A prefill that is longer than what plans are priced for."""
        self._call_with({"B": 3, "S": 3001} if "S" in self.program.leading else {"B": 9003})

    def sizes(self) -> None:
        """More sizes than Dynamo compiles of one code."""
        for tokens in MANY:
            self._call_with({"B": tokens, "S": 1})

    def _call_with(self, sizes: Sizes) -> None:
        if self.program.runs(sizes):
            self._call(self.model, replace(self.program, sizes=(sizes,)).inputs(0))

    def copy(self) -> None:
        """A copy has weights of its own."""
        twin = copy.deepcopy(self.model)
        twin.load_state_dict(_halved(twin))
        self.call(model=twin)
        self.call()

    def load(self) -> None:
        """Other weights are loaded."""
        self.model.load_state_dict(_halved(self.model))
        self.call()

    def scale(self, value: str) -> None:
        self.model.scale = float(value)
        self.call()

    def epsilon(self, value: str) -> None:
        self.model.epsilon = float(value)
        self.call()

    def another(self) -> None:
        """A second model of the class, with an epsilon and a scale of its own."""
        module = self.make()
        vars(module).update(epsilon=1e-2, scale=0.75)
        self.call(model=self.compiled(module))
        self.call()

    def layers(self) -> None:
        """Each layer of a model is compiled by itself, and there are more of them than Dynamo compiles of one code."""
        for _ in range(10):
            self.call(model=self.compiled(self.make()))

    def hook(self) -> None:
        handle = self.model.register_forward_hook(_doubled)
        self.call()
        handle.remove()
        self.call()

    def train(self) -> None:
        for mode in (True, False):
            self.model.train(mode)
            assert self.model.training is mode
            self.call()


def _awaited(value: Any) -> Any:
    """What a collective yields in eager mode is a wrapper until somebody reads it."""
    return value.trigger_wait() if isinstance(value, AsyncCollectiveTensor) else value


def _halved(module: Any) -> dict[str, Tensor]:
    return {name: value * 0.5 for name, value in module.state_dict().items()}


def _doubled(module: nn.Module, args: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = results
    return first * 2 if isinstance(first, Tensor) and first.dtype.itemsize > 1 else first, *others
