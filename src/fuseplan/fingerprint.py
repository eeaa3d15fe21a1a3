"""What a plan depends on, as a key: derived from content, never listed by hand."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed import distributed_c10d

from fuseplan.config import PassConfig
from fuseplan.content import content_of
from fuseplan.dialect import registered_kernel
from fuseplan.distributed.groups import elsewhere
from fuseplan.matching import ExternalPass
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import SavedPlans
from fuseplan.rules import Rule


def fingerprint(**ingredients: Any) -> str:
    """A hash of the ingredients and of what every plan depends on: fuseplan's source, torch, devices, ranks."""
    everything = {
        **ingredients,
        "source": source_digest(),
        "torch": torch.__version__,
        "devices": _local_devices(),
        "groups": _groups(),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


@cache
def source_digest() -> str:
    """A hash of every source file of this package, by relative path."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def config_key(config: PassConfig) -> str:
    """A configuration by content: what is forced and forbidden has no order, and files count by what is in them."""
    plain = replace(config, force=(), forbid=(), cost_table=None, plan=None)
    return content_of([plain, set(config.force), set(config.forbid)])


def rule_key(rule: Rule) -> list[str]:
    """A rule by content: its pattern as a graph, its ops, and its class with all that its own fields say."""
    pattern = "\n".join(node.format_node() or str(node.args) for node in rule.traced_pattern.graph.nodes)
    return [rule.name, str(rule.op.overload._schema), pattern, content_of([rule, rule.op, rule.core])]


def provider_key(provider: Provider, device: DeviceProfile | None) -> list[str]:
    """A provider by content: whether it can run, its version, what it implements, accepts and runs it by."""
    kernels = {name: registered_kernel(name, provider.name) for name in provider.implements}
    content = content_of([provider.offers(device), kernels])
    return [provider.name, str(provider.unavailable(device)), str(provider.version()), content]


def pass_key(graph_pass: Any) -> str:
    """Another pass: by its own uuid where it has one, else by content."""
    if isinstance(graph_pass, CustomGraphPass):
        return str(graph_pass.uuid())
    if isinstance(graph_pass, ExternalPass):
        entries = sorted(map(content_of, graph_pass.entries))
        return content_of([graph_pass.name, graph_pass.saving_us, entries])
    return content_of(graph_pass)


def plans_key(saved: SavedPlans | None) -> list[str]:
    """What saved plans apply where."""
    return [f"{plan.graph} {plan.range} {plan.digest}" for plan in saved.plans] if saved else []


def _local_devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _groups() -> list[list[Any]]:
    """The process groups that this process knows by name: a kernel serves some numbers of ranks, and some only those of
    one machine, and graphs have names alone.
    """
    if not dist.is_initialized():
        return []
    names = distributed_c10d._world.pg_names
    return sorted(
        [str(name), group.size(), str(dist.get_backend(group)), bool(elsewhere(str(name)))]
        for group, name in names.items()
    )
