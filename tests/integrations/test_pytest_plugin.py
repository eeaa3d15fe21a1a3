"""The plugin in runs of pytest of its own, and its parts."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseplan
from fuseplan.config import PassConfig
from fuseplan.errors import ConfigError
from fuseplan.integrations.locks import settings_of
from fuseplan.integrations.pytest_plugin import LONGEST_NAME, UPDATE, assert_fusions, lock_path
from fuseplan.report.drift import drifts
from fuseplan.report.lock import FusionLock
from tests import regressing_model
from tests.regressing_model import LAYERS, plant

SRC = Path(fuseplan.__file__).resolve().parents[1]
MODULE = "fuseplan.integrations.pytest_plugin"
ENTRY_POINT = "[pytest11]\nfuseplan = fuseplan.integrations.pytest_plugin\n"

USERS_TESTS = """
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import regressing_model
from fuseplan import CompileRange, PassConfig

RANGES = (CompileRange(start=1, end=8), CompileRange(start=9, end=64))

@pytest.fixture
def model():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield regressing_model.build(2)
    dist.destroy_process_group()

def test_counts(model, assert_fusions):
    module, inputs = model
    report = assert_fusions(module, inputs, {"allreduce_rms_padding": 4, "act_quant": 0})
    assert report.fused["allreduce_rms_padding"] == 4

def test_ranges(model, assert_fusions):
    module, (x,) = model
    assert_fusions(module, {"x": x}, {"allreduce_rms_padding": 8}, config=PassConfig(compile_ranges=RANGES), exact=True)

@pytest.mark.parametrize("policy", ["planned", "ordered(act_padding)"])
def test_lock(model, fusion_lock, policy):
    fusion_lock(*model, config=PassConfig(policy=policy, compile_ranges=RANGES))

class TestClass:
    def test_lock(self, model, fusion_lock):
        fusion_lock(*model, name="one")
        fusion_lock(*model, name="two", device="mi355x")
"""
TESTS = 5
ORDERED_LOCK = "test_lock-ordered_act_padding_-37b4cfc1.lock"
LOCKS = {"TestClass.test_lock+one.lock", "TestClass.test_lock+two.lock", ORDERED_LOCK, "test_lock-planned.lock"}
SETTINGS = {"costs": "modelled", "device": "h200", "policy": "planned", "ranges": ["1:8", "9:64"],
            "workload": "test_lock-planned"}  # fmt: skip
PADDED = {"allreduce_rms_padding all_reduce_fused_add_rms_norm_pad triton": ["layers.0-3.norm"]}
PLANNED = {"fusions": {"1:8, 9:64": PADDED}, "schema": 1, "settings": SETTINGS}
PLANNED_LOCK = json.dumps(PLANNED, indent=1) + "\n"
"""What the lock of the first test that compares with one holds, as it is written."""


class Run:
    """Runs a user's tests: in this process, since importing torch anew takes seconds, and once all that they need is
    imported here, since pytester forgets whatever is imported while it runs.
    """

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.locks = pytester.path / "fusion_locks" / "test_users"

    def __call__(self, *arguments: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess("-p", MODULE, *arguments)


@pytest.fixture(scope="module")
def warm() -> None:
    """What a failing test imports."""
    model, inputs = regressing_model.build(1)
    report = assert_fusions(model, inputs, {"act_padding": LAYERS})
    with pytest.raises(AssertionError):
        assert_fusions(model, inputs, {"act_padding": 0})
    lock = FusionLock.of(settings_of(PassConfig(), workload="w", device="h200"), report)
    assert drifts(lock, report) == ()


@pytest.fixture
def run(warm: None, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    shutil.copy(regressing_model.__file__, pytester.path / "regressing_model.py")
    pytester.makepyfile(test_users=USERS_TESTS)
    pytester.makeini("[pytest]\npythonpath = .\n")
    return Run(pytester)


def test_a_missing_lock_says_how_to_write_it(run: Run) -> None:
    result = run("-k", "lock")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines([f"*there is no fusion lock fusion_locks/test_users/*write it with pytest {UPDATE}*"])
    assert not run.locks.exists()


def test_locks_are_written_beside_the_test_and_hold(run: Run) -> None:
    written = run(UPDATE)
    written.assert_outcomes(passed=TESTS)
    assert {path.name for path in run.locks.iterdir()} == LOCKS
    for name in LOCKS:
        written.stdout.fnmatch_lines([f"fusion_locks/test_users/{name}"])
    assert (run.locks / "test_lock-planned.lock").read_text() == PLANNED_LOCK
    held = run("-k", "planned or TestClass")
    held.assert_outcomes(passed=2)
    held.stdout.no_fnmatch_line("*fusion locks written*")


@pytest.fixture
def planned(run: Run) -> Path:
    run.locks.mkdir(parents=True)
    path = run.locks / "test_lock-planned.lock"
    path.write_text(PLANNED_LOCK)
    return path


def test_a_regression_fails_with_rule_place_and_line(run: Run, planned: Path) -> None:
    plant(run.pytester.path, "1 scale", "2 scale")
    regressed = run("-k", "counts or ranges or planned")
    regressed.assert_outcomes(failed=3)
    text = regressed.stdout.str()
    for line in (
        "fusion_locks/test_users/test_lock-planned.lock doesn't hold: 4 moved (test_lock-planned, planned for h200)",
        ": x = x * 0.5",
        f"where that is meant: pytest {UPDATE}",
        "wrong   allreduce_rms_padding: expected 4, found 2",
        "wrong   act_padding: expected 0, found 4",
    ):
        assert line in text
    assert "pytest_plugin.py" not in text
    assert "torch.__trace" not in text
    run(UPDATE, "-k", "planned").assert_outcomes(passed=1)
    assert '"layers.0,3.norm"' in planned.read_text()


def test_broken_locks_and_other_settings_are_told_and_can_be_written_anew(run: Run, planned: Path) -> None:
    planned.write_text(PLANNED_LOCK.replace("h200", "h100"))
    (run.locks / "TestClass.test_lock+one.lock").write_text("<<<<<<<")
    broken = run("-k", "planned or TestClass")
    broken.assert_outcomes(failed=2)
    broken.stdout.fnmatch_lines([f"*planned.lock pins device=h100, and the test says device=h200; where that*{UPDATE}"])
    advice = f"fix it, or write it anew with pytest {UPDATE}"
    broken.stdout.fnmatch_lines([f"*LockError: lock file '*+one.lock': it isn't JSON*; {advice}"])
    assert "src/fuseplan" not in broken.stdout.str()
    for other, says in (("", "isn't JSON"), ('{"schema": 9}', "has schema 9; this version reads 1")):
        planned.write_text(other)
        result = run("-k", "planned")
        result.stdout.fnmatch_lines([f"*LockError: lock file '*planned.lock': it {says}*; {advice}"])
        assert "src/fuseplan" not in result.stdout.str()
    run(UPDATE, "-k", "planned or TestClass").assert_outcomes(passed=2)
    assert planned.read_text() == PLANNED_LOCK


MISUSE = """
import pytest, torch
from fuseplan import PassConfig

