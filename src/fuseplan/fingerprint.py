"""What a plan depends on, as a key: derived from content, never listed by hand."""

import hashlib
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.custom_graph_pass import CustomGraphPass

from fuseplan.providers import DeviceProfile, Provider
from fuseplan.rules import Rule


def fingerprint(**ingredients: Any) -> str:
    """A hash of the ingredients and of what every plan depends on: fuseplan's source, torch, devices, ranks."""
    everything = {
        **ingredients,
        "source": source_digest(),
        "torch": torch.__version__,
        "devices": _local_devices(),
        "world": [dist.get_world_size(), str(dist.get_backend())] if dist.is_initialized() else [1, None],
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


def rule_key(rule: Rule) -> list[str]:
    """A rule by content: its pattern as a graph, its fused op, its couplings, and the source of its class."""
    pattern = "\n".join(node.format_node() or str(node.args) for node in rule.traced_pattern.graph.nodes)
    couplings = f"{sorted(rule.requires)} {rule.together}"
    return [rule.name, str(rule.op.overload._schema), pattern, couplings, _source(type(rule))]


def provider_key(provider: Provider, device: DeviceProfile | None) -> list[str]:
    """A provider by content: whether it can run, its version, what it implements and accepts."""
    accepts = {
        name: [_source(offer.accepts), sorted(offer.roundings or ())]
        for name, offer in sorted(provider.offers(device).items())
    }
    return [provider.name, str(provider.unavailable(device)), str(provider.version()), json.dumps(accepts)]


def pass_key(graph_pass: Any) -> str:
    """Another custom pass: by its own uuid where it has one, else by its source."""
    if isinstance(graph_pass, CustomGraphPass):
        return str(graph_pass.uuid())
    return f"{getattr(graph_pass, '__module__', '')}.{getattr(graph_pass, '__qualname__', '')}:{_source(graph_pass)}"


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return repr(thing)


def _local_devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
