"""Numbers of tokens at which a kernel runs machine code that it runs at no other that is checked.

Launchers choose tiles and hints to the compiler by size. What was chosen at no size that is verified would be compiled
at the first call that needs it, which may be a request.
"""

from collections.abc import Sequence

from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.dialect import registered_kernel
from fuseplan.matching import Match
from fuseplan.providers import Needs
from fuseplan.verification.specs import Case, Sizes, case_of, undrawn

STEP = 1.06
"""From one number of tokens to the next that is asked about."""


def with_further_code(
    match: Match, cases: Sequence[Case], sizes: Sizes, span: tuple[int, int], needs: Needs
) -> tuple[int, ...]:
    """Numbers of tokens at which a match's kernel needs machine code that it needs at none of its cases; code that is
    needed by sizes that are less than `STEP` apart alone may be missed.

    Args:
        match: of a rule.
        cases: at which it is checked anyway.
        sizes: of its graph.
        span: first and last number of tokens.
        needs: what code a call of the provider's kernels needs.
    """
    kernel = registered_kernel(match.rule.op.name, match.provider)
    if kernel is None or len(cases) < 2:
        return ()
    mode = FakeTensorMode()

    def code_of(case: Case) -> frozenset[object]:
        with mode:
            arguments = undrawn(case).values()
        return needs(lambda: kernel(*arguments), mode)

    known = frozenset[object]().union(*map(code_of, cases))
    found, tokens = list[int](), float(span[0])
    while known and tokens <= span[1]:
        case = case_of(match, sizes, int(tokens))
        if case.is_possible and not (code := code_of(case)) <= known:
            found.append(case.tokens)
            known |= code
        tokens = max(tokens + 1, tokens * STEP)
    return tuple(found)
