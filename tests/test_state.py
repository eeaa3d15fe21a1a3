"""No state at the top of modules but caches whose keys are content: what one model leaves behind no other one finds."""

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch._dynamo.utils import counters, graph_break_reasons
from torch.nn import functional as F

import fuseplan
from fuseplan.caching.content import content_of
from tests.helpers import HIDDEN, randn
from tests.test_architecture import Module, dotted, names_of, source_modules

CACHES = {
    "compatibility/__init__.py:incompatibility": "nothing: the torch that is there doesn't change while it runs",
    "caching/fingerprint.py:source_digest": "nothing: the source doesn't change while it runs",
    "devices/errors.py:sources_of": "kinds of kernels, which are few",
    "graph/facts.py:_clean_path": "text",
    "graph/facts.py:_in_place": "text",
    "graph/facts.py:_innermost": "text",
    "graph/facts.py:_is_pure_op": "ops of torch, which stay as long as the process",
    "graph/facts.py:_schema_of": "likewise",
    "graph/layout.py:_op_sees": "likewise",
    "graph/reach.py:_kind_of_op": "likewise",
    "graph/sharing.py:_is_cheap": "likewise",
    "integrations/vllm/plugin.py:_say_once": "text",
    "integrations/vllm/support.py:missing": "nothing: the vLLM that is there doesn't change while it runs",
    "matching/siblings.py:layer_of": "text",
    "planner/costs/cache.py:shipped_table": "a device; the package has the files",
    "providers/triton/launches.py:_compiled": "text",
    "providers/triton/attention.py:result_strides": "names and sizes, of 256 calls",
    "providers/triton/epilogues/__init__.py:epilogue_of": "names of files, which don't change while it runs",
    "providers/triton/launching.py:launches_early": "devices, which don't change while a process runs",
    "providers/triton/launching.py:cache_bytes": "likewise",
    "providers/triton/launching.py:multiprocessors": "likewise",
    "providers/triton/launching.py:shared_bytes": "likewise",
    "record/serialization.py:_fields": "classes of the record",
    "report/html/page.py:_script": "nothing: assets don't change while it runs",
    "report/html/page.py:_style": "nothing, likewise",
    "report/html/page.py:_template": "nothing, likewise",
}
"""What keeps results for as long as the process, and what its keys are."""

MUTATORS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove",
    "reverse", "setdefault", "sort", "update", "__setitem__", "__delitem__",
}  # fmt: skip

ELSEWHERE = {
    "integrations/vllm/backend.py": "vLLM's compiler, where the engine asks for fuseplan",
    "integrations/vllm/together.py": "vLLM's backend: workers verify together before it runs a model",
    "graph/ops/registry.py": "what torch's library was given and doesn't give back: nothing is replaced or taken out",
    "compilation/floats.py": "which floats Dynamo is to take for constants, taken back once the graph is compiled",
    "rewriting/fallbacks.py": "how Inductor lowers fuseplan's own ops, which nobody else lowers",
    "compilation/regions.py": "whose entries Dynamo holds, by content and callback: gone with the last such backend",
    "workloads/catalog.py": "sys.path: a factory is looked for in the working directory, as python -m would",
}
"""State of other packages, or what mirrors it, that is changed on purpose."""


