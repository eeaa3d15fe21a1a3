"""What tests that start several ranks share, and their processes."""

import json
import os
import socket
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from fuseplan.distributed.workspace import SLOTS, Workspace
from fuseplan.providers.triton.tuned import SECOND_WAIT_BYTES, Found
from tests.forks import Forks, Request


def seen_by_ranks(
    forks: Forks, module: str, ranks: int, folder: Path, *, statuses: list[int], **environment: str
) -> list[Any]:
    """What each rank, a process that runs a module of tests as `MODULE RANK RANKS FOLDER`, wrote to FOLDER/RANK.json.

    Asserts that they ended as expected.
    """
    processes = [([str(rank), str(ranks), str(folder)], dict[str, str]()) for rank in range(ranks)]
    outcomes = forks.outcomes(forks.start(Request(module=module, environment=environment, processes=processes)))
    assert [each.status for each in outcomes] == statuses, "\n".join(each.output[-4000:] for each in outcomes)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def variables_of_ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of its ranks of the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
    }  # fmt: skip
    return [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def leave() -> NoReturn:
    """Waits for the other ranks and ends this process, successfully and at once.

    gloo's threads now and then outlive their process group, and the interpreter, taking down what is left, then aborts:
    "terminate called without an active exception". A rank that failed has raised before.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def always(size: int) -> Found:
    """Two shots from that many bytes on, in place of what was found."""
    return replace(SECOND_WAIT_BYTES, steps=((inf, size),))


def left_in(workspace: Workspace) -> int:
    """Words that aren't empty in the two slots that the last call didn't fill, once all ranks have made it."""
    dist.barrier()
    slot = (int(workspace.state[0]) - 1) % SLOTS
    shots = workspace.words[: workspace.sums_at].view(SLOTS, -1)
    sums = workspace.words[workspace.sums_at :].view(SLOTS, -1)
    found = sum(int((each != -1).sum()) for parts in (shots, sums) for at, each in enumerate(parts) if at != slot)
    dist.barrier()
    return found
