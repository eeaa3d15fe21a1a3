import gc
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch._dynamo.guards
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from torch._C._distributed_c10d import HashStore
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from tests.forks import Forks
from tests.interpreted import no_code

# Scalar code: compiling it takes half as long, here and in the processes that tests start. Processes that tests start
# read the variable; this one has read it before, unless it is one of several workers.
if os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0") == "0":
    inductor_config.cpp.vec_isa_ok = False
# A pool of processes that compile takes seconds to start, for graphs of which each test compiles a small one or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
inductor_config.compile_threads = int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"])
# Where tests already share the processors, threads of NumPy and torch mostly wait for each other, which takes as much
# time again in many tests. Processes that tests start read the variable; this one has read it before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
# Costs that whoever runs the tests measured before are none of theirs: they lie in Inductor's cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache_dir()) / "of_fuseplans_tests")

# How long guards take is measured with all caches flushed, a seventh of the time of tracing a small function.
vars(torch._dynamo.guards)["profile_guard_manager"] = lambda *_: 0.0

pytest_plugins = [
    "pytester",  # runs of pytest in which fuseplan's own plugin is tried
    "tests.sampled",
]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what modules hold isn't looked through at every collection


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen when Python ends is leaked, and Triton says so


# How long inputs take to be made says how busy the machine is, and nothing about what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start; some test it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_rank() -> Iterator[str]:
    """The name of a gloo group of this process alone: its collectives run, and are the identity."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs files and modules in processes of their own, without starting Python and torch for each."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def interpreting_forks() -> Iterator[Forks]:
    """The same, where Triton interprets its kernels: whether it does is settled when it is imported."""
    forks = Forks(TRITON_INTERPRET="1")
    yield forks
    forks.close()


@pytest.fixture(params=["interpreted", pytest.param("coded", marks=pytest.mark.nightly)])
def by_code_at_night(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interprets by day what is compiled, and has Inductor make code of it at night."""
    with no_code() if request.param == "interpreted" else nullcontext():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-seed", type=int, default=0, help="of the random models in tests/differential")


@pytest.fixture(scope="session")
def first_seed(pytestconfig: pytest.Config) -> int:
    """The number that random models follow from: another one gives other models."""
    seed: int = pytestconfig.getoption("--first-seed")
    return seed
