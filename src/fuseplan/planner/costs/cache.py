"""Cost tables that nobody has to name: this machine's, beside Inductor's cache, where `fuseplan tune` writes by
default; and those of the package, a file a device.
"""

import logging
from functools import cache
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import warning_once

from fuseplan.errors import ConfigError
from fuseplan.planner.costs.table import CostTable

log = logging.getLogger("fuseplan")

SHIPPED = Path(__file__).with_name("tables")
"""Tables of the package, each called as its device's profile; `benchmarks/ship_costs.py` writes them."""


def cached_path(device: str) -> Path:
    """The file, which need not be there.

    Args:
        device: the profile's name.
    """
    return Path(cache_dir()) / "fuseplan" / "costs" / f"{device}.json"


def cached_table(device: str) -> CostTable | None:
    """The table in that file. None where the file is missing, or broken, which is logged."""
    path = cached_path(device)
    try:
        return CostTable.load(path, device=device)
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            warning_once(log, "measured costs are ignored: %s; delete it, and tune again", error)
        return None


@cache
def shipped_table(device: str) -> CostTable | None:
    """The package's table for a device; None where it has none."""
    path = SHIPPED / f"{device}.json"
    return CostTable.load(path, device=device) if path.exists() else None