X = torch.ones(2, 2)

def test_twice(fusion_lock):
    fusion_lock(torch.relu, (X,))
    fusion_lock(torch.relu, (X,))

@pytest.mark.parametrize("more", [
    {"name": "../../outside"}, {"device": "h20"}, {"config": PassConfig(plan="plan.json")},
    {"device": torch.device("cpu")}, {"name": 3},
], ids=["folder", "device", "plan", "profile", "name"])
def test_one(fusion_lock, more):
    fusion_lock(torch.relu, (X,), **more)

def test_training(assert_fusions):
    layer = torch.nn.Linear(2, 2)
    assert_fusions(layer, (X,), {"act_padding": 1})
"""


def test_misuse_is_told_in_a_line(run: Run) -> None:
    run.pytester.makepyfile(test_users=MISUSE)
    result = run(UPDATE)
    result.assert_outcomes(failed=6, passed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*LockError: fusion_lock has compared test_twice.lock in this test already; give each call a name of*",
            "*ConfigError: unknown device 'h20'; did you mean 'h200'*",
            "*ConfigError: device=device(type='cpu'): give a profile or the name of one: a100, *",
            "*ConfigError: name=3: give a text",
            "*ConfigError: plan='plan.json': a lock makes its own plan; leave it out",
            "*wrong   act_padding: expected 1, found 0",
            "*why     the graph has nothing that it could match",
        ]
    )
    names = sorted(path.name for path in run.locks.iterdir())
    assert [name.split("-")[0] for name in names] == ["test_one", "test_twice.lock"]


@pytest.mark.parametrize(
    ("arguments", "conftest"),
    [
        ((), ""), (("-p", MODULE), ""), (("-p", "fuseplan"), f"pytest_plugins = ['{MODULE}']"),
        (("-p", MODULE, "-p", "fuseplan"), ""), (("-p", "fuseplan", "-p", MODULE), ""),
    ],
)  # fmt: skip
def test_one_plugin_whatever_the_ways_to_it(
    arguments: tuple[str, ...], conftest: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an entry point of an installed distribution, by `-p`, and by a conftest: in any order, and all at once."""
    installed = pytester.mkdir("site")
    information = installed / "users_fuseplan-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: users-fuseplan\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY_POINT)
    (information / "RECORD").write_text("fuseplan/__init__.py,,\nfuseplan/integrations/pytest_plugin.py,,\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), str(SRC)]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(conftest)
    pytester.makepyfile(
        """
import sys

def test_plugin(assert_fusions, fusion_lock, pytestconfig):
    assert pytestconfig.getoption("--update-fusion-lock") is False
    assert not {"torch", "rich", "numpy"} & set(sys.modules)
"""
    )
    pytester.runpytest_subprocess("-W", "error", *arguments).assert_outcomes(passed=1)


def lock_of(test: str, name: str | None = None) -> Path:
    return lock_path(Path("t/test_a.py"), f"t/test_a.py::{test}", name)


def test_every_test_has_a_lock_of_its_own_beside_it() -> None:
    named = {
        "test_x": ("test_x", None), "TestA.test_x": ("TestA::test_x", None), "test_x-8-bf16": ("test_x[8-bf16]", None),
        "test_x-8-bf16+decode": ("test_x[8-bf16]", "decode"), "test_x+decode": ("test_x", "decode"),
        "test_y+decode": ("test_y", "decode"),
    }  # fmt: skip
    paths = [lock_of(*each) for each in named.values()]
    assert [path.stem for path in paths] == [*named]
    parameters = ["a/b", "a_b", "a b", "../b", "x" * 300, "x" * 301, ".", "", "[", "a::b", "ä", "a", "a+b", "a-b"]
    paths += [lock_of(f"test_x[{each}]") for each in parameters]
    paths += [lock_of("test_x", each) for each in ("/etc/x", "..", ".hidden")]
    apart = (("a", "b+c"), ("a+b", "c"), ("a", "b"), ("a_b", "c"), ("a", "b_c"), ("b", "b"))
    paths += [lock_of(f"test_x[{own}]", name) for own, name in apart]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.parent == Path("t/fusion_locks/test_a")
        assert not path.name.startswith(".")
        assert len(path.name) < LONGEST_NAME + 20


@pytest.mark.parametrize(
    ("model", "inputs", "expected", "switch", "says"),
    [
        (print, ((),), {"allreduce_rm": 1}, "1", "unknown rule 'allreduce_rm'; did you mean 'allreduce_rms'"),
        (print, ((),), {"act_padding": -1}, "1", "expected 'act_padding': -1; give a number"),
        (print, ((),), {"act_padding": True}, "1", "expected 'act_padding': True; give a number"),
        (print, ((),), None, "1", "expected is a NoneType; give a mapping of rules to counts, e.g"),
        (print, ((),), ["act_padding"], "1", "expected is a list; give a mapping of rules to counts, e.g"),
        (print, ((),), {}, "1", "nothing is expected; name rules with their counts, or set exact=True"),
        (print, "x", {"act_padding": 1}, "1",
         r"inputs are a str; give a tuple or list of arguments, e\.g\. \(x,\), or a mapping"),
        (3, (), {"act_padding": 1}, "1", "the model is of type int; give a module or a function"),
        (print, (), {"act_padding": 0}, "0", "FUSEPLAN=0 switches every fusion off"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(
    model: Any, inputs: Any, expected: Any, switch: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPLAN", switch)
    with pytest.raises(ConfigError, match=says):
        assert_fusions(model, inputs, expected)


def test_warnings_of_a_report_are_the_tests_own() -> None:
    model, inputs = regressing_model.build(1)
    config = PassConfig(forbid=["act_padding@layer.*"])
    with pytest.warns(fuseplan.FuseplanWarning, match="selects no match in this graph") as caught:
        assert_fusions(model, inputs, {"act_padding": LAYERS}, config=config)
    assert [warning.filename for warning in caught] == [__file__]


def named(model: torch.Tensor, config: int, device: int, rules: int, providers: int) -> torch.Tensor:
    """Its arguments have the names of those of `explain`."""
    y = torch.nn.functional.rms_norm(model, (64,), eps=1e-6)
    return torch.nn.functional.pad(y, (0, config + device + rules + providers))


def test_inputs_can_have_any_name() -> None:
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    inputs = {"model": x, "config": 16, "device": 16, "rules": 16, "providers": 16}
    assert_fusions(named, inputs, {"act_padding": 1})


def breaks(x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.rms_norm(x, (64,), eps=1e-6)
    if y.sum() > 0:
        y = y * 1
    return torch.nn.functional.pad(y, (0, 64))


def test_graph_breaks_are_named_with_their_line() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_fusions(breaks, (torch.ones(4, 64, dtype=torch.bfloat16),), {"act_padding": 1})
    lines = str(caught.value).splitlines()
    assert lines[-1].startswith("break   a branch on the value of a tensor (test_pytest_plugin.py:")
    assert lines[-1].endswith(": if y.sum() > 0:)")


def test_the_function_works_without_the_fixture() -> None:
    model, inputs = regressing_model.build(1)
    report = assert_fusions(model, inputs, {"act_padding": LAYERS}, exact=True)
    assert report.policy == "planned"
    more = r"wrong   act_padding: expected 5, found 4\nthere   4 places: .*\nwhy     the graph has nothing else that it"
    with pytest.raises(AssertionError, match=more):
        assert_fusions(model, inputs, {"act_padding": LAYERS + 1})
