"""A user's settings: `PassConfig`, `CompileRange`, `Policy`, and the only reader of environment variables."""

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from fuseplan.errors import ConfigError

T = TypeVar("T")


def unknown(kind: str, given: str, allowed: Iterable[str]) -> ConfigError:
    """The error for an unknown name: the given one, the nearest spelling, and the allowed ones."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown {kind} {given!r}; {hint}allowed: {', '.join(names)}")


@dataclass(frozen=True, kw_only=True, order=True)
class CompileRange:
    """Numbers of tokens that one graph and one plan serve, both ends included.

    Tokens are the product of the model input's leading dimensions: [B, S] gives B * S.

    Raises:
        ConfigError: an end that isn't an integer of at least 1, or a first after a last.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"compile range {self.start}:{self.end}: {name} must be an integer of at least 1")
        if self.start > self.end:
            raise ConfigError(f"compile range {self.start}:{self.end} is empty; write {self.end}:{self.start}?")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"1:64"`, or `"8"` for 8 tokens alone.

        Raises:
            ConfigError: `text` isn't of that form.
        """
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?::\s*([0-9]{1,18})\s*)?", text)
        if match is None:
            raise ConfigError(f"compile range {text!r} isn't of the form FIRST:LAST, e.g. 1:64")
        return cls(start=int(match[1]), end=int(match[2] or match[1]))

    def __contains__(self, tokens: int) -> bool:
        return self.start <= tokens <= self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def check_ranges(ranges: Sequence[CompileRange]) -> tuple[CompileRange, ...]:
    """The ranges in ascending order.

    Raises:
        ConfigError: one of them is no range, or two overlap.
    """
    given = tuple(ranges) if isinstance(ranges, Iterable) else (ranges,)
    if not all(isinstance(each, CompileRange) for each in given):
        raise ConfigError(f"compile_ranges={ranges!r}: allowed are sequences of e.g. CompileRange(start=1, end=8)")
    ordered = tuple(sorted(given))
    for before, after in itertools.pairwise(ordered):
        if after.start <= before.end:
            raise ConfigError(f"compile ranges {before} and {after} overlap; each number of tokens has one plan")
    return ordered


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How fusions are chosen where several match.

    `planned`: the set that saves the most by the prices of the device, whatever the order of registration.
    `ordered(a, b)`: one pass a rule, applied in this order, each taking all it can; rules not listed are off.
    `off`: reports what would match and rewrites nothing.
    """

    name: str
    order: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"planned"`, `"off"` or `"ordered(act_padding, allreduce_rms)"`.

        Raises:
            ConfigError: none of these forms, an empty order, or a rule listed twice.
        """
        match = re.fullmatch(r"(\w+)\s*(?:\(([^()]*)\))?", text.strip())
        name = match[1] if match else text.strip()
        if match is None or name not in ("planned", "ordered", "off"):
            raise ConfigError(f"unknown policy {text!r}; allowed: planned, off, ordered(RULE, RULE, ...)")
        order = tuple(part.strip() for part in match[2].split(",") if part.strip()) if match[2] else ()
        if name != "ordered" and match[2] is not None:
            raise ConfigError(f"policy {text!r}: {name} takes no rules; write {name}")
        if name == "ordered" and not order:
            raise ConfigError(f"policy {text!r} lists no rules; write e.g. ordered(act_padding, allreduce_rms), or off")
        repeated = [rule for rule, count in Counter(order).items() if count > 1]
        if repeated:
            raise ConfigError(f"policy {text!r} lists {repeated[0]} twice; each rule has one place")
        return cls(name=name, order=order)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.order)})" if self.order else self.name


DEFAULT_POLICY = Policy(name="planned")

COST_SOURCES = ("auto", "measured", "modelled")
VERIFICATIONS = ("first-use", "always", "off")


def _refuse_unknown_flags(cls: type[T]) -> type[T]:
    init: Callable[..., None] = cls.__init__
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)  # help() and documentation show the flags
    def __init__(self: Any, **flags: Any) -> None:
        for flag in flags:
            if flag not in names:
                raise unknown("flag of PassConfig", flag, names)
        init(self, **flags)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_refuse_unknown_flags
@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """Which fusions are on, and how they are chosen. Flag names are those of vLLM's `PassConfig`.

    A fusion flag is True, False or None. None, the default, is on wherever it can have an effect, unless it says
    otherwise below: with a provider for this device and, for all-reduce fusions, with more than one rank. A flag that
    is True and can have no effect is reported as a warning with the reason.

    Attributes:
        fuse_act_padding: RMSNorm (with residual add) + pad, rule `act_padding`.
        fuse_allreduce_rms: all-reduce + (residual add) + RMSNorm, rule `allreduce_rms`.
        fuse_norm_quant: RMSNorm (with residual add) + fp8 quantisation, rule `norm_quant`.
        fuse_act_quant: SiLU-and-mul + fp8 quantisation, rule `act_quant`.
        enable_qk_norm_rope_fusion: RMSNorm of queries and keys + rotary embedding, rule `qk_norm_rope`.
        fuse_rope_cache: rotary embedding + writes of keys and values into a static cache, rule `rope_cache`; with
            `enable_qk_norm_rope_fusion` also behind RMSNorm of queries and keys, rule `qk_norm_rope_cache`.
        fuse_grouped_attention: repeated heads of keys and values + attention, rule `grouped_attention`.
        fuse_eager_attention: attention that the model spells out op by op, rule `eager_attention`.
        fuse_cached_attention: with `fuse_rope_cache` and `fuse_grouped_attention` both of these in one op, rule
            `cached_attention`; with `enable_qk_norm_rope_fusion` also behind RMSNorm of queries and keys, rule
            `qk_norm_cached_attention`; with `fuse_eager_attention` attention that is spelled out, rule
            `cached_eager_attention`. None: as for `fuse_merged_linear`, except spelled-out attention, which is off.
        fuse_merged_linear: linear layers of few rows that read one input, rule `merged_linear`, and gate and up +
            SiLU-and-mul, rule `merged_linear_silu_mul`; None: on for up to 32 tokens on an H100, H200 or GH200, but not
            in vLLM.
        fuse_skinny_linear: single linear layers of few rows, rule `skinny_linear`; None: as for `fuse_merged_linear`.
        fuse_scaled_linear: linear layers of few rows in fp8 with scales of rows, several that read one input, rule
            `merged_scaled_linear`, and single ones, rule `skinny_scaled_linear`; None: as for `fuse_merged_linear`.
        fuse_add_rms_norm: residual add + RMSNorm, rule `add_rms_norm`; None: as for `fuse_merged_linear`.
        eliminate_noops: see through views and casts that do nothing.
        policy: a `Policy` or its text.
        compile_ranges: one graph and one plan for each; empty: one graph and plan for every number of tokens.
        max_fusions: apply only the first n fusions of each plan, in graph order, to bisect a wrong result. Fusions that
            require each other or go together count as one: all of them are applied, or none.
        force: fusions that a plan has to apply: `RULE`, `RULE@PLACE` with a pattern of module paths such as
            `act_padding@model.layers.3.*`, or `RULE#SITE`, each also with `:PROVIDER`. Of several providers the plan
            chooses one.
        forbid: fusions that it must not apply, in the same form.
        costs: `auto`: from the cost table where it has all that a component needs, else from the model; `measured`:
            from the table alone; `modelled`: from the model alone.
        cost_table: a file of costs; default: `FUSEPLAN_COSTS`, or else the measurements of `fuseplan tune` on this
            machine. A named file that is broken is an error.
        plan: a file of saved plans to replay instead of planning; one that doesn't fit is an error.
        node_budget: branch-and-bound nodes a component, after which the best plan found is reported with its bound.
        allow_rounding_changes: allow kernels that round elsewhere than the graph; the report says where.
        verify: `first-use`: before a fused op is applied it is run against the unfused ops on random arguments, once
            for its kernel, signature, versions and hardware; a failed one is not applied. `always`: in every
            compilation. `off`: never.
        agreement_timeout_s: seconds that a rank waits, before the first run of a graph with collectives, for the plans
            of the other ranks; None: the timeout of their process group. After it all of them run the graph unfused.
            Ranks that verify a kernel together wait `verify_timeout_s` longer.
        verify_timeout_s: seconds that one such run may take, the compilation of the kernel included.

    Raises:
        ConfigError: an unknown flag or policy, a value of the wrong type, overlapping ranges, `force` or `plan` under
            another policy than `planned`.
    """

    fuse_act_padding: bool | None = None
    fuse_allreduce_rms: bool | None = None
    fuse_norm_quant: bool | None = None
    fuse_act_quant: bool | None = None
    enable_qk_norm_rope_fusion: bool | None = None
    fuse_rope_cache: bool | None = None
    fuse_grouped_attention: bool | None = None
    fuse_eager_attention: bool | None = None
    fuse_cached_attention: bool | None = None
    fuse_merged_linear: bool | None = None
    fuse_skinny_linear: bool | None = None
    fuse_scaled_linear: bool | None = None
    fuse_add_rms_norm: bool | None = None
    eliminate_noops: bool = True
    policy: Policy | str = DEFAULT_POLICY
    compile_ranges: Sequence[CompileRange] = field(default=())
    max_fusions: int | None = None
    force: Sequence[str] = field(default=())
    forbid: Sequence[str] = field(default=())
    costs: str = "auto"
    cost_table: Path | str | None = None
    plan: Path | str | None = None
    node_budget: int = 20_000
    allow_rounding_changes: bool = False
    verify: str = "first-use"
    verify_timeout_s: float = 300.0
    agreement_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for flag in FUSION_FLAGS:
            if getattr(self, flag) not in (True, False, None):
                raise ConfigError(
                    f"{flag}={getattr(self, flag)!r}: allowed are True, False and None (on where it has an effect)"
                )
        if self.eliminate_noops not in (True, False):
            raise ConfigError(f"eliminate_noops={self.eliminate_noops!r}: allowed are True and False")
        if self.max_fusions is not None and (not isinstance(self.max_fusions, int) or self.max_fusions < 0):
            raise ConfigError(f"max_fusions={self.max_fusions!r}: allowed are None and integers of at least 0")
        if not isinstance(self.policy, Policy):
            object.__setattr__(self, "policy", Policy.parse(str(self.policy)))
        object.__setattr__(self, "compile_ranges", check_ranges(self.compile_ranges))
        self._check_planning()

    def _check_planning(self) -> None:
        for name in ("force", "forbid"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(each, str) for each in value):
                raise ConfigError(f"{name}={value!r}: allowed are sequences of texts, e.g. ('act_padding',)")
            object.__setattr__(self, name, tuple(value))
        if self.costs not in COST_SOURCES:
            raise unknown("source of costs", str(self.costs), COST_SOURCES)
        if self.allow_rounding_changes not in (True, False):
            raise ConfigError(f"allow_rounding_changes={self.allow_rounding_changes!r}: allowed are True and False")
        if not isinstance(self.node_budget, int) or isinstance(self.node_budget, bool) or self.node_budget < 1:
            raise ConfigError(f"node_budget={self.node_budget!r}: allowed are integers of at least 1")
        if self.verify not in VERIFICATIONS:
            raise unknown("verification", str(self.verify), VERIFICATIONS)
        for name in ("verify_timeout_s", "agreement_timeout_s"):
            seconds = getattr(self, name)
            unset = seconds is None and name == "agreement_timeout_s"
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not unset and not (number and 0 < seconds < math.inf):
                raise ConfigError(f"{name}={seconds!r}: allowed are seconds, more than 0 and finite")
        for name in ("cost_table", "plan"):
            if not isinstance(path := getattr(self, name), str | Path | None):
                raise ConfigError(f"{name}={path!r}: allowed are None and paths of files")
        for name in ("force", "plan"):
            if getattr(self, name) and self.chosen_policy.name != "planned":
                raise ConfigError(f"{name} needs policy planned, and the policy is {self.policy}")
        both = sorted(set(self.force) & set(self.forbid))
        if both:
            raise ConfigError(f"{both[0]!r} is forced and forbidden; drop one of them")

    @property
    def chosen_policy(self) -> Policy:
        """`policy`, parsed."""
        assert isinstance(self.policy, Policy)
        return self.policy

    @property
    def policy_is_given(self) -> bool:
        """Whether the policy isn't the default; flags may switch rules of the default off without contradicting it."""
        return self.policy != DEFAULT_POLICY


