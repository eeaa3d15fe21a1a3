"""The device of a graph: one that is entirely in the CPU's memory has no use for a GPU's kernels and prices."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from fuseplan.config import Environment, PassConfig
from fuseplan.devices import PROFILES, DeviceProfile, local_vendor
from fuseplan.graph.facts import is_on_cpu
from fuseplan.planner import prices_of
from fuseplan.providers import Provider
from fuseplan.rules import EnabledRules
from fuseplan.verification import Verifier


def is_beside_a_gpu(graph: fx.Graph, device: DeviceProfile | None) -> bool:
    """Whether a graph that is planned for this machine, which has a GPU, is entirely in the CPU's memory."""
    return device is None and local_vendor() != "cpu" and is_on_cpu(graph)


def parts_for_the_cpu(
    config: PassConfig,
    environment: Environment,
    providers: Sequence[Provider],
    enabled_on: Callable[..., EnabledRules],
    verifier_of: Callable[..., Verifier],
) -> dict[str, object]:
    """A manager's attributes for graphs of the CPU, by name. A configured cost table is the GPU's."""
    serving = tuple(each for each in providers if "cpu" in each.vendors)
    modelled, enabled = replace(config, costs="modelled", cost_table=None), enabled_on(device="cpu")
    return {
        "providers": serving, "prices": prices_of(modelled, environment, PROFILES["cpu"], serving),
        "enabled": enabled, "rules": enabled.always, "verifier": verifier_of(providers=serving),
    }  # fmt: skip
