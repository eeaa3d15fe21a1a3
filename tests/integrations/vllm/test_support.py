"""Which vLLM the plugin serves, by stand-ins for others: engines of all of them start, and one line says with what."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform

import fuseplan
import fuseplan.integrations.vllm
from fuseplan.compatibility import PrivateApi
from fuseplan.integrations.vllm import plugin, support
from fuseplan.integrations.vllm.backend import OURS, STOCK, offer_pass_manager
from fuseplan.integrations.vllm.plugin import HOOK, KEY, PASS_NAME, asked_for
from fuseplan.integrations.vllm.reports import Journal
from tests.compatibility.moved import change, hide
from tests.integrations.vllm.conftest import ASKED, NAMED, Configure, told
from tests.test_architecture import Module, dotted, names_of

SOURCE = Path(fuseplan.integrations.vllm.__file__).parent
MODULES = [Module(f"integrations/vllm/{path.name}", path.read_text(encoding="utf-8")) for path in SOURCE.glob("*.py")]
Records = list[logging.LogRecord]


@pytest.fixture(autouse=True)
def _looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found about a stand-in doesn't stay, and neither does what was put in its place."""
    found = Platform.__dict__["get_pass_manager_cls"]
    monkeypatch.setattr(type(current_platform), "get_pass_manager_cls", found, raising=False)
    for cached in (support.missing, plugin._say_once):
        cached.cache_clear()
    yield
    for cached in (support.missing, plugin._say_once):
        cached.cache_clear()


def name(api: PrivateApi) -> str:
    return api.dotted


def check_told(records: Records, api: PrivateApi) -> None:
    """One line names what is gone, or what stands beside it and went with it, and what vLLM does now."""
    text = told(records, logging.WARNING)
    assert f"lacks interfaces that fuseplan needs: {api.module}.{api.attributes[0]}" in text
    assert " is gone" in text
    assert text.endswith("; vLLM runs without it")


@pytest.mark.parametrize("api", support.INTERFACES, ids=name)
def test_what_is_gone_or_takes_other_arguments_is_found(api: PrivateApi, monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.missing((api,)) is None
    lacks = f"vLLM {vllm.__version__} lacks interfaces that fuseplan needs: {api.dotted}"
    for make, what in ((change, "takes other arguments"), (hide, "is gone")):
        if make is hide or api.args is not None:
            support.missing.cache_clear()
            with monkeypatch.context() as patch:
                make(patch, api)
                assert str(support.missing((api,))).startswith(f"{lacks} {what}")


def test_only_the_first_of_many_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, next(each for each in support.BACKEND if each.dotted.endswith("PostGradPassManager.__call__")))
    found = str(support.missing(support.BACKEND))
    assert found.count("PostGradPassManager.") == found.count(" is gone") == support.SHOWN
    assert found.endswith(", and 1 more")


