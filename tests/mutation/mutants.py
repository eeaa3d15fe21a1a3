"""The mutants of a file, each with what it changes, and the list of those that change nothing one could see."""

import ast
import hashlib
import pickle
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor

from tests.mutation.operators import Span, operators

KEYWORD_ONLY = re.compile(r"(?<=[\s(])\*(?=,)")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change to one file.

    Attributes:
        path: of the file, under the package.
        operator: what made it.
        lines: the first and the last that the change touches.
        before: these lines, without indentation.
        after: what stands there instead.
        source: of the whole file.
    """

    path: str
    operator: str
    lines: tuple[int, int]
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """The mutant by its content."""
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()[:16]


def mutants_of(path: str, source: str, *, without: Collection[str] = ()) -> list[Mutant]:
    """All mutants of a file, each once.

    Args:
        path: under the package.
        source: of the file.
        without: operators to leave out.
    """
    tree, skipped = get_ast(source), _skipped(source)
    nodes, pickled = list(ast_nodes(tree)), pickle.dumps(tree)  # to parse it anew takes twice as long
    found: dict[str, Mutant] = {}
    for name, operator in operators():
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, place in enumerate(places):
            if name not in without and not any(_within(place, span) for span in skipped):
                changed = MutationVisitor(occurrence, operator).walk(pickle.loads(pickled)).get_code()
                if changed != source and _compiles(changed):
                    mutant = _mutant(path, name, source, changed)
                    found.setdefault(mutant.key, mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.lines, mutant.operator, mutant.after))


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _mutant(path: str, operator: str, source: str, changed: str) -> Mutant:
    before, after = source.splitlines(), changed.splitlines()
    head = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b)
    first, last = head, max(len(before) - tail, head + 1)
    old, new = before[first:last], after[first : len(after) - tail]
    return Mutant(
        path=path,
        operator=operator,
        lines=(first + 1, last),
        before="\n".join(line.strip() for line in old),
        after="\n".join(line.strip() for line in new),
        source=changed,
    )


def _skipped(source: str) -> list[Span]:
    """Spans that are no checks: annotations, decorators, texts, assertions of what can't be otherwise (`strict=True` of
    zip is one), and the mark of parameters that go by keyword alone.
    """

    def spans(node: ast.AST) -> Iterator[ast.AST | None]:
        match node:
            case ast.arg():
                yield node.annotation
            case ast.AnnAssign():
                yield node.annotation
            case ast.FunctionDef():
                yield node.returns
                yield from node.decorator_list
            case ast.ClassDef():
                yield from node.decorator_list
            case ast.Assert() | ast.JoinedStr():
                yield node
            case ast.keyword(arg="strict"):
                yield node.value

    found = (each for node in ast.walk(ast.parse(source)) for each in spans(node))
    lines = enumerate(source.splitlines(), start=1)
    marks = [((line, mark.start()), (line, mark.end())) for line, text in lines for mark in KEYWORD_ONLY.finditer(text)]
    return marks + [
        ((each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset))
        for each in found
        if isinstance(each, ast.expr | ast.stmt) and each.end_lineno is not None and each.end_col_offset is not None
    ]


def _within(place: Span, span: Span) -> bool:
    return span[0] <= place[0] and place[1] <= span[1]


@dataclass(frozen=True, kw_only=True)
class Equivalent:
    """A mutant that no test can tell from the original, and why."""

    path: str
    before: str
    after: str
    why: str

    def is_(self, mutant: Mutant) -> bool:
        """Whether it is that mutant."""
        return (self.path, self.before, self.after) == (mutant.path, mutant.before, mutant.after)


def equivalents(path: Path) -> Sequence[Equivalent]:
    """The list of them."""
    return [
        Equivalent(path=file, **entry) for file, entries in tomllib.loads(path.read_text()).items() for entry in entries
    ]
