"""Where prices come from: the model of a device, and the cost table that the user names."""

from pathlib import Path

from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import CostModel, CostTable, cached_table, hardware_of
from fuseplan.planner.pricing import Prices
from fuseplan.providers import PROFILES, DeviceProfile, local_profile


def prices_of(config: PassConfig, environment: Environment, device: DeviceProfile | None) -> Prices:
    """Prices as a configuration asks for them: the device's model, and the cost table that it or the environment names,
    or else what `fuseplan tune` has measured on this machine.

    Raises:
        ConfigError: the table is broken or of another device, or `costs` is measured and there is none.
    """
    profile = device or local_profile()
    path = config.cost_table or environment.cost_table
    table = None
    if config.costs != "modelled":
        table = CostTable.load(Path(path), device=profile.name) if path else _cached(profile)
    if table is None and config.costs == "measured":
        raise ConfigError(
            "costs='measured' needs a cost table: run fuseplan tune, or set cost_table or FUSEPLAN_COSTS to one"
        )
    # A device that is named is priced alike everywhere, but for one that only this machine knows.
    here = (device is None or profile.name not in PROFILES) and profile == local_profile()
    hardware = hardware_of(profile.name, profile.vendor, here=here)
    return Prices(model=CostModel(hardware), table=table, source=config.costs)


def _cached(profile: DeviceProfile) -> CostTable | None:
    """What was measured here, if the device is the one that is here."""
    return cached_table(profile.name) if profile == local_profile() else None
