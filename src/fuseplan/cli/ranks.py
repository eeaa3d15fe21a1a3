"""Commands that run on a device, and under `torchrun` on several: the process group, and how they end together."""

import contextlib
import datetime
import math
import shlex
import sys
import traceback
from collections.abc import Iterator
from os import _exit
from typing import Annotated, Any, NoReturn

import typer

from fuseplan.cli.console import say

FAILED = 2
"""The exit status of a request that can't be served."""

Tp = Annotated[
    int | None,
    typer.Option(
        "--tp", metavar="N", help="Ranks of tensor parallelism: those that torchrun started, if given at all."
    ),
]
DEADLINE_S = 300.0
"""Inductor may compile for a minute, and loading a model takes one rank longer than another."""

REPEATS = 9
Deadline = Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="How long a rank waits for the others.")]


def command_of(ranks: int) -> str:
    """This process's command line, to run it again."""
    start = f"torchrun --nproc-per-node {ranks} -m fuseplan" if ranks > 1 else "fuseplan"
    return shlex.join([*start.split(), *sys.argv[1:]])


@contextlib.contextmanager
def built(workload: str, ranks: Any, layers: int | None, *, weights: bool = False) -> Iterator[Any]:
    """A workload on this process's device, with weights or fake ones; its code's output goes to standard error.

    Raises:
        WorkloadError: as `catalog.build`.
    """
    import torch

    from fuseplan.workloads import catalog

    on = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        with on:
            made = stack.enter_context(catalog.build(workload, tp=ranks.size, layers=layers, weights=weights))
        yield made


@contextlib.contextmanager
def ranks_of(tp: int | None, deadline_s: float, command: str, *, debug: bool) -> Iterator[Any]:
    """The ranks that `torchrun` started, each with its own GPU if there are any, or this process alone.

    An error on one rank ends all of them, and is reported once. One of several processes ends with this context.

    Args:
        tp: the user's number of ranks; None: as many as there are.
        deadline_s: seconds that a rank waits for the others.
        command: for the hint how to start several.
        debug: whether the traceback of an error is shown.

    Raises:
        ConfigError: there are other ranks than `tp`, or fewer GPUs than ranks.
        FuseplanError: raised inside.
    """
    import torch
    import torch.distributed as dist

    from fuseplan.config import Launch
    from fuseplan.errors import ConfigError, FuseplanError, RanksError
    from fuseplan.measurement.tuning import LockStep, Ranks

    launch = Launch.read()
    try:
        _check(tp, launch.ranks, command)
        if not 0 < deadline_s < math.inf:
            raise ConfigError(f"deadline={deadline_s:g}: allowed are seconds, more than 0 and finite")
        on_gpu = torch.cuda.is_available()
        if on_gpu and torch.cuda.device_count() <= launch.local_rank:
            raise ConfigError(f"{launch.ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}")
    except ConfigError as error:
        raise (error if launch.rank == 0 else RanksError(str(error), reported=True)) from None
    device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.cuda.init()  # before anything is fake
    if launch.ranks == 1:
        yield Ranks()
        return
    timeout = datetime.timedelta(seconds=deadline_s)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, timeout=timeout)
    ranks, status = LockStep.of_world(deadline_s, _leave), 0
    try:
        with ranks.watched():
            try:
                yield ranks
            except typer.Exit as ended:
                status = ended.exit_code
            ranks.exchange("done")
            dist.destroy_process_group()
    except FuseplanError as error:
        if debug:
            traceback.print_exc()
        _leave(f"{error}" if ranks.fail(error) else "")
    except BaseException as error:  # noqa: BLE001 - it ends this process, and so all of them
        ranks.fail(error)
        traceback.print_exc()
        _leave("", 1)
    _leave("", status)


def _check(tp: int | None, ranks: int, command: str) -> None:
    from fuseplan.errors import ConfigError

    if tp is None or tp == ranks:
        return
    if tp < 1:
        raise ConfigError(f"tp={tp}: give a number of ranks of at least 1, or leave it out")
    if ranks == 1:
        raise ConfigError(f"tp={tp} takes as many processes: torchrun --nproc-per-node {tp} -m fuseplan {command} ...")
    raise ConfigError(f"tp={tp}, but torchrun started {ranks} ranks; leave --tp out, or start as many")


def _leave(text: str, status: int = FAILED) -> NoReturn:
    """Ends this process without cleaning up: a thread that waits for another rank inside a kernel can't be stopped, and
    threads of gloo now and then outlive their group.
    """
    if text:
        say(f"fuseplan: {text}")
    sys.stdout.flush()
    sys.stderr.flush()
    _exit(status)
