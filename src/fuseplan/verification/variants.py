"""Numbers of tokens at which a kernel runs machine code that it doesn't run at the checked sizes.

Launchers choose tiles and compiler hints by size. Code that no verified size needs would be compiled at the first call
that needs it, which may be a user's request.
"""

from collections.abc import Sequence

from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.dialect import registered_kernel
from fuseplan.matching import Match
from fuseplan.providers import Needs
from fuseplan.verification.specs import Case, Sizes, case_of, undrawn

STEP = 1.06
"""The factor from one number of tokens to the next one queried."""


def with_further_code(
    match: Match, cases: Sequence[Case], sizes: Sizes, span: tuple[int, int], needs: Needs
) -> tuple[int, ...]:
    """Numbers of tokens at which a match's kernel needs machine code that none of its cases needs. Code for a range of
    sizes narrower than a factor of `STEP` may be missed.

    Args:
        match: a match of a rule.
        cases: the cases at which it is checked anyway.
        sizes: sizes of its graph.
        span: first and last number of tokens.
        needs: keys of the code that a call of the provider's kernels needs.
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
