"""Which private interfaces of torch a source file uses, read from its text."""

import ast
import functools
from collections.abc import Iterable

from fuseplan.compatibility import PrivateApi
from fuseplan.graph.canonical.view import PROVENANCE
from tests.test_architecture import Module, dotted


def is_private(dotted: str) -> bool:
    """Whether a dotted name is torch's and has no promise of staying."""
    parts = dotted.split(".")
    is_dunder = parts[-1].startswith("__")
    return parts[0] == "torch" and (
        dotted.startswith("torch.fx.experimental") or (not is_dunder and any(part.startswith("_") for part in parts))
    )


@functools.cache
def paths(module: Module) -> frozenset[str]:
    """The private names that a file imports or spells out, each as far as it goes."""
    found: set[str] = set()
    names = {"torch": "torch"}
    nodes = tuple(ast.walk(module.tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= _aliases(node, names)
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := dotted(node, names)):
            found.add(name)
        elif isinstance(node, ast.Call) and (function := dotted(node.func, names) or "").endswith("config.patch"):
            found |= {f"{function.removesuffix('.patch')}.{keyword.arg}" for keyword in node.keywords}
    private = {dotted for dotted in found if is_private(dotted)}
    return frozenset(each for each in private if not any(other.startswith(f"{each}.") for other in private))


def _aliases(node: ast.Assign, names: dict[str, str]) -> dict[str, str]:
    """`ops = torch.ops.aten`, also several at once. What is below other values is seldom torch's own."""
    targets, values = [each.elts if isinstance(each, ast.Tuple) else [each] for each in (node.targets[0], node.value)]
    pairs = zip(targets, values, strict=False)
    found = {left.id: dotted(right, names) or "" for left, right in pairs if isinstance(left, ast.Name)}
    return {name: path for name, path in found.items() if path.startswith("torch.ops")}


@functools.cache
def attributes(module: Module) -> frozenset[str]:
    """The private attributes of other objects than `self` that a file reads."""
    return frozenset(
        node.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    )


@functools.cache
def texts(module: Module) -> frozenset[str]:
    """All texts in a file."""
    return frozenset(
        node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def undeclared(modules: Iterable[Module], apis: Iterable[PrivateApi]) -> list[str]:
    """What is used and not in the list, as `path: what`."""
    apis = list(apis)
    found = []
    for module in modules:
        mine = [each for each in apis if not {module.room, module.part}.isdisjoint(each.users)]
        found += [
            f"{module.path}: {path}"
            for path in paths(module)
            if not any(each.dotted == path or each.dotted.startswith(f"{path}.") for each in mine)
        ]
        known = {name for each in mine for name in each.dotted.split(".")}
        found += [f"{module.path}: {name}" for name in attributes(module) - known]
    return sorted(found)


def unused(modules: Iterable[Module], apis: Iterable[PrivateApi]) -> list[str]:
    """What is in the list and not used by whom it says, as `room: what`."""
    modules = list(modules)
    return sorted(
        f"{user}: {each.path}"
        for each in apis
        for user in each.users
        if not any(_uses(module, each) for module in modules if user in (module.room, module.part))
    )


def _uses(module: Module, api: PrivateApi) -> bool:
    """What stands below a private class or module is public by name: whoever uses that, or has the name as a text, is
    believed.
    """
    ways = paths(module)
    if any(api.dotted == way or api.dotted.startswith(f"{way}.") for way in ways):
        return True
    return api.attributes[-1] in attributes(module) | texts(module)


def keys(module: Module) -> set[str]:
    """The keys of `Node.meta` that a file reads or writes."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Subscript) and _is_meta(node.value) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_meta(node.func.value):
            found.update(str(each.value) for each in node.args[:1] if isinstance(each, ast.Constant))
        elif isinstance(node, ast.Name) and node.id == "PROVENANCE":
            found.update(PROVENANCE)
    return found


def _is_meta(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"
