"""`fuseplan try`: explain, tune and bench one workload on this machine, and say in one sentence what the plan gains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from fuseplan.cli.console import Debug, measuring, one_line_errors, say, show
from fuseplan.cli.ranks import DEADLINE_S, REPEATS, Deadline, Tp, built, command_of, ranks_of
from fuseplan.cli.request import AllowRoundingChanges, Layers, Workload, import_torch
from fuseplan.cli.spelling import check_spelling

Tell = Callable[[str, int, int], None]


def attempt(
    workload: Workload,
    tp: Tp = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences that a step decodes.")] = 1,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often each time is taken, at least 5.")] = REPEATS,
    layers: Layers = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cost table to write to. Default: the one that is read by default."),
    ] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("fuseplan.html"),
    deadline: Deadline = DEADLINE_S,
    debug: Debug = False,
) -> None:
    """Measure on this machine what the plan gains: explain WORKLOAD, tune what contends, time a step beside plain
    torch.compile, print a verdict, and write the page. The measured costs stay where compile reads them.
    """
    with one_line_errors(debug):
        check_spelling(workload)
        import_torch()
        from fuseplan.config import PassConfig
        from fuseplan.measurement.benchmark import check_timing
        from fuseplan.report import check_html, render_bench, render_comparison, save_html
        from fuseplan.report.bench import gain
        from fuseplan.report.summary import untold

        with ranks_of(tp, deadline, "try", debug=debug) as ranks:
            check_timing(repeats, None, (batch,))
            config = PassConfig(allow_rounding_changes=allow_rounding_changes)
            if ranks.rank == 0:
                check_html(html)
            with (
                untold(),
                measuring(ranks.rank == 0) as tell,
                built(workload, ranks, layers, weights=True) as made,
            ):
                steps = _Steps(made, workload, batch, repeats, ranks, config, out, tell)
                steps.tune()
                found = steps.bench()
                comparison = steps.explain()
            if ranks.rank == 0:
                save_html(comparison, html)
                show(
                    Group(
                        Text(gain(found), style="bold"),
                        Text(),
                        render_comparison(comparison),
                        Text(),
                        render_bench(found),
                    ),
                    False,
                )
                say(f"the report is in {html}")


class _Steps:
    """The parts of it, each on the model that was built once."""

    def __init__(
        self,
        made: Any,
        workload: str,
        batch: int,
        repeats: int,
        ranks: Any,
        config: Any,
        out: Path | None,
        tell: Tell,
    ) -> None:
        from fuseplan.config import CompileRange
        from fuseplan.planner.costs import cached_path
        from fuseplan.providers import BUILT_IN_PROVIDERS, local_profile

        self.made, self.workload, self.batch, self.repeats = made, workload, batch, repeats
        self.ranks, self.tell = ranks, tell
        self.profile = local_profile()
        self.table = out or cached_path(self.profile.name)
        self.config = replace(config, cost_table=out)
        self.ranges = (CompileRange(start=batch, end=batch),)
        self.providers = tuple(each for each in BUILT_IN_PROVIDERS if each.unavailable() is None)

    def tune(self) -> None:
        """Measures what contends, at the size of the step."""
        from fuseplan.measurement.costs import tune

        tune(
            self.made.model, self.made.inputs, table=self.table, ranges=self.ranges, repeats=self.repeats,
            config=self.config, providers=self.providers, ranks=self.ranks, command=command_of(self.ranks.size),
            watch=lambda step: self.tell(f"tuning, {step.doing}", step.done, step.total),
        )  # fmt: skip

    def bench(self) -> Any:
        """Times a step under the plan and under plain torch.compile."""
        from fuseplan.config import Policy
        from fuseplan.measurement.benchmark import bench

        return bench(
            self.made.model, self.made.step, (self.batch,), workload=self.workload, policies=[Policy(name="planned")],
            config=self.config, repeats=self.repeats, ranks=self.ranks, notes=self.made.notes,
            command=command_of(self.ranks.size), watch=self.tell,
        )  # fmt: skip

    def explain(self) -> Any:
        """What the plan does, by the prices that were measured."""
        from fuseplan.explanation.comparison import compare

        self.tell("explaining", 0, 1)
        return compare(
            self.made.model, self.made.inputs, workload=self.workload, tp=self.ranks.size, ranges=self.ranges,
            device=self.profile, config=self.config, build_ns=self.made.build_ns, providers=self.providers,
            evidence=True, notes=self.made.notes,
        )  # fmt: skip
