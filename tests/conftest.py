import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Server

# What is imported and collected stays, and isn't looked through meanwhile; see pytest_collection_finish in running.py.
gc.disable()

# Torch reads these when it is imported, which no line above has done: here, in workers, and in processes of tests.
# Scalar code: compiling it takes half as long.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# A pool of processes that compile takes seconds to start, for graphs of which each test compiles a small one or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Where tests already share the processors, threads of NumPy and torch mostly wait for each other, which takes as much
# time again in many tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Costs that whoever runs the tests measured before are none of theirs: they lie in Inductor's cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache, "of_fuseplans_tests"))

pytest_plugins = [
    "pytester",  # runs of pytest in which fuseplan's own plugin is tried
    "tests.sampled",
]

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start; some test it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-seed", type=int, default=0, help="of the random models in tests/differential")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.running")
    else:
        gc.enable()
        config.pluginmanager.register(_Shared())


class _Shared:
    """What workers share, in the process that hands them tests."""

    def __init__(self) -> None:
        self._servers = {"forks": Server(), "interpreting_forks": Server(TRITON_INTERPRET="1")}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tells a worker what there is."""
        node.workerinput.update((name, server.address) for name, server in self._servers.items())

    def pytest_unconfigure(self) -> None:
        """Ends what has been started."""
        for server in self._servers.values():
            server.close()