def caches(module: Module) -> Iterator[str]:
    """Functions whose results are kept, as `path:name`."""
    names = names_of(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if dotted(called, names) in ("functools.cache", "functools.lru_cache"):
                    yield f"{module.path}:{node.name}"


def writes(module: Module) -> Iterator[str]:
    """Where a function changes something that isn't its own, as `path:line: what`."""
    for node in module.tree.body:
        yield from _writes(module, node, frozenset())


def _writes(module: Module, node: ast.AST, local: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Global):
        yield f"{module.path}:{node.lineno}: global {', '.join(node.names)}"
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        local = local | _bound(node)
    elif local:
        for target in _changed(node):
            root = target
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(root, ast.Name) and root.id not in local:
                yield f"{module.path}:{target.lineno}: {ast.unparse(target)}"
    for inner in ast.iter_child_nodes(node):
        yield from _writes(module, inner, local)


def _changed(node: ast.AST) -> list[ast.expr]:
    """What a statement or call changes in place."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return [node.func.value]
    else:
        return []
    flat = [each for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [target for target in flat if isinstance(target, (ast.Attribute, ast.Subscript))]


def _bound(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """Every name that a function binds, and a mark, so that one that binds none is a function too."""
    arguments = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
    stored = {each.id for each in ast.walk(function) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    named = {str(each.name) for each in ast.walk(function) if isinstance(each, (ast.FunctionDef, ast.ExceptHandler))}
    return frozenset({*arguments, *stored, *named, "<function>"})


def test_results_are_kept_by_content_alone() -> None:
    assert sorted(name for module in source_modules() for name in caches(module)) == sorted(CACHES)


def test_no_function_changes_what_is_not_its_own() -> None:
    found = [write for module in source_modules() for write in writes(module)]
    assert [write for write in found if write.split(":")[0] not in ELSEWHERE] == []
    assert {write.split(":")[0] for write in found} == set(ELSEWHERE)


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("X = {}\ndef f(k):\n    X[k] = 1", True),
        ("X = []\nclass A:\n    def f(self, k):\n        return [X.append(each) for each in k]", True),
        ("def f():\n    global X\n    X = 1", True),
        ("import m\ndef f():\n    m.x = 1", True),
        ("from m import x\ndef f():\n    del x['a']", True),
        ("X = {}\ndef f():\n    X['a'] += 1", True),
        ("X = {}\nf = lambda: X.setdefault(1, 2)", True),
        ("X = {}\nX['a'] = 1\ndef f():\n    return X.get(1)", False),
        ("def f(x):\n    def g():\n        x.append(1)\n    return g", False),
        ("class A:\n    def f(self):\n        self.x = 1", False),
        ("def f(xs):\n    for x in xs:\n        x.a = 1", False),
    ],
)
def test_checker_finds_writes_to_what_is_not_its_own(source: str, is_found: bool) -> None:
    assert any(writes(Module("graph/f.py", source))) == is_found


def test_checker_finds_caches() -> None:
    source = "import functools as f\nfrom functools import cache\n@f.lru_cache(3)\ndef g(): ...\n@cache\ndef h(): ..."
    assert list(caches(Module("graph/f.py", source))) == ["graph/f.py:g", "graph/f.py:h"]


def _at_the_top() -> dict[str, Any]:
    """All that modules of fuseplan have at their top and that a function could change."""
    found = {}
    has_triton, has_vllm = (importlib.util.find_spec(name) is not None for name in ("triton", "vllm"))
    for each in pkgutil.walk_packages(fuseplan.__path__, "fuseplan."):
        if each.name.startswith("fuseplan.integrations.vllm.") and not has_vllm:
            continue  # some of them import it
        if each.name.startswith("fuseplan.providers.triton.") and not has_triton:
            continue  # kernels, which nothing imports there
        for name, value in vars(importlib.import_module(each.name)).items():
            is_instance = type(value).__module__.partition(".")[0] == "fuseplan"
            if not name.startswith("__") and (is_instance or isinstance(value, (dict, list, set, tuple))):
                found[f"{each.name}.{name}"] = value
    return found


def test_nothing_at_the_top_of_a_module_changes_with_use() -> None:
    of_torch = counters, graph_break_reasons  # imported
    values = {name: value for name, value in _at_the_top().items() if not any(value is each for each in of_torch)}
    known = {"fuseplan.rules.families.BUILT_IN_RULES", "fuseplan.devices.known.PROFILES", "fuseplan.dialect.ops"}
    assert known <= set(values)
    before = {name: content_of(value).digest for name, value in values.items()}
    for config in (fuseplan.PassConfig(), fuseplan.PassConfig(policy="ordered(act_padding)")):
        report = fuseplan.explain(padded, randn(4, HIDDEN), randn(HIDDEN), config=config, device="h200")
        assert report.matched["act_padding"]
    after = {name: content_of(value).digest for name, value in values.items()}
    assert [name for name in values if before[name] != after[name]] == []


def padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(F.rms_norm(x, (HIDDEN,), weight), (0, 8))
