"""The key of everything that a plan depends on: derived from content, never listed by hand."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import warning_once
from torch.distributed import distributed_c10d
from torch.nn.attention import _cur_sdpa_kernel_backends

from fuseplan.caching.content import Content, Known, content_of, lacking
from fuseplan.config import PassConfig
from fuseplan.dialect import registered_kernel
from fuseplan.distributed.groups import elsewhere
from fuseplan.matching import ExternalPass
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import SavedPlans
from fuseplan.record.files import read_bytes, write_whole
from fuseplan.rules import Rule

log = logging.getLogger("fuseplan")


@dataclass(frozen=True, eq=False)
class Identity:
    """The identity of a pass manager.

    Attributes:
        facts: plain data.
        unordered: rules and providers.
        ordered: passes, which run in the order given.
    """

    facts: Mapping[str, Any]
    unordered: Sequence[Content]
    ordered: Sequence[Content]

    def key(self, **further: Any) -> str | None:
        """The `fingerprint` of all of it and of `further`; None where a user's object has no `uuid()`, which is logged
        once.
        """
        contents = (*self.unordered, *self.ordered)
        unordered, ordered = ([each.key for each in part] for part in (self.unordered, self.ordered))
        if None in unordered or None in ordered:
            tell_cold(user for each in contents for user in each.users)
            return None
        # torch's own key leaves out which attention kernels are enabled: a graph compiled under another `sdpa_kernel`
        # would be found in the cache.
        kernels = [kernel.name for kernel in _cur_sdpa_kernel_backends(with_priority=True)]
        return fingerprint(
            **self.facts, unordered=sorted(map(str, unordered)), ordered=ordered, attention_kernels=kernels, **further
        )

    def __eq__(self, other: object) -> bool:
        """Whether two of this process are equal: a user's function or object without a `uuid()` only equals itself."""
        if not isinstance(other, Identity) or hash(self) != hash(other) or self.facts != other.facts:
            return False
        mine, theirs = ([*_sorted(each.unordered), *each.ordered] for each in (self, other))
        return len(mine) == len(theirs) and all(one.is_same(another) for one, another in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        digests = [sorted(each.digest for each in self.unordered), [each.digest for each in self.ordered]]
        return hash(json.dumps([self.facts, digests], sort_keys=True))


class Keyed(CustomGraphPass):
    """A pass that Inductor caches by content.

    Attributes:
        engine_groups: returns the engine's identifiers of groups, with the names of the process groups behind them.
    """

    engine_groups: Callable[[], Mapping[object, str]]

    @property
    def identity(self) -> Identity:
        """Everything that can change the results of this pass."""
        raise NotImplementedError

    def uuid(self) -> str | None:
        """The key under which Inductor caches results of this pass: a hash of everything that can change them.

        None, so that nothing is cached, where a user's rule, provider or pass has no `uuid()`. A log line names it,
        once a process.
        """
        key = self._key()
        return key and renewed(key)

    def give_up_key(self) -> None:
        """Keeps later runs from finding the graphs compiled now in the cache."""
        if (key := self._key()) is not None:
            renew(key)

    def _key(self) -> str | None:
        # Ranks may join groups after the pass was made.
        return self.identity.key(engine_groups=self.named_groups)

    @property
    def named_groups(self) -> list[str]:
        """The engine's current identifiers of groups, as text."""
        return sorted(map(str, self.engine_groups().items()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keyed) or self.named_groups != other.named_groups:
            return False
        return self is other or self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: Inductor copies its configuration, and reports go to the one callback that the user gave."""
        return self


def _sorted(contents: Sequence[Content]) -> list[Content]:
    return sorted(contents, key=lambda content: content.digest)


def tell_cold(users: Iterable[Any]) -> None:
    """Logs, once a process, which functions and objects keep compiled graphs out of the cache."""
    for user in users:
        if (why := lacking(user)) is not None:
            warning_once(
                log,
                "graphs are compiled anew at every start, since %s may do something else each time: %s. Give it a "
                "uuid() that changes with what it does: a hash of its source file, or a version (%s.uuid = '1')",
                _title(user), why, _title(user).rpartition(".")[2],
            )  # fmt: skip


def renewed(key: str, folder: Path | None = None) -> str:
    """A key, or the one that has replaced it since `renew` last gave it up.

    Args:
        key: as `Identity.key` returns it.
        folder: where renewed keys are stored; None: in Inductor's cache, which is deleted together with its entries.
    """
    try:
        token = read_bytes(_note(key, folder), LARGEST_TOKEN)
    except (OSError, ValueError):
        return key
    return hashlib.sha256(key.encode() + token).hexdigest()


def renew(key: str, folder: Path | None = None) -> None:
    """Gives a key up, since the graph about to be cached under it must not be found again. A pass can't keep Inductor
    from caching a graph: Inductor asked for the key before.
    """
    note = _note(key, folder)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, uuid4().hex)
    except OSError as error:
        warning_once(log, "a failure of this run alone may be served by a warm compile cache: %s", error)


def _note(key: str, folder: Path | None) -> Path:
    return (folder or Path(cache_dir()) / "fuseplan") / "renewed" / key


LARGEST_TOKEN = 64


def _title(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(kind, '__module__', None)}.{kind.__qualname__}"


def fingerprint(**ingredients: Any) -> str:
    """A hash of the ingredients and of the inputs of every plan: fuseplan's source, torch, devices, ranks."""
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
    """A hash of every source file and cost table of this package, by relative path."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def config_key(config: PassConfig) -> str:
    """A configuration by content: selectors have no order, and files count by their contents."""
    plain = replace(config, force=(), forbid=(), cost_table=None, plan=None)
    return content_of([plain, set(config.force), set(config.forbid)]).digest


def rule_content(rule: Rule, known: Known | None = None) -> Content:
    """A rule by content: its pattern as a graph, its other data, and the object itself.

    Args:
        rule: the rule to read.
        known: as for `content_of`.
    """
    pattern = "\n".join(node.format_node() or str(node.args) for node in rule.traced_pattern.graph.nodes)
    schema, data = str(rule.op.overload._schema), [rule.flags, rule.requires, rule.together]
    return content_of([rule.name, rule.core.name, schema, pattern, data, rule], known)


def provider_content(provider: Provider, device: DeviceProfile | None, known: Known | None = None) -> Content:
    """A provider by content: whether it can run, its version, its fused ops, checks and kernels.

    Args:
        provider: the provider to read.
        device: as for `PostGradPassManager`.
        known: as for `content_of`.
    """
    kernels = {name: registered_kernel(name, provider.name) for name in provider.implements}
    parts = [provider.offers(device), kernels]
    is_ours = type(provider).__module__.startswith("fuseplan.") and provider.uuid is None
    itself = parts if is_ours else [provider, sorted(kernels)]
    data = [str(provider.unavailable(device)), str(provider.version()), provider.runs_alone, provider.timing]
    # Data counts beside a `uuid`, which stands for the code.
    said = {
        name: [offer.roundings, None if callable(offer.cost) else offer.cost]
        for name, offer in provider.implements.items()
    }
    return content_of([provider.name, data, provider.vendors, said, itself], known)


def pass_content(graph_pass: Any) -> Content:
    """Another pass by content."""
    if isinstance(graph_pass, ExternalPass):
        itself = graph_pass.matcher if graph_pass.uuid is None else graph_pass
        return content_of([graph_pass.name, graph_pass.saving_us, itself])
    return content_of(graph_pass)


def plans_key(saved: SavedPlans | None) -> list[str]:
    """The fusions of saved plans, with their places."""
    return [f"{plan.graph} {plan.range} {plan.digest}" for plan in saved.plans] if saved else []


def _local_devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _groups() -> list[list[Any]]:
    """The process groups that this process knows by name, with their ranks: kernels support certain numbers of ranks,
    some only on one machine, and graphs only have the names.
    """
    if not dist.is_initialized():
        return []
    names = distributed_c10d._world.pg_names
    return sorted(
        [str(name), group.size(), str(dist.get_backend(group)), bool(elsewhere(str(name)))]
        for group, name in names.items()
    )
