"""The direction of imports, read from the source of every module under src/fuseplan.

Imports inside functions and under TYPE_CHECKING count like any other: what a module knows of is the same.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from fuseplan.ops import Dialect

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# A part may import the parts on rows above its own. Parts on one row do not import each other.
# "fuseplan" is the package's own __init__, the public API: only the doors below it may use it.
LEVELS: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        "cpython errors",
        "record",
        "config compatibility regions",
        "content devices ops graph fallback",
        "canonical rules distributed",
        "parts",
        "families",
        "dialect",
        "providers",
        "matching",
        "planner fingerprint",
        "verification rewriting",
        "tuning analysis debug drawing estimate",
        "manager",
        "capture store dispatch first_run floats",
        "explanation",
        "comparison frontend measurement testing",
        "benchmark",
        "fuseplan",
        "integrations",
        "workloads",
        "cli",
        "__main__",
    )
)

# Parts beside the rows: what they may import, and who may import them.
ASIDE_IMPORTS = {"report": {"errors", "record"}, "models": set[str]()}
ASIDE_USERS = {
    # A record shows itself by its renderer.
    "report": {"record", "manager", "capture", "frontend", "workloads", "fuseplan", "integrations", "cli"},
    "models": {"workloads"},
}

# The manager is handed its prices and its agreement; it doesn't fetch them.
NOT_BY_RANK = {"manager": {"tuning", "distributed"}}

KNOWN = frozenset().union(*LEVELS, ASIDE_IMPORTS)
MODELS_MAY_USE = sys.stdlib_module_names | {"torch", "fuseplan"}
TORCH_FREE = {"cpython", "errors", "record"}
PATTERN_MATCHER = "torch._inductor.pattern_matcher"
ENVIRONMENT = {f"os.{name}" for name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")}
MAX_LINES = 400
KERNELS = "providers/triton/"


def allowed(part: str) -> frozenset[str]:
    """The parts of fuseplan that `part` may import, itself included."""
    if part in ASIDE_IMPORTS:
        return frozenset(ASIDE_IMPORTS[part] | {part})
    rank = next(i for i, row in enumerate(LEVELS) if part in row)
    below = frozenset().union(*LEVELS[:rank]) - NOT_BY_RANK.get(part, set())
    return below | {part} | {aside for aside, users in ASIDE_USERS.items() if part in users}


@dataclass(frozen=True)
class Module:
    """One source file; `path` is relative to src/fuseplan."""

    path: str
    source: str

    @property
    def part(self) -> str:
        """The file or folder right under src/fuseplan; "fuseplan" for the package's own __init__."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "fuseplan" if first == "__init__" else first

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
        root, _, rest = self.dotted.partition(".")
        if root != "fuseplan":
            return None
        first = rest.split(".")[0]
        # `from fuseplan import compile` reaches the public API, `from fuseplan import record` the part.
        is_api = first not in KNOWN and (self.is_use or self.module == "fuseplan")
        return "fuseplan" if is_api else first


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
        elif isinstance(node, ast.Call) and node.args and _is_dynamic_import(node.func, names):
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


def _is_dynamic_import(func: ast.expr, names: dict[str, str]) -> bool:
    builtin = isinstance(func, ast.Name) and func.id == "__import__"
    return builtin or dotted(func, names) == "importlib.import_module"


