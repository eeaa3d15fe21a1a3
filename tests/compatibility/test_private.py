"""The list of private interfaces: complete, no longer than what is used, and each entry of it is looked for."""

import sys
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.fx import traceback as fx_traceback

from fuseplan.compatibility import ASIDE, PRIVATE_APIS, TRACED, PrivateApi, find_moved
from fuseplan.explanation.capture import capture
from tests.compatibility.moved import change, hide
from tests.compatibility.uses import keys, undeclared, unused
from tests.test_architecture import PARTS, ROOMS, Module, source_modules

SOURCE = [module for module in source_modules() if module.part not in ("compatibility.check", "compatibility.private")]
CALLED = [each for each in PRIVATE_APIS if each.args is not None]


def test_this_torch_has_everything() -> None:
    assert [str(each) for each in find_moved(PRIVATE_APIS)] == []


@pytest.mark.parametrize("api", PRIVATE_APIS, ids=lambda api: api.dotted)
def test_what_is_gone_is_found(api: PrivateApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, api)
    moved = find_moved(PRIVATE_APIS)
    assert f"{api.dotted} is gone" in [str(each) for each in moved]
    assert {each.api.module for each in moved} == {api.module}


@pytest.mark.parametrize("api", CALLED, ids=lambda api: api.dotted)
def test_other_arguments_are_found(api: PrivateApi, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, api)
    moved = find_moved(PRIVATE_APIS)
    assert [each.api.dotted for each in moved if "takes other arguments" in str(each)] == [api.dotted]


@pytest.mark.parametrize("module", sorted({each.module for each in PRIVATE_APIS} - {"torch"}))
def test_a_module_that_is_gone_is_found(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    expected = [each.dotted for each in PRIVATE_APIS if each.module == module]
    moved = find_moved(PRIVATE_APIS)
    assert [each.api.dotted for each in moved] == expected
    assert all("can't be imported (import of" in str(each) for each in moved)


def test_something_that_can_not_be_called_any_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "reset", "no function")
    assert [str(each) for each in find_moved(PRIVATE_APIS)] == ["torch._dynamo.reset can't be called any more"]


@pytest.mark.parametrize("can_be_made", [True, False])
def test_a_class_without_its_instances_attribute_is_found(can_be_made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that can't be looked at, since it is made another way."""

    class Graph:
        _find_nodes_lookup_table = _graph_namespace = _len = None
        _target_to_str = torch.fx.Graph._target_to_str

        def __init__(self) -> None:
            if not can_be_made:
                raise RuntimeError("make me another way")

    monkeypatch.setattr(torch.fx, "Graph", Graph)
    assert [str(each) for each in find_moved(PRIVATE_APIS)] == ["torch.fx.Graph._root is gone"]


def test_everything_that_is_used_is_in_the_list() -> None:
    assert SOURCE
    assert undeclared(SOURCE, PRIVATE_APIS) == []


def test_everything_in_the_list_is_used_by_whom_it_says() -> None:
    assert unused(SOURCE, PRIVATE_APIS) == []
    assert {user for each in PRIVATE_APIS for user in each.users} <= ROOMS | PARTS
    assert ASIDE <= ROOMS


def test_no_entry_is_there_twice() -> None:
    assert len({each.path for each in PRIVATE_APIS}) == len(PRIVATE_APIS)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch._inductor import fresh", "torch._inductor.fresh"),
        ("def f():\n    import torch._fresh.thing", "torch._fresh.thing"),
        ("import torch\ntorch._dynamo.fresh()", "torch._dynamo.fresh"),
        ("from torch.fx.experimental import fresh", "torch.fx.experimental.fresh"),
        ("import torch\nops = torch.ops._fresh\nops.thing", "torch.ops._fresh.thing"),
        ("from torch._inductor import config as c\nc.patch(fresh=1)", "torch._inductor.config.fresh"),
        ("def f(node):\n    return node._fresh", "_fresh"),
        # In the list, but not for this part.
        ("from torch._dynamo.utils import counters", "torch._dynamo.utils.counters"),
    ],
)
def test_the_scan_finds_what_is_not_in_the_list(source: str, found: str) -> None:
    assert f"rules/fresh.py: {found}" in undeclared([Module("rules/fresh.py", source)], PRIVATE_APIS)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch import fx\ntorch.__version__\nfx.Graph().nodes",
        "class A:\n    def f(self):\n        return self._own, self.__class__.__name__",
        "def f(op):\n    return op._schema",
    ],
)
def test_the_scan_lets_the_rest_be(source: str) -> None:
    assert undeclared([Module("rules/fresh.py", source)], PRIVATE_APIS) == []


def test_the_scan_finds_what_is_not_used() -> None:
    api = PrivateApi("torch._inductor:fresh", ("rules",))
    assert unused([Module("rules/fresh.py", "import torch")], [api]) == ["rules: torch._inductor:fresh"]


def test_the_keys_of_metadata_are_in_the_list() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for module in SOURCE:
        for key in keys(module):
            found[key].add(module.room)
    assert {key: {user.partition(".")[0] for user in users} for key, users in TRACED.items()} == found


def test_torch_writes_the_keys_of_metadata_that_are_read() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            with fx_traceback.annotate({"stream": 0}):
                y: Tensor = self.norm(x)
            return y.add_(1)

    traced = capture(Model(), (torch.randn(4, 8),), {}, dynamic=False)
    graphs = [gm.graph for gm in traced.graphs]

    def keep(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(Model(), backend=keep)(torch.randn(4, 8))
    written = {key for graph in graphs for node in graph.nodes for key in node.meta}
    assert set(TRACED) - written == set()
