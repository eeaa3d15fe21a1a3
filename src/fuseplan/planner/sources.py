"""Where prices come from: the model of a device, and the cost table that the user names."""

from collections.abc import Sequence
from pathlib import Path

from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import BUILT_IN_TIMINGS, CostModel, CostTable, cached_table, hardware_of, shipped_table
from fuseplan.planner.prices import Prices
from fuseplan.providers import PROFILES, DeviceProfile, Provider, local_profile


def prices_of(
    config: PassConfig, environment: Environment, device: DeviceProfile | None, providers: Sequence[Provider] = ()
) -> Prices:
    """Prices as a configuration asks for them: the device's model, and the cost table that it or the environment names,
    or else the measurements of `fuseplan tune` on this machine; where the model is allowed as well, the package's table
    adds the rest.

    Args:
        config: names the table, or says whether there is to be one.
        environment: names one, too.
        device: the device to price for; None: this machine's.
        providers: with timings of their own, beside the built-in ones.

    Raises:
        ConfigError: the table is broken or of another device, or `costs` is measured and there is none.
    """
    profile = device or local_profile()
    path = config.cost_table or environment.cost_table
    table = None
    if config.costs != "modelled":
        table = CostTable.load(Path(path), device=profile.name) if path else _unnamed(profile, config.costs)
    if table is None and config.costs == "measured":
        raise ConfigError(
            "costs='measured' needs a cost table: run fuseplan tune, or set cost_table or FUSEPLAN_COSTS to one"
        )
    # A device that is named is priced alike everywhere, but for one that only this machine knows.
    here = (device is None or profile.name not in PROFILES) and profile == local_profile()
    hardware = hardware_of(profile, here=here, multicast=environment.multicast)
    own = {each.name: each.timing for each in providers if each.timing is not None}
    model = CostModel(hardware, timings={**BUILT_IN_TIMINGS, **own})
    return Prices(model=model, table=table, source=config.costs)


def _unnamed(profile: DeviceProfile, costs: str) -> CostTable | None:
    """Measurements made here, if the device is this machine's, and the package's for the device."""
    own = cached_table(profile.name) if profile == local_profile() else None
    shipped = shipped_table(profile.name) if costs == "auto" else None
    return own.before(shipped) if own is not None and shipped is not None else own or shipped
