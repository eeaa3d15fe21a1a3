"""Which torch fuseplan works with."""

import torch

from fuseplan.errors import CompatibilityError

OLDEST_TORCH = (2, 11)


def require_supported_torch(version: str | None = None) -> None:
    """Checks a torch version, by default that of the torch that is installed.

    Raises:
        CompatibilityError: it is older than 2.11.
    """
    version = version or torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CompatibilityError(
            f"torch {version} is too old: fuseplan needs torch {oldest} or newer; pip install -U torch"
        )
