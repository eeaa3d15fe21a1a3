"""Where prices come from: the model of a device, and the cost table that the user names."""

from pathlib import Path

from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import HARDWARE, CostModel, CostTable
from fuseplan.planner.pricing import Prices
from fuseplan.providers import DeviceProfile, local_profile


def prices_of(config: PassConfig, environment: Environment, device: DeviceProfile | None) -> Prices:
    """Prices as a configuration asks for them: the device's model, and the cost table that it or the environment names.

    Raises:
        ConfigError: the table is broken or of another device, or `costs` is measured and there is none.
    """
    profile = device or local_profile()
    path = config.cost_table or environment.cost_table
    if path is None and config.costs == "measured":
        raise ConfigError("costs='measured' needs a cost table: set cost_table or FUSEPLAN_COSTS")
    table = CostTable.load(Path(path), device=profile.name) if path and config.costs != "modelled" else None
    return Prices(model=CostModel(HARDWARE[profile.name]), table=table, source=config.costs)