def _within(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(f"{package}.")


def violations(module: Module) -> list[str]:
    """Every breach of the architecture in one module, as `path:line: what`."""
    part = module.part
    if part not in KNOWN:
        return [f"{module.path}: {part!r} has no place in the table of levels in tests/test_architecture.py"]
    found = set()
    for imp in imports(module):
        where = f"{module.path}:{imp.line}:"
        if (target := imp.part) is not None and target not in allowed(part):
            known = "may not import" if target in KNOWN else "imports the unknown"
            found.add(f"{where} {part} {known} {target}")
        if part == "models" and imp.module.split(".")[0] not in MODELS_MAY_USE:
            found.add(f"{where} models may import torch alone, not {imp.module.split('.')[0]}")
        if part in TORCH_FREE and _within(imp.dotted, "torch"):
            found.add(f"{where} {part} may not import torch")
        if part != "matching" and _within(imp.dotted, PATTERN_MATCHER):
            found.add(f"{where} only matching may touch {PATTERN_MATCHER}")
        if part != "config" and any(_within(imp.dotted, name) for name in ENVIRONMENT):
            found.add(f"{where} only config may read the environment")
    lines = module.source.count("\n")
    if lines > MAX_LINES and not module.path.startswith(KERNELS):
        found.add(f"{module.path}: {lines} lines, over {MAX_LINES}: look for the missing noun")
    return sorted(found)


def unlisted(init: Module) -> list[str]:
    """Public names that an __init__ binds and __all__ lacks, and the reverse."""
    bound: set[str] = set()
    listed: set[str] = set()
    for node in ast.walk(init.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (target.id for target in targets if isinstance(target, ast.Name)):
                if name == "__all__" and node.value is not None:
                    listed.update(ast.literal_eval(node.value))
                else:
                    bound.add(name)
    public = {name for name in bound if not name.startswith("_")}
    return sorted((public - listed) | (listed - bound))


@cache
def source_modules() -> list[Module]:
    package = SRC / "fuseplan"
    return [
        Module(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


def test_imports_point_one_way() -> None:
    modules = source_modules()
    assert modules, "no source under src/fuseplan: nothing was checked"
    assert [breach for module in modules for breach in violations(module)] == []


ASK_THE_PART = ("analysis", "manager", "matching", "planner", "rewriting", "verification")
ONE_OF_MANY = ("fuseplan.parts.", "fuseplan.families.")
OF_ALL = {f"fuseplan.{name}" for name in ("parts.base", "parts.traffic", "parts.views", "families.sites")}


def named_ops(module: Module) -> list[str]:
    """The dialect ops, the parts and the families that a module names."""
    ops = ("fuseplan.ops.ops", "fuseplan.dialect.ops")
    found = [each.dotted for each in imports(module) if each.module in ops and each.name not in dir(Dialect)]
    return found + [
        each.dotted
        for each in imports(module)
        if each.module.startswith(ONE_OF_MANY) and each.module not in OF_ALL and not each.is_use
    ]


def test_whoever_asks_the_part_names_no_op() -> None:
    named = {
        module.path: found
        for module in source_modules()
        if module.part in ASK_THE_PART and (found := named_ops(module))
    }
    assert named == {}


@pytest.mark.parametrize(
    "source",
    [
        "from fuseplan.ops import ops\nx = ops.rms_norm",
        "from fuseplan.dialect import ops\nx = [ops.pad.name]",
        "from fuseplan.parts.pad import pad",
        "from fuseplan.parts.rotary.op import DRAWS",
        "from fuseplan.families.attention import AttentionSite",
    ],
)
def test_a_named_op_is_seen(source: str) -> None:
    assert named_ops(Module("planner/pose.py", source))


def test_public_api_is_what_all_lists() -> None:
    init = next(module for module in source_modules() if module.path == "__init__.py")
    assert unlisted(init) == []


def test_imports_without_optional_dependencies() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'accelerate', 'vllm', 'flashinfer', 'aiter', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import fuseplan, fuseplan.cli\n"
        "missing = [name for name in fuseplan.__all__ if not hasattr(fuseplan, name)]\n"
        "assert not missing, missing\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# The checker itself: each breach it exists for, and the neighbour that is no breach.


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("graph/legality.py", "from fuseplan.planner import solver", "graph may not import planner"),
        ("graph/legality.py", "from ..planner.solver import solve", "graph may not import planner"),
        ("graph/legality.py", "from .. import planner", "graph may not import planner"),
        ("graph/legality.py", "def f():\n    import fuseplan.manager", "graph may not import manager"),
        ("graph/legality.py", "if TYPE_CHECKING:\n    from fuseplan import manager", "graph may not import manager"),
        ("graph/legality.py", "import importlib\nimportlib.import_module('fuseplan.cli')", "may not import cli"),
        ("rules/padding.py", "from fuseplan.providers import available", "rules may not import providers"),
        ("ops/registry.py", "from fuseplan.graph import facts", "ops may not import graph"),
        ("record/plan.py", "from fuseplan.config import Policy", "record may not import config"),
        ("manager.py", "from fuseplan.distributed import agree", "manager may not import distributed"),
        ("manager.py", "from fuseplan.tuning import measure", "manager may not import tuning"),
        ("planner/solver.py", "from fuseplan.report import terminal", "planner may not import report"),
        ("report/html.py", "from fuseplan.config import PassConfig", "report may not import config"),
        ("models/gpt_oss.py", "from fuseplan.dialect import ops", "models may not import dialect"),
        ("models/gpt_oss.py", "import transformers", "models may import torch alone, not transformers"),
        ("integrations/vllm.py", "from fuseplan import cli", "integrations may not import cli"),
        ("cli.py", "import fuseplan.gadgets", "cli imports the unknown gadgets"),
        ("frontend.py", "from fuseplan import explain", "frontend may not import fuseplan"),
        ("gadgets/__init__.py", "", "'gadgets' has no place in the table"),
        ("gadgets.py", "", "'gadgets' has no place in the table"),
        ("errors.py", "import torch", "errors may not import torch"),
        ("record/plan.py", "def f():\n    from torch.fx import Node", "record may not import torch"),
        ("manager.py", "import os\nos.environ['FUSEPLAN']", "only config may read the environment"),
        ("manager.py", "import os as o\no.getenv('FUSEPLAN')", "only config may read the environment"),
        ("manager.py", "from os import environ", "only config may read the environment"),
        ("graph/f.py", "from torch._inductor import pattern_matcher", "only matching may touch"),
        ("graph/f.py", f"from {PATTERN_MATCHER} import Arg", "only matching may touch"),
        ("graph/f.py", "import torch\ntorch._inductor.pattern_matcher.Arg", "only matching may touch"),
        ("graph/f.py", "x = 1\n" * (MAX_LINES + 1), "over 400"),
    ],
)
def test_checker_catches(path: str, source: str, breach: str) -> None:
    assert [found for found in violations(Module(path, source)) if breach in found], violations(Module(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from fuseplan.frontend import compile"),
        ("planner/solver.py", "from fuseplan.planner.problem import Problem\nfrom . import costs"),
        (
            "planner/solver.py",
            "import torch\nfrom fuseplan.graph import legality\nfrom fuseplan.errors import UserError",
        ),
        ("config.py", "import os\nfrom fuseplan.record import Refusal\nos.environ.get('FUSEPLAN')"),
        ("matching/patterns.py", f"from {PATTERN_MATCHER} import Arg"),
        ("report/html.py", "import rich\nfrom fuseplan.record import Plan\nfrom fuseplan.errors import UserError"),
        ("models/gpt_oss.py", "import math\nimport torch\nfrom fuseplan.models.layers import RMSNorm"),
        ("workloads.py", "from fuseplan.models import gpt_oss\nfrom fuseplan.frontend import explain"),
        ("cli.py", "import fuseplan\nfrom fuseplan import compile, report\nfuseplan.explain.__doc__"),
        ("manager.py", "import os.path\nfrom fuseplan import planner, report, verification"),
        ("providers/triton/kernel.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_checker_allows(path: str, source: str) -> None:
    assert violations(Module(path, source)) == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from fuseplan.frontend import compile\n__all__ = ['compile']", []),
        ("from fuseplan.frontend import compile, explain\n__all__ = ['compile']", ["explain"]),
        ("from fuseplan.frontend import compile\n__all__ = ['compile', 'tune']", ["tune"]),
        ("import os\n__version__ = '1'\n__all__ = ['__version__']", ["os"]),
        ("from importlib.metadata import version as _version\n__all__: list[str] = []", []),
    ],
)
def test_checker_reads_all(source: str, names: list[str]) -> None:
    assert unlisted(Module("__init__.py", source)) == names
