"""Numbers of tokens at which a kernel runs machine code that it runs at no other that is checked.

Launchers choose tiles and hints to the compiler by size. What was chosen at no size that is verified would be compiled
at the first call that needs it, which may be a request.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.dialect import registered_kernel
from fuseplan.matching import Match
from fuseplan.providers import Needs
from fuseplan.verification.specs import Case, Sizes, TensorSpec, case_of

STEP = 1.06
"""From one number of tokens to the next that is asked about."""


def with_all_code(
    match: Match, cases: Sequence[Case], sizes: Sizes, span: tuple[int, int], needs: Needs
) -> tuple[Case, ...]:
    """Cases of a match, and those at which its kernel needs further machine code, by their number of tokens; code that
    is needed by sizes that are less than `STEP` apart alone may be missed.

    Args:
        match: of a rule.
        cases: at which it is checked anyway.
        sizes: of its graph.
        span: first and last number of tokens.
        needs: what code a call of the provider's kernels needs.
    """
    kernel = registered_kernel(match.rule.op.name, match.provider)
    if kernel is None or len(cases) < 2:
        return tuple(cases)
    mode = FakeTensorMode()

    def code_of(case: Case) -> frozenset[object]:
        return needs(lambda: kernel(*_arguments(mode, case)), mode)

    known = frozenset[object]().union(*map(code_of, cases))
    found, tokens = [*cases], float(span[0])
    while known and tokens <= span[1]:
        case = case_of(match, sizes, int(tokens))
        if not (code := code_of(case)) <= known:
            found.append(case)
            known |= code
        tokens = max(tokens + 1, tokens * STEP)
    return tuple(sorted(found, key=lambda case: case.tokens))


def _arguments(mode: FakeTensorMode, case: Case) -> list[Any]:
    """Tensors without data."""
    made: dict[str, Any] = {}
    with mode:
        for name, value in case.arguments.items():
            if not isinstance(value, TensorSpec):
                made[name] = value
            elif value.same_as is not None:
                made[name] = made[value.same_as]
            else:
                made[name] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
    return list(made.values())
