"""Files from outside are data: nothing in the source can run them, and no path makes a reader wait."""

import ast
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuseplan.cli import app
from fuseplan.errors import ConfigError, FuseplanError, LockError, PlanError, WorkloadError
from fuseplan.integrations import transformers as huggingface
from fuseplan.planner.costs import CostTable
from fuseplan.planner.costs.table import LARGEST_BYTES as LARGEST_TABLE
from fuseplan.record import SavedPlans
from fuseplan.record.plan import LARGEST_BYTES as LARGEST_PLANS
from fuseplan.record.report import MOST_LAYERS
from fuseplan.report.lock import LARGEST_BYTES as LARGEST_LOCK
from fuseplan.report.lock import FusionLock
from fuseplan.workloads import catalog
from tests.lines import one_line
from tests.test_architecture import Module, _within, dotted, imports, names_of, source_modules

RUN_WHAT_THEY_READ = (
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code",
    "codeop", "pydoc", "pkgutil.resolve_name", "pkgutil.walk_packages", "pkgutil.get_data", "importlib.machinery",
    "importlib.util.spec_from_file_location", "importlib.util.module_from_spec", "torch.load", "torch.jit.load",
    "torch.export.load", "torch.package", "torch.hub", "numpy.load", "subprocess", "os.system", "os.popen",
)  # fmt: skip
"""Modules and functions that run, or let run, what is in a file or a text."""

BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}

DYNAMIC_IMPORTS = {
    ("__init__.py", "__getattr__"): "a name of fuseplan's own table, in its own modules",
    ("compatibility/check.py", "_wrong"): "the modules of torch that the list of private interfaces names",
    ("rules/parts/__init__.py", "_found"): "fuseplan's own modules in that folder",
    ("providers/triton/epilogues/__init__.py", "epilogue_of"): "fuseplan's own modules in that folder",
    ("workloads/catalog.py", "import_module"): "the module of a factory or of --rules, which the user asks to be run",
}
WRITTEN_HERE = {f"providers/triton/launches.py: {name}" for name in ("compile", "exec")}
"""Launches, of names that are numbered there and of offsets: what runs text that it has written itself, and nothing of
what it was given.
"""


def what_runs_text(module: Module) -> Iterator[str]:
    """Each use of something that runs what it reads, as `path:line: what`."""
    own = {node.name for node in module.tree.body if isinstance(node, ast.FunctionDef)}
    for each in imports(module):
        if any(_within(each.dotted, name) or _within(each.module, name) for name in RUN_WHAT_THEY_READ):
            yield f"{module.path}:{each.line}: {each.dotted}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS - own:
            yield f"{module.path}:{node.lineno}: {node.func.id}"


def dynamic_imports(module: Module) -> set[tuple[str, str]]:
    """Functions in which a module is imported whose name isn't written there."""
    names = names_of(module)
    return {
        (module.path, function.name)
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and dotted(node.func, names) == "importlib.import_module"
        and not isinstance(node.args[0], ast.Constant)
    }


def test_nothing_runs_what_it_reads() -> None:
    found = {re.sub(r":\d+:", ":", use) for module in source_modules() for use in what_runs_text(module)}
    assert found == WRITTEN_HERE


def test_one_place_imports_what_a_user_names() -> None:
    found = set[tuple[str, str]]().union(*map(dynamic_imports, source_modules()))
    assert found == set(DYNAMIC_IMPORTS)


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("def f():\n    from pickle import loads", True),
        ("from torch import load", True),
        ("import torch as t\nt.jit.load('x')", True),
        ("def f(text):\n    return exec(text)", True),
        ("import importlib\nimportlib.import_module('yaml')", True),
        ("import torch\ntorch.compile(f)", False),
        ("def compile(): ...\ndef g():\n    compile()", False),
    ],
)
def test_checker_finds_what_runs_text(source: str, is_found: bool) -> None:
    assert any(what_runs_text(Module("graph/f.py", source))) == is_found


def test_checker_finds_imports_of_what_is_not_written_there() -> None:
    source = "import importlib as i\ndef f(name):\n    i.import_module(name)\ndef g():\n    i.import_module('json')"
    assert dynamic_imports(Module("graph/f.py", source)) == {("graph/f.py", "f")}


READERS: dict[str, tuple[Callable[[Path], object], type[FuseplanError], int]] = {
    "plan file": (SavedPlans.load, PlanError, LARGEST_PLANS),
    "cost table": (CostTable.load, ConfigError, LARGEST_TABLE),
    "lock file": (FusionLock.load, LockError, LARGEST_LOCK),
    "Hugging Face configuration": (huggingface.load_config, WorkloadError, huggingface.LARGEST_BYTES),
}


