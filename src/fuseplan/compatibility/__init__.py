"""Which torch fuseplan works with: not too old, and with the private interfaces that fuseplan is built on.

Moved interfaces are found at the first access to one of fuseplan's entry points, before the rest of fuseplan is
imported. `fuseplan.compile` then falls back to `torch.compile` (`fuseplan.compatibility.fallback`); entry points
without a fallback raise.
"""

import functools

import torch

from fuseplan.compatibility.check import Moved, find_moved
from fuseplan.compatibility.private import ASIDE, FLOATS, OPTIONAL, PRIVATE_APIS, TRACED, PrivateApi
from fuseplan.errors import CompatibilityError

__all__ = [
    "ASIDE",
    "FLOATS",
    "NEWEST_TORCH",
    "OLDEST_TORCH",
    "OPTIONAL",
    "PRIVATE_APIS",
    "TRACED",
    "Moved",
    "PrivateApi",
    "find_moved",
    "incompatibility",
    "require_supported_torch",
    "require_torch_version",
]

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 15)
"""The newest release that was tried. A newer one is used all the same, unless something moved."""

SHOWN = 2
"""Moved interfaces that a message names; where one moves, its neighbours mostly move with it."""


def require_supported_torch(*, everything: bool = False) -> None:
    """Checks the installed torch.

    Args:
        everything: also check interfaces that `fuseplan.compile` can do without; see `ASIDE`.

    Raises:
        CompatibilityError: it is older than 2.11, or an interface moved that fuseplan is built on.
    """
    require_torch_version()
    if (text := incompatibility(everything)) is not None:
        raise CompatibilityError(text)


def require_torch_version() -> None:
    """Checks the version of the installed torch.

    Raises:
        CompatibilityError: it is older than 2.11.
    """
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise CompatibilityError(
            f"torch {version} is too old: fuseplan needs torch {_dotted(OLDEST_TORCH)} or newer; pip install -U torch"
        )


@functools.cache
def incompatibility(everything: bool = False) -> str | None:
    """One line on the interfaces that moved in the installed torch, or None.

    Args:
        everything: also check interfaces that `fuseplan.compile` can do without; see `ASIDE`.
    """
    spared = OPTIONAL if everything else OPTIONAL | ASIDE
    moved = find_moved(each for each in PRIVATE_APIS if not spared.issuperset(each.users))
    if not moved:
        return None
    more = f", and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    return (
        f"torch {torch.__version__} has changed private interfaces that fuseplan needs: "
        f"{', '.join(map(str, moved[:SHOWN]))}{more}; "
        f"use torch {_dotted(OLDEST_TORCH)} to {_dotted(NEWEST_TORCH)}, or a newer fuseplan"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
