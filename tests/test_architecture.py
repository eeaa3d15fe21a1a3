"""The direction of imports, read from the source of every module under src/fuseplan.

Imports inside functions and under TYPE_CHECKING count like any other: what a module knows of is the same.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fuseplan
from fuseplan.graph.ops import Dialect

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"


def _rows(*rows: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(row.split()) for row in rows)


# A room, a file or folder right under src/fuseplan, may import the rooms on rows above its own. Rooms on one row do not
# import each other. "fuseplan" is the package's own __init__, the public API: only the doors below it may use it.
LEVELS = _rows(
    "cpython errors",
    "record",
    "arguments config compatibility graph",
    "devices distributed",
    "rules",
    "dialect",
    "providers",
    "matching",
    "caching rewriting",
    "planner",
    "verification",
    "compilation",
    "explanation",
    "frontend testing",
    "measurement",
    "fuseplan",
    "integrations",
    "workloads",
    "cli",
    "__main__",
)

# The same inside rooms that hold several things, for what stands right under them. No room has a circle in it.
INSIDE = {
    "caching": _rows("__init__ content", "fingerprint", "store"),
    "compatibility": _rows("private", "check", "__init__", "fallback"),
    "compilation": _rows(
        "__init__ analysis debug dispatch first_run home hook regions theirs", "chosen floats whole_graph", "manager"
    ),
    "explanation": _rows("__init__ capture drawing estimate", "explanation", "comparison"),
    "graph": _rows("__init__ facts legality ops", "sizes", "layout reach regions sharing surgery", "canonical"),
    "measurement": _rows("tuning", "costs", "__init__ benchmark"),
    "rules": _rows("base", "__init__", "parts", "families"),
    "workloads": _rows("__init__ models", "catalog"),
}

# What stands beside the rows: what it may import of other rooms, and who may import it.
ASIDE_IMPORTS = {"report": {"errors", "record"}, "workloads.models": set[str]()}
ASIDE_USERS = {
    # A record shows itself by its renderer.
    "report": {"record", "compilation.manager", "frontend", "integrations", "cli"},
}

# The manager is handed its agreement, as it is its prices; it doesn't fetch them.
NOT_BY_RANK = {"compilation.manager": {"distributed"}}

ROOMS = frozenset().union(*LEVELS, ASIDE_USERS)
PARTS = frozenset(f"{room}.{name}" for room, rows in INSIDE.items() for row in rows for name in row)
MODELS_MAY_USE = sys.stdlib_module_names | {"torch", "fuseplan"}
TORCH_FREE = {"cpython", "errors", "record"}
PATTERN_MATCHER = "torch._inductor.pattern_matcher"
ENVIRONMENT = {f"os.{name}" for name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")}
UNLISTED = ("devices", "graph/ops", "measurement/tuning", "rules/families", "rules/parts", "workloads/models")
"""Rooms whose __init__ has no __all__: fuseplan alone imports from them, and what they offer is what they import."""
MAX_LINES = 400
KERNELS = "providers/triton/"


def _above(name: str, rows: tuple[frozenset[str], ...]) -> frozenset[str]:
    rank = next(i for i, row in enumerate(rows) if name in row)
    return frozenset().union(*rows[:rank])


def allowed(part: str) -> frozenset[str]:
    """The rooms of fuseplan, and the parts of its own room, that `part` may import, itself included."""
    room, _, name = part.partition(".")
    if part in ASIDE_IMPORTS:
        return frozenset(ASIDE_IMPORTS[part] | {part})
    inside = {f"{room}.{each}" for each in _above(name, INSIDE[room])} if name else set()
    rooms = _above(room, LEVELS) - NOT_BY_RANK.get(part, set())
    return (
        rooms | inside | {part} | {aside for aside, users in ASIDE_USERS.items() if not users.isdisjoint({part, room})}
    )


def part_of(names: Sequence[str]) -> str:
    """A room, or what stands right under one that has an order inside: "compilation.floats".

    Args:
        names: a dotted name without "fuseplan".
    """
    room, *below = names
    if room not in INSIDE:
        return room
    is_init = not below or (len(below) == 1 and f"{room}.{below[0]}" not in PARTS)
    return f"{room}.{'__init__' if is_init else below[0]}"


@dataclass(frozen=True)
class Module:
    """One source file; `path` is relative to src/fuseplan."""

    path: str
    source: str

    @property
    def names(self) -> list[str]:
        """Of the folders that it is in, and its own."""
        return self.path.removesuffix(".py").split("/")

    @property
    def room(self) -> str:
        """The file or folder right under src/fuseplan; "fuseplan" for the package's own __init__."""
        first = self.names[0]
        return "fuseplan" if first == "__init__" else first

    @property
    def part(self) -> str:
        """The room, or what stands right under one that has an order inside."""
        return f"{self.room}.{self.names[1]}" if self.room in INSIDE else self.room

    @property
    def package(self) -> str:
        return ".".join(["fuseplan", *self.path.split("/")[:-1]])

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)


