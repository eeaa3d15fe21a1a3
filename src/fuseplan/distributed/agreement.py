"""One plan on all ranks of a group, or no fusions on any of them: settled over the group's store, before the first run.

No collective is used: with a warm compile cache one rank may never get to where the others wait.
"""

import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from fuseplan.distributed.groups import STAND_IN, resolve, timeout_of
from fuseplan.errors import UnsupportedError
from fuseplan.record import Verification
from fuseplan.record.text import one_line

PREFIX = "fuseplan/agreement"
FAILED, LOST, APART = "failed: ", "lost: ", "apart: "
LEAST_PAUSE_S, MOST_PAUSE_S = 0.0005, 0.02
NO_PLAN, OTHER_PLAN = "had no plan for it", "planned differently"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The verdict of a group.

    Attributes:
        fused: whether every rank runs its plan; else every rank runs unfused.
        reason: why not, one clause.
        lost: whether a rank is stuck in a collective, which may receive the group's later messages.
        apart: whether the ranks can't share memory, so that a plan without it would work.
        verified: outcomes of verification by all ranks on the way.
    """

    fused: bool
    reason: str | None = None
    lost: bool = False
    apart: bool = False
    verified: tuple[Verification, ...] = ()


def agree(
    group_store: Store, *, graph: str, rank: int, size: int, digest: str, deadline: datetime.timedelta,
    awaited: str = NO_PLAN, differing: str = OTHER_PLAN,
) -> Agreement:  # fmt: skip
    """Posts this rank's digest, waits for the others', and returns the verdict of all ranks.

    The first rank that knows enough, or has waited long enough, writes the verdict by one compare-and-set; all others,
    also late ones, read it.

    Args:
        group_store: a store that the ranks share.
        graph: the name of the compiled graph, the same on all ranks.
        rank: of this process in the group.
        size: of the group.
        digest: of this rank's plan, or a result of `failed`, `refused`, `lost` or `apart`.
        deadline: how long to wait for the others.
        awaited: the reason given for a rank that is late.
        differing: the reason given for two different digests.

    Raises:
        UnsupportedError: the store doesn't answer, so the other ranks' plans aren't known.
    """
    try:
        attempt = group_store.add(f"{PREFIX}/{graph}/{rank}/attempts", 1)
        where = f"{PREFIX}/{graph}/{attempt}"
        group_store.set(f"{where}/{rank}", digest)
        digests, late = _digests(group_store, where, size, deadline)
        verdict = _verdict(digests, late, f"{awaited} within {deadline.total_seconds():g} s", differing)
        written = json.dumps({name: getattr(verdict, name) for name in ("fused", "reason", "lost", "apart")})
        settled = json.loads(group_store.compare_set(f"{where}/verdict", "", written))
    except RuntimeError as error:
        text = one_line(error, 200)
        raise UnsupportedError(
            f"the ranks of a process group could not agree on a plan, since its store doesn't answer: {text}; set "
            "FUSEPLAN=0 on all ranks, or find out which of them is gone"
        ) from error
    return Agreement(**settled)


def failed(error: BaseException) -> str:
    """The digest of a rank whose compilation failed."""
    return refused(f"could not compile it: {type(error).__name__}: {one_line(error, 200)}")


def refused(why: str) -> str:
    """The digest of a rank that can't run its plan, with the reason."""
    return f"{FAILED}{why}"


def lost(why: str) -> str:
    """The digest of a rank that is stuck in a collective, with the reason."""
    return f"{LOST}{why}"


def apart(why: str) -> str:
    """The digest of a rank that can't share memory with the others, with the reason."""
    return f"{APART}{why}"


def _digests(
    group_store: Store, where: str, size: int, deadline: datetime.timedelta
) -> tuple[dict[int, str], list[int]]:
    """The digests by rank, and the ranks without one in time."""
    names = [f"{where}/{rank}" for rank in range(size)]
    until, pause = time.monotonic() + deadline.total_seconds(), LEAST_PAUSE_S
    # A waiting store blocks the process's other threads, and another rank may wait for one of these.
    while not group_store.check(names) and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, MOST_PAUSE_S)
    late = [rank for rank, name in enumerate(names) if not group_store.check([name])]
    return {rank: group_store.get(names[rank]).decode() for rank in range(size) if rank not in late}, late


def _verdict(digests: dict[int, str], late: Sequence[int], awaited: str, differing: str) -> Agreement:
    for prefix in (LOST, FAILED, APART):
        for rank, digest in digests.items():
            if digest.startswith(prefix):
                reason = f"rank {rank} {digest.removeprefix(prefix)}"
                is_apart = prefix == APART and not late
                return Agreement(fused=False, reason=reason, lost=prefix == LOST, apart=is_apart)
    if late:
        return Agreement(fused=False, reason=f"rank {', '.join(map(str, late))} {awaited}")
    if len(set(digests.values())) > 1:
        odd = next(rank for rank, digest in digests.items() if digest != digests[0])
        return Agreement(fused=False, reason=f"rank 0 and rank {odd} {differing}")
    return Agreement(fused=True)


def agree_in_groups(
    names: Sequence[str], *, graph: str, digest: str, deadline_s: float | None, work_s: float = 0.0,
    awaited: str = NO_PLAN,
) -> Agreement:  # fmt: skip
    """`agree` among the ranks of a graph's process groups.

    Where a graph has several groups, one of them has to hold all ranks of the others: otherwise two groups could reach
    different verdicts. A group of torch's `fake` backend has no other ranks to ask.

    Args:
        names: of the groups whose collectives are in the graph.
        graph: as for `agree`.
        digest: as for `agree`.
        deadline_s: seconds to wait; None: the group's own timeout, after which its collectives would give up too.
        work_s: further seconds that a rank may need for its work.
        awaited: as for `agree`.

    Raises:
        UnsupportedError: the store doesn't answer.
    """
    groups = [resolve(name) for name in names]
    largest = max(groups, key=lambda group: group.size(), default=None)
    if largest is None or largest.size() == 1 or dist.get_backend(largest) == STAND_IN:
        return Agreement(fused=True)
    ranks = set(dist.get_process_group_ranks(largest))
    if any(not ranks.issuperset(dist.get_process_group_ranks(group)) for group in groups):
        return Agreement(fused=False, reason=f"its collectives are of groups that overlap: {', '.join(sorted(names))}")
    timeout = datetime.timedelta(seconds=deadline_s) if deadline_s is not None else timeout_of(largest)
    return agree(
        distributed_c10d._get_process_group_store(largest), graph=graph, rank=dist.get_rank(largest),
        size=largest.size(), digest=digest, deadline=timeout + datetime.timedelta(seconds=work_s), awaited=awaited,
    )  # fmt: skip
