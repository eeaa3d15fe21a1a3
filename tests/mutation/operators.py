"""How code is mutated: cosmic-ray's operators for conditions and arithmetic, and what it lacks, in its own form."""

from collections.abc import Iterator

import parso
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.tree import BaseNode, NodeOrLeaf

Span = tuple[tuple[int, int], tuple[int, int]]
"""(line, column) of the first character, and of the one after the last."""

# Of the many operators that one can be replaced with, those nearest to it: a bound that is off by one, and the
# opposite. The others mostly raise at once, which any test notices.
_COMPARISONS = {
    "Eq": ("NotEq",), "NotEq": ("Eq",), "Is": ("IsNot",), "IsNot": ("Is",),
    "Lt": ("LtE", "GtE"), "LtE": ("Lt", "Gt"), "Gt": ("GtE", "LtE"), "GtE": ("Gt", "Lt"),
}  # fmt: skip
_ARITHMETIC = {
    "Add": ("Sub",), "Sub": ("Add",), "Mul": ("Div", "Add"), "Div": ("Mul", "FloorDiv"), "FloorDiv": ("Mul",),
    "Mod": ("Mul",), "Pow": ("Mul",), "LShift": ("RShift",), "RShift": ("LShift",),
    "BitOr": ("BitAnd",), "BitAnd": ("BitOr",), "BitXor": ("BitAnd",),
}  # fmt: skip
_NAMES = (
    *(f"ReplaceComparisonOperator_{old}_{new}" for old, news in _COMPARISONS.items() for new in news),
    *(f"ReplaceBinaryOperator_{old}_{new}" for old, news in _ARITHMETIC.items() for new in news),
    "ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "AddNot",
    "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "ReplaceContinueWithBreak", "ReplaceBreakWithContinue",
    "ExceptionReplacer", "NumberReplacer", "ZeroIterationForLoop",
)  # fmt: skip


class _Own(Operator):  # type: ignore[misc]
    """An operator that changes the text of one child of a node, whole."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        """The child to change, by its index, and its new text."""
        raise NotImplementedError

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        found = self.child(node)
        if found is not None and isinstance(node, BaseNode):
            changed = node.children[found[0]]
            yield changed.start_pos, changed.end_pos

    def mutate(self, node: BaseNode, index: int) -> BaseNode:
        found = self.child(node)
        assert found is not None
        place, text = found
        prefix = node.children[place].get_first_leaf().prefix
        node.children[place] = parso.parse(f"{prefix}{text}")
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class SwapMembership(_Own):
    """a in b  <->  a not in b."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        if node.type == "comparison" and isinstance(node, BaseNode):
            text = " ".join(node.children[1].get_code().split())
            swapped = {"in": "not in", "not in": "in"}.get(text)
            return (1, swapped) if swapped else None
        return None


class NegateFilter(_Own):
    """... for a in b if c  ->  ... for a in b if not (c)."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        if node.type == "comp_if" and isinstance(node, BaseNode):
            return 1, f"not ({node.children[1].get_code().strip()})"
        return None


class DeleteCall(_Own):
    """f(a)  ->  pass, where it stands as a statement, e.g. what is added to a list."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        if node.type == "simple_stmt" and isinstance(node, BaseNode):
            statement = node.children[0]
            if statement.type in ("power", "atom_expr") and statement.get_code().rstrip().endswith(")"):
                return 0, "pass"
        return None


class DeleteUpdate(_Own):
    """a += b  ->  pass."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        if node.type == "simple_stmt" and isinstance(node, BaseNode):
            statement = node.children[0]
            if isinstance(statement, BaseNode) and statement.type == "expr_stmt":
                middle = statement.children[1]
                if middle.type == "augassign" or middle.get_code().strip() in _UPDATES:
                    return 0, "pass"
        return None


class SwapFunction(_Own):
    """any <-> all, min <-> max."""

    def child(self, node: NodeOrLeaf) -> tuple[int, str] | None:
        if node.type in ("power", "atom_expr") and isinstance(node, BaseNode):
            name, call = node.children[0], node.children[1]
            swapped = _SWAPPED.get(name.get_code().strip())
            if swapped and call.type == "trailer" and call.get_code().startswith("("):
                return 0, swapped
        return None


_UPDATES = {f"{sign}=" for sign in ("+", "-", "*", "/", "//", "%", "**", "<<", ">>", "|", "&", "^")}
_SWAPPED = {a: b for pair in (("any", "all"), ("min", "max")) for a, b in (pair, pair[::-1])}
_OWN = (SwapMembership, NegateFilter, DeleteCall, DeleteUpdate, SwapFunction)


def operators() -> Iterator[tuple[str, Operator]]:
    """Every operator, by name."""
    for name in _NAMES:
        yield name, get_operator(f"core/{name}")()
    for own in _OWN:
        yield own.__name__, own()
