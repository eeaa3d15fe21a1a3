"""What processes of tests that start several ranks share."""

import os
import sys
from dataclasses import replace
from math import inf
from typing import NoReturn

import torch.distributed as dist

from fuseplan.distributed.workspace import SLOTS, Workspace
from fuseplan.providers.triton.tuned import SECOND_WAIT_BYTES, Found


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