def test_everything_that_is_imported_of_vllm_is_in_the_list() -> None:
    listed = {each.dotted for each in support.INTERFACES}
    found = set()
    for module in MODULES:
        names = names_of(module)
        used = {f"{node.module}.{alias.name}" for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names}  # fmt: skip
        used |= {dotted(node, names) or "" for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
        found |= {each for each in used if each.startswith("vllm.") and each != "vllm.__version__"}
    assert found
    undeclared = [
        each for each in found if not any(f"{api}.".startswith(f"{each}.") or each.startswith(api) for api in listed)
    ]
    assert undeclared == []


def test_everything_in_the_list_is_used() -> None:
    used = set()
    for module in MODULES:
        for node in ast.walk(module.tree):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {node.name} if isinstance(node, ast.FunctionDef) else set()
            used |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
            used |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    assert [each.dotted for each in support.INTERFACES if each.attributes[-1] not in used] == []


@pytest.mark.parametrize(
    ("release", "beside", "line"),
    [
        ("0.21.3", "2.11.0", "vLLM 0.21.3 is too old: it needs 0.22 or newer"),
        ("0.9.2", "2.13.0+cpu", "vLLM 0.9.2 is too old: it needs 0.22 or newer"),
        ("0.32.0", "2.10.1+cu130", "torch 2.10.1+cu130 is too old: it needs 2.11 or newer"),
    ],
)
@pytest.mark.parametrize("way", ["environment", "configuration", "name"])
def test_older_versions_run_without_fuseplan(
    release: str, beside: str, line: str, way: str, configure: Configure, lines: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm, "__version__", release)
    monkeypatch.setattr(torch, "__version__", beside)
    stock = configure()
    if way == "environment":
        monkeypatch.setenv(*next(iter(ASKED.items())))
    asked: dict[str, Any] = {"configuration": {"additional_config": {KEY: {}}}, "name": {"compilation_config": NAMED}}
    for _ in range(2):
        config = configure(**asked.get(way, {}))
        assert asked_for(config) is None
        assert HOOK not in config.compilation_config.inductor_compile_config
        assert config.compute_hash() == stock.compute_hash(), "the cache is that of stock vLLM"
    said = told(lines, logging.WARNING)
    assert said == f"fuseplan {fuseplan.__version__} does nothing: {line}; vLLM runs without it"


@pytest.mark.parametrize(
    ("release", "beside", "is_tried"),
    [
        ("0.32.0", "2.13.0+cpu", True), ("0.32.1", "2.13.1", True), ("0.22.1", "2.11.0+cu130", True),
        ("0.22.1", "2.13.0+cu130", False), ("0.23.0", "2.11.0+cu130", False), ("0.32.0", "2.14.0", False),
        ("0.40.0rc1", "2.15.0", False), ("0.1.dev1+g1234567", "2.13.0", False), ("dev", "2.13.0", False),
    ],
)  # fmt: skip
def test_versions_that_were_not_tried_are_told(
    release: str, beside: str, is_tried: bool, configure: Configure, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", release)
    monkeypatch.setattr(torch, "__version__", beside)
    assert asked_for(configure(additional_config={KEY: {}})) == fuseplan.PassConfig()
    text = told(lines, logging.INFO if is_tried else logging.WARNING)
    assert text.startswith(f"fuseplan {fuseplan.__version__} is the post-grad pass of vLLM {release} (torch {beside})")
    assert ("not tried with them: vLLM 0.22 with torch 2.11 and 0.32 with torch 2.13 are" in text) is not is_tried


def test_the_tests_are_run_on_what_is_called_tried() -> None:
    assert support.tried()


def test_a_torch_that_moved_is_told(configure: Configure, lines: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "incompatibility", lambda: "torch 2.20.0 has changed private interfaces")
    assert asked_for(configure(additional_config={KEY: {}})) is None
    said = told(lines, logging.WARNING)
    assert "does nothing: torch 2.20.0 has changed private interfaces; vLLM runs without it" in said


@pytest.mark.parametrize("api", support.CONFIGURATION, ids=name)
def test_an_engine_without_an_interface_starts(
    api: PrivateApi, configure: Configure, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    config.additional_config[KEY] = {}
    hide(monkeypatch, api)
    plugin.adopt(config)
    assert asked_for(config) is None
    check_told(lines, api)


@pytest.mark.parametrize("api", support.HOOKS, ids=name)
def test_a_vllm_that_can_not_be_hooked_into_is_told(
    api: PrivateApi, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(fuseplan, PASS_NAME, raising=False)
    hide(monkeypatch, api)
    plugin.hook_into_vllm()
    check_told(lines, api)


@pytest.mark.parametrize("api", support.WORKER, ids=name)
def test_a_worker_without_an_interface_starts(
    api: PrivateApi, configure: Configure, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(additional_config={KEY: {}})
    del lines[:]
    hide(monkeypatch, api)
    worker = SimpleNamespace(vllm_config=config, compile_or_warm_up_model=print)
    plugin._prepare(worker)
    assert worker.compile_or_warm_up_model is print
    assert HOOK not in config.compilation_config.inductor_compile_config
    check_told(lines, api)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "kept.json", tmp_path / "report.json", 0)


def test_the_backend_is_given_the_pass_manager(journal: Journal, lines: Records) -> None:
    assert current_platform.get_pass_manager_cls() == STOCK
    for _ in range(2):
        offer_pass_manager(journal, lambda: None)
        assert current_platform.get_pass_manager_cls() == OURS
    assert not lines


@pytest.mark.parametrize("api", support.BACKEND, ids=name)
def test_a_backend_without_an_interface_keeps_its_own(
    api: PrivateApi, journal: Journal, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, api)
    offer_pass_manager(journal, lambda: None)
    assert [current_platform.get_pass_manager_cls() for _ in range(2)] == [STOCK, STOCK]
    journal.close()
    check_told(lines, api)


def test_a_platform_with_a_pass_manager_of_its_own_keeps_it(
    journal: Journal, lines: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = classmethod(lambda cls: "elsewhere.PassManager")
    monkeypatch.setattr(type(current_platform), "get_pass_manager_cls", own)
    offer_pass_manager(journal, lambda: None)
    assert current_platform.get_pass_manager_cls() == "elsewhere.PassManager"
    said = told(lines, logging.WARNING)
    assert "the platform has a pass manager of its own (elsewhere.PassManager)" in said
