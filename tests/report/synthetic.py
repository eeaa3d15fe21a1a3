"""A comparison as `explain` makes it of a model whose layers have one contested norm each, without tracing anything.

    all_reduce -> norm -> attention -> all_reduce -> norm -> router, pad -> experts -> (next layer)

Up to 512 tokens the plan fuses all-reduce, norm and pad in one; beyond, all-reduce and norm alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fuseplan.record import (
    Box,
    Comparison,
    CostRow,
    DeviceConstant,
    Drawing,
    Evidence,
    Fusion,
    GraphReport,
    KernelTime,
    Loss,
    Nearness,
    Plan,
    PolicyAt,
    Reason,
    Refusal,
    Report,
    SizePoint,
    SizePrice,
)

RANGES = ((1, 64), (65, 512), (513, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 65, 128, 256, 512, 513, 1024, 2048, 4096, 8192)
PAD, REDUCE, BOTH = "act_padding", "allreduce_rms", "allreduce_rms_padding"
SAVES = {PAD: 2000, REDUCE: 3000, BOTH: 5000}
CLASS = "all_reduce[2] -> add -> rms_norm -> pad 2880:3072 2880 bfloat16 vllm"
ORDERS = ((PAD, REDUCE), (REDUCE, PAD))


@dataclass(frozen=True)
class Synthetic:
    """What to make.

    Attributes:
        layers: how many.
        name: applied to everything that is called by a model or a user.
        graphs: how many graphs, all alike.
        obstructed: layers in which something stands between all-reduce and norm.
        forbid: a selector; then there is a plan without it, too.
    """

    layers: int = 4
    name: Callable[[str], str] = field(default=str)
    graphs: int = 1
    obstructed: Sequence[int] = ()
    forbid: str | None = None

    def comparison(self, *, evidence: bool = True) -> Comparison:
        """All of it."""
        first = self.report("planned")
        reports = (first, *(self.report("ordered", order) for order in ORDERS), self.report("off"))
        return Comparison(
            workload=self.name("model"), tp=2, device="h200", ranges=RANGES, reports=reports, trace_ns=1_500_000_000,
            breaks=(self.name("Call to graph_break()"),) if self.graphs > 1 else (), notes=(self.name("modelled"),),
            unconstrained=self.report("planned") if self.forbid else None,
            evidence=self.evidence(reports) if evidence else None,
        )  # fmt: skip

    def report(self, policy: str, order: tuple[str, ...] = ()) -> Report:
        """What a policy does."""
        spans = [(index, span) for index in range(self.graphs) for span in RANGES]
        return Report(
            policy=policy, order=tuple(map(self.name, order)), rules=tuple(map(self.name, (PAD, REDUCE, BOTH))),
            graphs=tuple(self.graph(f"graph_{index}", span, policy, order) for index, span in spans),
            warnings=(Refusal(reason=Reason.NO_EFFECT, detail=self.name("fuse_norm_quant has no effect")),),
            forbid=(self.forbid,) if self.forbid and policy == "planned" else (),
        )  # fmt: skip

    def graph(self, graph: str, span: tuple[int, int], policy: str, order: tuple[str, ...]) -> GraphReport:
        """What a policy does in one graph and range."""
        winner = order[0] if order else "" if policy == "off" else chosen(span[0])
        applied, lost = [], []
        for layer in range(self.layers if winner else 0):
            fusions = {rule: self.fusion(rule, layer) for rule in SAVES}
            lost += [
                Loss(
                    fusion=fusions[rule], blocked_by=(fusions[winner],), lost_ns=SAVES[winner] - SAVES[rule],
                    flips_at_ns=7000 if rule == REDUCE else None,
                )
                for rule in order or SAVES if rule != winner
            ]  # fmt: skip
            applied.append(fusions[winner])
            if layer:
                applied.append(self.crossing(layer))
        saved = sum(fusion.saving_ns or 0 for fusion in applied)
        sizes = tuple(SizePrice(tokens=tokens, unfused_ns=20_000 * self.layers, saved_ns=saved) for tokens in span)
        matched = {self.name(rule): self.layers for rule in SAVES}
        plan = Plan(
            graph=graph, range=span, device="h200", prices=("modelled",), sites=(), selected=(), rejected=(),
            objective_ns=saved, bound_ns=saved, unfused_ns=20_000 * self.layers, components=self.layers, classes=2,
        )  # fmt: skip
        return GraphReport(
            graph=graph, range=span, applied=tuple(applied), lost=tuple(lost), matched=matched,
            recognized={"pad[2880]": self.layers}, refusals=tuple(self.refusals()), stages_ns={"matching": 2_000_000},
            plan=plan if policy == "planned" else None, sizes=sizes, saved_ns=saved, unfused_ns=20_000 * self.layers,
        )  # fmt: skip

    def refusals(self) -> Iterator[Refusal]:
        """Something in the way in some layers, and a provider that declines in all."""
        for layer in self.obstructed:
            yield Refusal(
                reason=Reason.OP, rule=self.name(REDUCE), op="rms_norm", nearness=Nearness.OBSTRUCTED,
                detail=self.name("aten.mul.Tensor stands between all_reduce and rms_norm"), expected="all_reduce",
                found="aten.mul.Tensor", nodes=(f"mul_{layer}",), source=self.place(layer, "scale"),
                fix=self.name("do it before"), line="model.py:12", code=self.name("x = x * 0.5"),
            )  # fmt: skip
        for layer in range(self.layers):
            yield Refusal(
                reason=Reason.ROUNDING, rule=self.name(REDUCE), op="rms_norm", nearness=Nearness.DECLINED,
                detail="it rounds otherwise", provider="flashinfer", nodes=(f"gone_{layer}",),
                source=self.place(layer, "post_norm"), expected="llama", found="vllm",
            )  # fmt: skip

    def place(self, layer: int, module: str) -> str:
        """A module path."""
        return self.name(f"layers.{layer}.{module}")

    def fusion(self, rule: str, layer: int) -> Fusion:
        """A fusion at the contested norm of a layer."""
        nodes = {PAD: ("post_norm", "pad"), REDUCE: ("reduce", "post_norm"), BOTH: ("reduce", "post_norm", "pad")}
        return Fusion(
            rule=self.name(rule), op=f"{rule}_op", provider="triton", anchor=f"mul_{layer}", site=f"post_norm_{layer}",
            consumed=tuple(f"{node}_{layer}" for node in nodes[rule]), contested_op="fused_add_rms_norm",
            source=self.place(layer, "post_norm"), saving_ns=SAVES[rule], site_class=CLASS,
        )  # fmt: skip

    def crossing(self, layer: int) -> Fusion:
        """The all-reduce at the end of a layer with the first norm of the next."""
        return Fusion(
            rule=self.name(REDUCE), op=f"{REDUCE}_op", provider="triton", anchor=f"first_{layer}",
            consumed=(f"last_{layer - 1}", f"norm_{layer}"), contested_op="fused_add_rms_norm", site=f"norm_{layer}",
            source=self.place(layer, "norm"), saving_ns=3000, site_class="all_reduce[2] -> add -> rms_norm",
        )  # fmt: skip

    def boxes(self) -> tuple[Box, ...]:
        """The drawing of a graph."""
        boxes: list[Box] = []

        def box(node: str, op: str | None, source: str | None, *inputs: int) -> int:
            boxes.append(
                Box(name=node, op=op, ops={f"aten.{op or 'mm'}.default": 1, "aten.view.default": 1}, members=(node,),
                    inputs=inputs, source=source, line="model.py:3", value="bfloat16[s0, 2880]")
            )  # fmt: skip
            return len(boxes) - 1

        stream = box("embedding", None, self.name("embed"))
        for layer in range(self.layers):
            norm = box(f"norm_{layer}", "fused_add_rms_norm", self.place(layer, "norm"), stream)
            attention = box(f"mm_{layer}", None, self.place(layer, "attention"), norm)
            reduce = box(f"reduce_{layer}", "all_reduce", self.place(layer, "attention"), attention)
            if layer in self.obstructed:
                reduce = box(f"mul_{layer}", None, self.place(layer, "scale"), reduce)
            post = box(f"post_norm_{layer}", "fused_add_rms_norm", self.place(layer, "post_norm"), norm, reduce)
            router = box(f"router_{layer}", None, self.place(layer, "router"), post)
            pad = box(f"pad_{layer}", "pad", self.place(layer, "mlp"), post)
            experts = box(f"experts_{layer}", None, self.place(layer, "experts"), router, pad)
            stream = box(f"last_{layer}", "all_reduce", self.place(layer, "experts"), experts)
        box("lm_head", None, self.name("lm_head"), stream)
        return tuple(boxes)

    def evidence(self, reports: Sequence[Report]) -> Evidence:
        """What can be looked up."""
        kernel = KernelTime(name=self.name("fused"), launch=1400, signal=5200, staging=10, memory=300, wire=90)
        alternatives = {"unfused": 12_000, **{f"{rule} {rule}_op triton": 12_000 - SAVES[rule] for rule in SAVES}}
        costs = [
            CostRow(site=CLASS, places=self.layers, alternative=self.name(alternative), tokens=tokens, time_ns=time_ns,
                    spread_ns=0, provenance="modelled", kernels=(kernel, kernel))
            for tokens in (1, 8, 64, 65, 182, 512, 513, 2050, 8192) for alternative, time_ns in alternatives.items()
        ]  # fmt: skip
        measured = CostRow(
            site="rms_norm", places=1, alternative="unfused", tokens=8, time_ns=9000, spread_ns=120,
            provenance="measured", origin=(self.name("measured at 8 tokens; h200"),),
        )  # fmt: skip
        return Evidence(
            drawings=tuple(Drawing(graph=f"graph_{index}", boxes=self.boxes()) for index in range(self.graphs)),
            costs=(*costs, measured), sizes=tuple(self.point(tokens, reports) for tokens in TOKENS),
            constants=(DeviceConstant(name="launch", value=1402, unit="ns", source=self.name("measured")),),
        )  # fmt: skip

    def point(self, tokens: int, reports: Sequence[Report]) -> SizePoint:
        """All policies at one size."""
        each = {self.name(rule): ns * self.layers * self.graphs + tokens for rule, ns in SAVES.items()}
        rows = []
        for report in reports:
            rule = report.order[0] if report.order else self.name(chosen(tokens))
            saved, fused = (0, {}) if report.policy == "off" else (each[rule], {f"{rule} triton": self.layers})
            rows.append(PolicyAt(policy=report.policy, saved_ns=saved, fused=fused))
        return SizePoint(tokens=tokens, unfused_ns=20_000 * self.layers * self.graphs + tokens, policies=tuple(rows))


def chosen(tokens: int) -> str:
    """The rule that the plan applies to the contested norms at a size."""
    return BOTH if tokens <= 512 else REDUCE