@dataclass(frozen=True)
class Import:
    """`from module import name`, `import module` (no name), or, as a use, `module.name` in an expression."""

    line: int
    module: str
    name: str | None = None
    is_use: bool = False

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def part(self) -> str | None:
        """The part of fuseplan that this reaches, None for other people's modules."""
        root, *names = self.dotted.split(".")
        if root != "fuseplan":
            return None
        # `from fuseplan import compile` reaches the public API, `from fuseplan import record` the room.
        is_api = not names or (names[0] not in ROOMS and (self.is_use or self.module == "fuseplan"))
        return "fuseplan" if is_api else part_of(names)


def imported(module: Module) -> Iterator[tuple[str, str, Import]]:
    """Every import of a module, wherever it stands: the name that it binds, what that stands for, and the import."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                yield alias.asname or root, alias.name if alias.asname else root, Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}", Import(node.lineno, base, alias.name)


def names_of(module: Module) -> dict[str, str]:
    """What each imported name stands for."""
    return {name: meaning for name, meaning, _ in imported(module)}


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, wherever it stands, and every dotted use of what was imported."""
    names = names_of(module)
    yield from (each for *_, each in imported(module))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
            yield Import(node.lineno, owner, node.attr, is_use=True)
        elif isinstance(node, ast.Call) and dotted(node.func, names) == "importlib.import_module":
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield Import(node.lineno, target.value)


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """`a.b.c` spelled with the full name of what `a` was imported as."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return None


def _within(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(f"{package}.")


def violations(module: Module) -> list[str]:
    """Every breach of the architecture in one module, as `path:line: what`."""
    room, part = module.room, module.part
    if part not in ROOMS | PARTS:
        return [f"{module.path}: {part!r} has no place in the tables of levels in tests/test_architecture.py"]
    found = set()
    for imp in imports(module):
        where = f"{module.path}:{imp.line}:"
        if (target := imp.part) is not None:
            their_room = target.partition(".")[0]
            mine, theirs = (part, target) if their_room == room else (room, their_room)
            if theirs not in allowed(part):
                known = "may not import" if theirs in ROOMS | PARTS else "imports the unknown"
                found.add(f"{where} {mine} {known} {theirs}")
        if part == "workloads.models" and imp.module.split(".")[0] not in MODELS_MAY_USE:
            found.add(f"{where} models may import torch alone, not {imp.module.split('.')[0]}")
        if room in TORCH_FREE and _within(imp.dotted, "torch"):
            found.add(f"{where} {room} may not import torch")
        if room != "matching" and _within(imp.dotted, PATTERN_MATCHER):
            found.add(f"{where} only matching may touch {PATTERN_MATCHER}")
        if room != "config" and any(_within(imp.dotted, name) for name in ENVIRONMENT):
            found.add(f"{where} only config may read the environment")
    lines = module.source.count("\n")
    if lines > MAX_LINES and not module.path.startswith(KERNELS):
        found.add(f"{module.path}: {lines} lines, over {MAX_LINES}: look for the missing noun")
    return sorted(found)


def public(init: Module) -> set[str]:
    """The public names that an __init__ binds."""
    bound = {name for name, *_ in imported(init)}
    for node in ast.walk(init.tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return {name for name in bound if not name.startswith("_")}


def unwanted(init: Module, others: Iterable[Module]) -> list[str]:
    """Names that an __init__ imports, and that neither it uses nor anybody imports from it."""
    room = ".".join(("fuseplan", *init.names[:-1]))
    last = init.names[-2]
    others = [module for module in others if last in module.source]  # to look at few
    wanted = {imp.name for module in others for imp in imports(module) if imp.module == room}
    nodes = list(ast.walk(init.tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    bound = {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return sorted(bound - used - wanted)


@cache
def source_modules() -> list[Module]:
    package = SRC / "fuseplan"
    return [
        Module(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


def circles(modules: Sequence[Module]) -> list[str]:
    """Folders and files of one folder that import each other, as `folder: names`."""
    found = []
    for folder in sorted({tuple(module.names[:depth]) for module in modules for depth in range(1, len(module.names))}):
        depth = len(folder)
        inside = [module for module in modules if tuple(module.names[:depth]) == folder]
        edges: dict[str, set[str]] = {module.names[depth]: set() for module in inside}
        for module in inside:
            for imp in imports(module):
                root, *names = imp.dotted.split(".")
                if root == "fuseplan" and not imp.is_use and tuple(names[:depth]) == folder:
                    target = names[depth] if len(names) > depth and names[depth] in edges else "__init__"
                    edges[module.names[depth]].add(target)
        try:
            list(TopologicalSorter({name: edges[name] - {name} for name in edges}).static_order())
        except CycleError as error:
            found.append(f"{'/'.join(folder)}: {' '.join(sorted(set(error.args[1])))}")
    return found


def test_imports_point_one_way() -> None:
    modules = source_modules()
    assert modules, "no source under src/fuseplan: nothing was checked"
    assert [breach for module in modules for breach in violations(module)] == []
    assert circles(modules) == []


def test_a_circle_is_found() -> None:
    one, other = "from fuseplan.matching.b import f", "def f():\n    from fuseplan.matching import a"
    assert circles([Module("matching/a.py", one), Module("matching/b.py", other)]) == ["matching: a b"]
    assert circles([Module("matching/a.py", one), Module("matching/b.py", "")]) == []


ASK_THE_PART = ("compilation", "matching", "planner", "rewriting", "verification")
ONE_OF_MANY = ("fuseplan.rules.parts.", "fuseplan.rules.families.")
OF_ALL = {f"fuseplan.rules.{name}" for name in ("parts.base", "parts.traffic", "parts.views", "families.sites")}


def named_ops(module: Module) -> list[str]:
    """The dialect ops, the parts and the families that a module names."""
    ops = ("fuseplan.graph.ops.ops", "fuseplan.dialect.ops")
    of_all = [each for each in imports(module) if each.module in ops and each.name not in dir(Dialect)]
    of_one = [each for each in imports(module) if each.module.startswith(ONE_OF_MANY) and not each.is_use]
    return [each.dotted for each in (*of_all, *of_one) if each.module not in OF_ALL]


def test_whoever_asks_the_part_names_no_op() -> None:
    asking = [module for module in source_modules() if module.room in ASK_THE_PART]
    assert {module.path: found for module in asking if (found := named_ops(module))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from fuseplan.graph.ops import ops\nx = ops.rms_norm",
        "from fuseplan.dialect import ops\nx = [ops.pad.name]",
        "from fuseplan.rules.parts.rotary.op import DRAWS",
        "from fuseplan.rules.families.attention import AttentionSite",
    ],
)
def test_a_named_op_is_seen(source: str) -> None:
    assert named_ops(Module("planner/pose.py", source))


def test_public_api_is_what_all_lists() -> None:
    init = next(module for module in source_modules() if module.path == "__init__.py")
    assert public(init) == set(fuseplan.__all__)


def test_what_rooms_import_for_others_they_import() -> None:
    inits = {module.path: module for module in source_modules()}
    further = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    others = [Module(path.as_posix(), path.read_text(encoding="utf-8")) for path in further]
    found = {room: unwanted(inits[f"{room}/__init__.py"], (*source_modules(), *others)) for room in UNLISTED}
    assert found == {room: [] for room in UNLISTED}


def test_optional_dependencies_are_not_needed() -> None:
    """Not to import the package, and no Triton for plans that are made for a machine that has it."""
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'accelerate', 'vllm', 'flashinfer', 'aiter', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import fuseplan, fuseplan.cli\n"
        "missing = [name for name in fuseplan.__all__ if not hasattr(fuseplan, name)]\n"
        "assert not missing, missing\n"
        "import torch\n"
        "from fuseplan.providers.triton import ACCEPTS\n"
        "from fuseplan.providers.triton.epilogues import SUFFIXES, epilogue_of\n"
        "from fuseplan.rules import Bindings\n"
        "for suffix in SUFFIXES:\n"
        "    epilogue_of(suffix)\n"
        "for width in (2880, 2**17):\n"
        "    x = torch.empty(1, width, dtype=torch.bfloat16, device='meta')\n"
        "    for suffix in ('static', 'dynamic'):\n"
        "        name = f'silu_and_mul_{suffix}_fp8_quant'\n"
        "        refusal = ACCEPTS[name](Bindings(name, {'gate': x, 'up': x}))\n"
        "        print(suffix, width, refusal is None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "static 2880 True", "dynamic 2880 True", "static 131072 True", "dynamic 131072 False"
    ]  # fmt: skip


# The checker itself: each breach it exists for, and the neighbour that is no breach.


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("graph/legality.py", "from fuseplan.planner import solver", "graph may not import planner"),
        ("graph/legality.py", "from ..planner.solver import solve", "graph may not import planner"),
        ("graph/legality.py", "def f():\n    import fuseplan.compilation", "graph may not import compilation"),
        ("graph/legality.py", "if TYPE_CHECKING:\n    from fuseplan import frontend", "graph may not import frontend"),
        ("graph/legality.py", "import importlib\nimportlib.import_module('fuseplan.cli')", "may not import cli"),
        ("graph/legality.py", "from fuseplan.graph import layout", "graph.legality may not import graph.layout"),
        ("graph/ops/registry.py", "from fuseplan.graph import facts", "graph.ops may not import graph.facts"),
        ("graph/facts.py", "from fuseplan.graph.gadgets import f", "graph.facts imports the unknown graph.gadgets"),
        ("rules/base.py", "from fuseplan.rules import by_name", "rules.base may not import rules.__init__"),
        ("compilation/manager.py", "from fuseplan.distributed import agree", "may not import distributed"),
        ("planner/solver.py", "from fuseplan.report import terminal", "planner may not import report"),
        ("report/html.py", "from fuseplan.config import PassConfig", "report may not import config"),
        ("workloads/models/gpt_oss.py", "import fuseplan", "workloads may not import fuseplan"),
        ("workloads/models/gpt_oss.py", "import transformers", "models may import torch alone, not transformers"),
        ("cli.py", "import fuseplan.gadgets", "cli imports the unknown gadgets"),
        ("frontend.py", "from fuseplan import explain", "frontend may not import fuseplan"),
        ("gadgets.py", "", "'gadgets' has no place in the table"),
        ("compilation/gadgets.py", "", "'compilation.gadgets' has no place in the table"),
        ("record/plan.py", "def f():\n    from torch.fx import Node", "record may not import torch"),
        ("compilation/manager.py", "import os as o\no.getenv('FUSEPLAN')", "only config may read the environment"),
        ("compilation/manager.py", "from os import environ", "only config may read the environment"),
        ("graph/facts.py", f"from {PATTERN_MATCHER} import Arg", "only matching may touch"),
        ("graph/facts.py", "import torch\ntorch._inductor.pattern_matcher.Arg", "only matching may touch"),
        ("graph/facts.py", "x = 1\n" * (MAX_LINES + 1), "over 400"),
    ],
)
def test_checker_catches(path: str, source: str, breach: str) -> None:
    assert [found for found in violations(Module(path, source)) if breach in found], violations(Module(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planner/solver.py", "from fuseplan.planner.program import IntegerProgram\nfrom . import costs"),
        ("config.py", "import os\nfrom fuseplan.record import Refusal\nos.environ.get('FUSEPLAN')"),
        ("matching/patterns.py", f"from {PATTERN_MATCHER} import Arg"),
        ("rules/families/norm.py", "from fuseplan.rules import Rule\nfrom fuseplan.rules.parts import pad"),
        ("workloads/models/gpt_oss.py", "import math\nimport torch\nfrom fuseplan.workloads.models.layers import Norm"),
        ("cli.py", "import fuseplan\nfrom fuseplan import compile, report\nfuseplan.explain.__doc__"),
        ("compilation/manager.py", "import os.path\nfrom fuseplan import planner, report, verification"),
        ("providers/triton/kernel.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_checker_allows(path: str, source: str) -> None:
    assert violations(Module(path, source)) == []


def test_checker_reads_public_names() -> None:
    source = "import os\nfrom a import b as c, d as _d\nX, _y = 1, 2\n__all__ = ['f']\ndef f(): ..."
    assert public(Module("__init__.py", source)) == {"os", "c", "X", "f"}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from fuseplan.devices import PROFILES, local_profile", []),
        ("from fuseplan import devices\n\ndevices.local_profile(devices.PROFILES)", []),
        ("from fuseplan.devices import PROFILES", ["local_profile"]),
        ("from fuseplan.devices.known import PROFILES", ["PROFILES", "local_profile"]),
    ],
)
def test_checker_finds_what_nobody_imports(source: str, names: list[str]) -> None:
    init = Module("devices/__init__.py", "from fuseplan.devices.known import PROFILES, known, local_profile\nknown()")
    assert unwanted(init, [Module("report/x.py", source)]) == names


def test_mutation_asks_files_that_there_are() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]
    packages = settings["packages"].values()
    asked = [test for each in packages for test in each["tests"]]
    asked += [test for tests in settings["imported"].values() for test in tests]
    asked += [test.partition("::")[0] for test in settings["deselected"]]
    changed = [path for each in packages for path in each["paths"]] + [*settings["imported"], *settings["without"]]
    assert [test for test in asked if not (ROOT / test).exists()] == []
    assert [path for path in changed if not (SRC / "fuseplan" / path).exists()] == []