def settings(config: PassConfig | None) -> PassConfig:
    """A user's settings; None: the defaults.

    Raises:
        ConfigError: they are no `PassConfig`.
    """
    if not isinstance(config, PassConfig | None):
        raise ConfigError(f"config={config!r}: allowed are None and a PassConfig, e.g. PassConfig(policy='off')")
    return config or PassConfig()


FUSION_FLAGS = tuple(each.name for each in fields(PassConfig) if each.type == bool | None)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Environment variables, read once per compiled model.

    Attributes:
        enabled: False where `FUSEPLAN=0`: every graph is left unchanged.
        debug_dir: `FUSEPLAN_DEBUG_DIR`: where graphs before and after, patterns and match tables are written.
        cost_table: `FUSEPLAN_COSTS`: a cost table, where the configuration names none.
        vllm: `FUSEPLAN_VLLM=1`: become vLLM's post-grad pass.
        report_dir: `FUSEPLAN_REPORT_DIR`: where reports of engines are written.
        tune: `FUSEPLAN_TUNE`: where vLLM's workers write measurements of their graphs before they serve.
        multicast: False where `NCCL_NVLS_ENABLE=0`: NCCL doesn't let NVLink's switches add.
    """

    enabled: bool = True
    debug_dir: Path | None = None
    cost_table: Path | None = None
    vllm: bool = False
    report_dir: Path | None = None
    tune: Path | None = None
    multicast: bool = True

    @classmethod
    def read(cls) -> Self:
        """The variables' current values.

        Raises:
            ConfigError: `FUSEPLAN` or `FUSEPLAN_VLLM` is neither 0 nor 1.
        """
        return cls(
            enabled=_switch("FUSEPLAN", default=True),
            debug_dir=_path("FUSEPLAN_DEBUG_DIR"),
            cost_table=_path("FUSEPLAN_COSTS"),
            vllm=_switch("FUSEPLAN_VLLM", default=False),
            report_dir=_path("FUSEPLAN_REPORT_DIR"),
            tune=_path("FUSEPLAN_TUNE"),
            multicast=os.environ.get("NCCL_NVLS_ENABLE", "").strip() != "0",
        )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The variables that `torchrun` sets for its processes.

    Attributes:
        rank: of this process among all.
        local_rank: among those of this machine, which is the number of its GPU.
        ranks: how many there are; 1 where `torchrun` didn't start this process.
        local_ranks: how many of them are on this machine; None where that isn't set.
    """

    rank: int = 0
    local_rank: int = 0
    ranks: int = 1
    local_ranks: int | None = None

    @classmethod
    def read(cls) -> Self:
        """The current `RANK`, `LOCAL_RANK`, `WORLD_SIZE` and `LOCAL_WORLD_SIZE`.

        Raises:
            ConfigError: one of them isn't a number.
        """
        return cls(
            rank=_number("RANK", 0), local_rank=_number("LOCAL_RANK", 0), ranks=_number("WORLD_SIZE", 1),
            local_ranks=_number("LOCAL_WORLD_SIZE", 0) or None,
        )  # fmt: skip


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[0-9]{0,9}", value):
        raise ConfigError(f"{name}={value!r}: allowed are numbers, as torchrun sets them")
    return int(value) if value else default


def _switch(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "").strip()
    if value not in ("0", "1", ""):
        raise ConfigError(f"{name}={value!r}: allowed are 0 (off) and 1 (on)")
    return value == "1" if value else default


def _path(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None
