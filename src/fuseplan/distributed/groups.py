"""Process groups: look-up by name, timeouts, and whether their ranks are on one machine."""

import datetime

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuseplan.config import Launch

# torch's backend for experiments in one process: the other ranks don't exist.
STAND_IN = "fake"


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    return group


def timeout_of(group: dist.ProcessGroup, device_type: str | None = None) -> datetime.timedelta:
    """The timeout of a group's own collectives.

    Args:
        group: a process group.
        device_type: the device of the collectives, since a group may have a backend for each; None: the GPU if it has
            one.
    """
    types = [each.type for each in getattr(group, "_device_types", ())]
    wanted = device_type or ("cuda" if "cuda" in types or not types else types[0])
    for name in (wanted, *types):
        try:
            backend = group._get_backend(torch.device(name))
        except RuntimeError:
            continue
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        if timeout is not None:
            return timeout  # type: ignore[no-any-return]
    return distributed_c10d._get_default_timeout(dist.get_backend(group))


def elsewhere(group_name: str) -> list[int]:
    """The ranks of a group, by number in the world, that are on other machines, as far as `torchrun` tells: it numbers
    the ranks of a machine consecutively. Either all members of a group see some there, or none does.

    Raises:
        ConfigError: a variable of `torchrun` isn't a number.
    """
    launch = Launch.read()
    try:
        group = resolve(group_name)
    except (RuntimeError, ValueError, LookupError):
        return []
    if launch.local_ranks is None or (launch.rank, launch.ranks) != (dist.get_rank(), dist.get_world_size()):
        return []
    first = launch.rank - launch.local_rank
    return [rank for rank in dist.get_process_group_ranks(group) if not first <= rank < first + launch.local_ranks]
