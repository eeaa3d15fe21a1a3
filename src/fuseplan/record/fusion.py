"""A plan's choice at one place: a fusion, the losses to it, and classes of equal contests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One match of one rule, whether it was applied or not.

    Attributes:
        rule: the rule's name, e.g. `allreduce_rms`.
        op: the fused op, e.g. `all_reduce_fused_add_rms_norm`.
        provider: runs the kernel.
        anchor: the node of the graph as Inductor made it whose value the match is named after.
        consumed: the canonical nodes that the fusion takes, by name.
        contested_op: the dialect op that other fusions could want too: the core of the match.
        site: the name of the place, shared by all its candidates: the core's node.
        source: module path in the user's model, if known.
        saving_ns: its saving, weighted over the sizes of the range; None where nothing was priced.
        rounding_change: the graph's convention and the kernel's, where the configuration lets them differ.
        site_class: the class of its site, whose sites all cost the same, as `CostRow.site` names it; None for somebody
            else's pass.
        provenance: how the saving is known: `measured` or `modelled`; `declared` by its owner; else `assumed`.
        low_ns: the lower end of the interval that holds the saving in 80 of 100 cases; None where that isn't known.
        high_ns: its upper end.
    """

    rule: str
    op: str
    provider: str
    anchor: str
    consumed: tuple[str, ...]
    contested_op: str
    site: str
    source: str | None = None
    saving_ns: int | None = None
    rounding_change: tuple[str, str] | None = None
    site_class: str | None = None
    provenance: str = "modelled"
    low_ns: int | None = None
    high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A fusion that matched and was not applied.

    Attributes:
        fusion: the fusion.
        blocked_by: the applied ones that took its nodes; empty where it was not worth it.
        lost_ns: how much less would be saved with it; negative where more would be, which happens under `ordered`.
        flips_at_ns: the longest time of its op at which it would be applied; None where no time is short enough.
        forbidden: whether it was ruled out by `PassConfig.forbid`.
        lost_low_ns: the lower end of the interval of `lost_ns`; None where that isn't known.
        lost_high_ns: its upper end.
    """

    fusion: Fusion
    blocked_by: tuple[Fusion, ...]
    lost_ns: int | None = None
    flips_at_ns: int | None = None
    forbidden: bool = False
    lost_low_ns: int | None = None
    lost_high_ns: int | None = None

    @property
    def margin(self) -> float:
        """`lost_ns`, infinite where that isn't known."""
        return float("inf") if self.lost_ns is None else self.lost_ns


@dataclass(frozen=True, kw_only=True)
class SizePrice:
    """The contested sites of a graph at one size.

    Attributes:
        tokens: the size.
        unfused_ns: as Inductor leaves them.
        saved_ns: the saving of the applied fusions.
        all_reduces: the kernels of their unfused all-reduces, as far as these are modelled, e.g. `NCCL ring LL`.
        saved_low_ns: the lower end of the interval of `saved_ns`; None where that isn't known.
        saved_high_ns: its upper end.
    """

    tokens: int
    unfused_ns: int
    saved_ns: int
    all_reduces: tuple[str, ...] = ()
    saved_low_ns: int | None = None
    saved_high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class ConflictClass:
    """All places at which one rule took the nodes that another wanted, counted.

    Attributes:
        rules: the rules involved, sorted.
        op: the dialect op they contend for.
        count: in how many places, over all graphs and ranges.
        winner: the rule that took it, or `unfused` where leaving it to Inductor is cheaper.
        loser: the rule that got nothing there.
        sources: the places in the user's model.
        lost_us: how much less a place would save if the loser were applied there, by its best provider: the mean over
            places; negative where it would save more.
        flips_at_us: the longest time of the loser's op at which it would be applied, the mean over places; None where
            no time is short enough.
        lost_low_us: the lower end of the interval of `lost_us`; None where that isn't known.
        lost_high_us: its upper end.
    """

    rules: tuple[str, ...]
    op: str
    count: int
    winner: str
    loser: str
    sources: tuple[str, ...] = ()
    lost_us: float | None = None
    flips_at_us: float | None = None
    lost_low_us: float | None = None
    lost_high_us: float | None = None