@pytest.mark.parametrize("name", READERS)
def test_no_path_makes_a_reader_wait(name: str, tmp_path: Path) -> None:
    read, error, largest = READERS[name]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "config.json").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(largest + 1)
    (tmp_path / "deep").write_text("[" * 200_000)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    start = time.monotonic()
    for path, says in (
        (tmp_path / "pipe", "can't be read: It is a pipe, socket or device, not a file"),
        (Path("/dev/zero"), "can't be read: It is a pipe, socket or device, not a file"),
        (tmp_path, "can't be read: Is a directory"),
        (tmp_path / "circle", "can't be read: Too many levels of symbolic links"),
        (tmp_path / "nowhere", "can't be read: No such file or directory"),
        (tmp_path / "large", f"it has more than {largest} bytes"),
        (tmp_path / "deep", "it is nested more than 64 deep"),
        (tmp_path / "binary", "it isn't UTF-8"),
        (Path("a\0b"), "embedded null byte"),
    ):
        with pytest.raises(error, match=f"^{name}.*{re.escape(says)}") as caught:
            read(path)
        assert str(caught.value).isprintable()
    assert time.monotonic() - start < 60


CONTENTS = {
    '{"schema": 1, "a": {"x": 1, "x": 2}}': "'x' is there twice in one object",
    '{"schema": %s}' % ("9" * 5000): "more than 40 digits",
    '{"schema": 1, "tp": NaN}': "NaN isn't a number of JSON",
}


@pytest.mark.parametrize("name", READERS)
def test_names_twice_and_what_is_no_number_are_refused_by_all(name: str, tmp_path: Path) -> None:
    read, error, _ = READERS[name]
    for content, says in CONTENTS.items():
        if "NaN" in content and name == "Hugging Face configuration":
            continue  # it isn't a file of ours
        (tmp_path / "file").write_text(content)
        with pytest.raises(error, match=says):
            read(tmp_path / "file")


def configuration(folder: Path, **fields: object) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **sizes, "vocab_size": 64, **fields}))
    return path


def test_configurations_name_no_code(tmp_path: Path) -> None:
    """transformers would fetch such an attention kernel from the network, and run it."""
    remote = {"AutoModelForCausalLM": "somebody/model--evil.Model"}
    for given, kept in (
        ({"auto_map": remote, "attn_implementation": "somebody/kernel"}, None),
        ({"_attn_implementation": "flash_attention_2"}, None),
        ({"_attn_implementation_internal": "flash_attention_2"}, None),
        ({"attn_implementation": "eager"}, "eager"),
    ):
        found = huggingface.load_config(configuration(tmp_path, **given))
        assert not hasattr(found, "auto_map")
        assert found._attn_implementation == kept


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 10**9}, f"has 1000000000 layers; allowed are at most {MOST_LAYERS}"),
        ({"vocab_size": 10**30}, "transformers can't build it"),
        ({"num_attention_heads": 10**12, "hidden_size": 10**12}, "does not divide the 1000000000000 num_attention"),
        ({"hidden_act": "x\x1b[31m" + "y" * 1000}, r"x\x1b[31my"),
    ],
)
def test_sizes_that_no_model_has_end_in_one_line(fields: dict[str, object], says: str, tmp_path: Path) -> None:
    path = configuration(tmp_path, **fields)
    tp = "3" if "num_attention_heads" in fields else "1"
    assert says in one_line(CliRunner().invoke(app, ["explain", str(path), "--tp", tp]))


def test_whatever_a_configuration_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: object) -> None:
        raise TypeError("on two\nlines")

    monkeypatch.setattr(huggingface, "build", build)
    with pytest.raises(WorkloadError, match="it can't be built: on two lines"):
        catalog.build("llama-3.1-8b-tiny").__enter__()


def test_requests_that_cannot_be_paths_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    lock = str(tmp_path / "circle")
    for arguments, says in (
        (["explain", "x" * 300], "unknown workload"),
        (["explain", ""], "unknown workload ''"),
        (["explain", "gpt-oss-120b-tiny", "--range", "1:" + "9" * 5000], "isn't of the form FIRST:LAST"),
        (["explain", "gpt-oss-120b-tiny", "--layers", "10001"], "give a number of layers of at most 10000"),
        (["check", "gpt-oss-120b-tiny", "--lock", lock], "Too many levels of symbolic links"),
        (["check", "gpt-oss-120b-tiny", "--lock", lock, "--update"], "Too many levels of symbolic links"),
        (["explain", "gpt-oss-120b-tiny", "--html", lock], "Too many levels of symbolic links"),
    ):
        assert says in one_line(CliRunner().invoke(app, arguments))
