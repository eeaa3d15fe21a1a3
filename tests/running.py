"""What a process that runs tests has. One that only hands them to workers doesn't load it, and so not torch."""

import gc
import os
from collections.abc import Iterator
from contextlib import closing, nullcontext

import pytest
import torch
import torch._dynamo.guards
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from torch._C._distributed_c10d import HashStore
from torch._dynamo import config as dynamo_config
from torch._dynamo.side_effects import SideEffects
from torch._inductor import config as inductor_config
from torch._logging._internal import trace_log
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.contents import read_once
from tests.forks import Forks, Server
from tests.interpreted import no_code

# Where another plugin has imported torch before, it has not read the variables that conftest.py sets.
if os.environ["TORCHINDUCTOR_VEC_ISA_OK"] == "0":
    inductor_config.cpp.vec_isa_ok = False
inductor_config.compile_threads = int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"])
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# How long guards take is measured with all caches flushed, a seventh of the time of tracing a small function.
vars(torch._dynamo.guards)["profile_guard_manager"] = lambda *_: 0.0
# Nor does a collection after each compilation find much, where what is traced isn't looked through otherwise.
dynamo_config.run_gc_after_compile = False
# torch renders each graph, guard and event as soon as its logger of traces has a handler. pytest gives its own to all
# loggers that don't propagate, and would show none of it.
trace_log.handlers.clear()
trace_log.propagate = True
# What Dynamo would log of side effects names each frame below it, of which pytest has many.
setattr(SideEffects, "_format_side_effect_message", lambda *_: "")  # noqa: B010 - mypy knows that it's a method

# How long inputs take to be made says how busy the machine is, and nothing about what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start processes come first: one of their tests may take half a minute, and is nothing to end with.

    What a module shares isn't made by two workers either, who take each other's last tests.
    """
    starting = {each.path for each in items if {"forks", "interpreting_forks"}.intersection(_fixtures_of(each))}
    items.sort(key=lambda item: item.path not in starting)


def _fixtures_of(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


def pytest_collection_finish() -> None:
    gc.collect()
    gc.enable()
    gc.freeze()  # what modules hold isn't looked through at every collection
    gc.set_threshold(100_000, 20, 20)  # nor what is being traced, again and again: a tenth of the time of most tests
    read_once()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen when Python ends is leaked, and Triton says so


@pytest.fixture
def one_rank() -> Iterator[str]:
    """The name of a gloo group of this process alone: its collectives run, and are the identity."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture
def four_ranks() -> Iterator[str]:
    """The name of a group of four, of which this is the third and the others don't exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def _forks(config: pytest.Config, name: str, **environment: str) -> Iterator[Forks]:
    """Workers share a process that forks, which whoever started them has started; alone, this process starts it."""
    shared = getattr(config, "workerinput", {}).get(name)
    if shared:
        with closing(Forks(shared)) as forks:
            yield forks
    else:
        with closing(Server(**environment)) as server, closing(Forks(server.address)) as forks:
            yield forks


@pytest.fixture(scope="session")
def forks(pytestconfig: pytest.Config) -> Iterator[Forks]:
    """Runs files and modules in processes of their own, without starting Python and torch for each."""
    yield from _forks(pytestconfig, "forks")


@pytest.fixture(scope="session")
def interpreting_forks(pytestconfig: pytest.Config) -> Iterator[Forks]:
    """The same, where Triton interprets its kernels: whether it does is settled when it is imported."""
    yield from _forks(pytestconfig, "interpreting_forks", TRITON_INTERPRET="1")


@pytest.fixture(params=["interpreted", pytest.param("coded", marks=pytest.mark.nightly)])
def by_code_at_night(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interprets by day what is compiled, and has Inductor make code of it at night."""
    with no_code() if request.param == "interpreted" else nullcontext():
        yield


@pytest.fixture(scope="session")
def first_seed(pytestconfig: pytest.Config) -> int:
    """The number that random models follow from: another one gives other models."""
    seed: int = pytestconfig.getoption("--first-seed")
    return seed
