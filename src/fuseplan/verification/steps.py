"""Scales of groups that change in steps: powers of two, or numbers in fp8.

A kernel's rows may deviate from the graph's by the allowed error, and so may the largest element of a group. If it is
that close to the next step of the scale, either scale is right, and codes by the other scale are compared with the
exact values as numbers. All other scales must equal the graph's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.dialect import DialectOp, ops
from fuseplan.graph.facts import item
from fuseplan.graph.ops import Decoded
from fuseplan.rules import Rule
from fuseplan.verification.compare import FP8, ROUNDED_ALIKE, unit_in_the_last_place


@dataclass(frozen=True, eq=False, kw_only=True)
class Stepped:
    """A quantisation in a rule's pattern with scales that may change in steps.

    Attributes:
        op: its op.
        node: its call.
        places: indices of codes and scales among the pattern's results.
    """

    op: DialectOp
    node: fx.Node
    places: tuple[int, int]

    @classmethod
    def of(cls, rule: Rule) -> "Stepped | None":
        """The quantisation of a rule, if it has one."""
        traced = rule.traced_pattern
        for node in traced.graph.nodes:
            op = ops.of(node.target)
            if op is not None and op.decode is not None:
                codes, scales = (traced.outputs.index(each) for each in (item(node, 0), item(node, 1)) if each)
                return cls(op=op, node=node, places=(codes, scales))
        return None

    def settled(
        self, actual: Sequence[Any], expected: Sequence[Tensor], given: Sequence[Any], exact: Sequence[Any],
        factor: float,
    ) -> tuple[Sequence[Any], str | None]:  # fmt: skip
        """The results, with groups by the other scale replaced by the expected ones, where either scale is right.

        Args:
            actual: results of the fused op.
            expected: results of the unfused ops.
            given: the graph's arguments of the quantisation; the first is its rows.
            exact: these arguments in float64.
            factor: the allowed multiple of the error of the graph's rows.

        Returns:
            (results, the error of a scale or None)
        """
        codes, scales = (actual[place] for place in self.places)
        right = [expected[place] for place in self.places]
        if codes is None or scales is None or torch.equal(_bits(scales), _bits(right[1])):
            return actual, None
        assert self.op.decode is not None
        got, wanted = self.op.decode(codes, scales, *exact[1:]), self.op.decode(*right, *exact[1:])
        if wanted is None or got is None:
            return actual, None
        differs = got.steps != wanted.steps
        if not differs.any():
            return actual, None
        row, group = differs.nonzero(as_tuple=True)
        groups = _Groups.of(given[0], exact[0], factor, row, group, differs.shape[1])
        mine, theirs = (each.reshape(*differs.shape, -1) for each in (codes.clone(), right[0]))
        wrong = ~self._fits(groups, got, wanted, row, group, exact[1:], mine[row, group])
        if wrong.any():
            at = int(wrong.nonzero()[0])
            place = int(row[at]), int(group[at])
            return actual, (
                f"the scale of group {place[1]} of row {place[0]} is {float(got.scales[place]):.6g} where "
                f"{float(wanted.scales[place]):.6g} is right for a largest element of "
                f"{float(groups.exact[at].abs().max()):.6g}; {int(wrong.sum())} of {differs.numel()} are wrong"
            )
        settled = list(actual)
        mine[row, group] = theirs[row, group]
        settled[self.places[0]] = mine.reshape(codes.shape)
        if int((_bits(scales) != _bits(right[1])).sum()) <= len(row):  # otherwise more than the groups' scales differs
            settled[self.places[1]] = right[1]
        return settled, None

    def _fits(
        self, groups: "_Groups", got: Decoded, wanted: Decoded, row: Tensor, group: Tensor, arguments: Sequence[Any],
        codes: Tensor,
    ) -> Tensor:  # fmt: skip
        """Whether scales are between those of the groups at both ends of the allowed range, one step away, and codes
        encode numbers within one code plus the allowed error of the exact ones.
        """
        assert self.op.decode is not None
        ends = []
        for end in (groups.exact.abs() - groups.allowed, groups.exact.abs() + groups.allowed):
            decoded = self.op.decode(*self.op.reference(end.clamp(min=0.0), *arguments), *arguments)
            assert decoded is not None
            ends.append(decoded.steps.flatten())
        steps, own = got.steps[row, group], wanted.steps[row, group]
        fits = (ends[0] <= steps) & (steps <= ends[1]) & ((steps - own).abs() == 1)
        numbers, scale = got.numbers(codes), got.scales[row, group].unsqueeze(-1)
        code = unit_in_the_last_place(numbers, codes.dtype) if codes.dtype in FP8 else _spacing(numbers)
        beyond = (groups.exact.abs() - got.most * scale).clamp(min=0.0)
        off = (numbers * scale - groups.exact).abs()
        return fits & (off <= groups.allowed + code * scale + beyond).all(-1)


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The groups whose scales differ, [groups, size] in float64.

    Attributes:
        exact: their elements.
        allowed: the allowed error of a kernel's elements.
    """

    exact: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, rows: Tensor, exact: Tensor, factor: float, row: Tensor, group: Tensor, count: int) -> "_Groups":
        width = exact.shape[-1]
        given, true = rows.reshape(-1, width), exact.reshape(-1, width)
        which, place = row.unique(return_inverse=True)
        worst = (given[which].double() - true[which]).abs().amax(1, keepdim=True)[place]
        groups = true.reshape(len(true), count, -1)[row, group]
        unit = unit_in_the_last_place(groups, rows.dtype)
        if factor > ROUNDED_ALIKE:
            worst = torch.maximum(worst, unit / 2)
        return cls(exact=groups, allowed=factor * worst + unit)


def _spacing(numbers: Tensor) -> Tensor:
    """The distance of codes in e2m1 to the farther one of their neighbours."""
    size = numbers.abs()
    return torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(scales: Tensor) -> Tensor:
    return scales.view(_INTEGERS[scales.element_size()])
