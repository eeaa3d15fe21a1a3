"""`fuseplan try`: explain, tune and bench one workload on this machine, and say in one sentence how much the plan
gains.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from fuseplan.cli.console import Debug, measuring, one_line_errors, say, show
from fuseplan.cli.ranks import DEADLINE_S, REPEATS, Deadline, Tp, built, command_of, ranks_of
from fuseplan.cli.request import AllowRoundingChanges, Layers, Workload, import_torch
from fuseplan.cli.spelling import check_spelling


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
    """Measure the gain of the plan on this machine: explain WORKLOAD, tune contending fusions, time a step beside plain
    torch.compile, print a verdict, and write the page. The measured costs stay where compile reads them.
    """
    with one_line_errors(debug):
        check_spelling(workload)
        import_torch()
        from fuseplan.config import CompileRange, PassConfig, Policy
        from fuseplan.explanation.comparison import compare
        from fuseplan.measurement.benchmark import bench, check_timing
        from fuseplan.measurement.costs import tune
        from fuseplan.planner.costs import cached_path
        from fuseplan.providers import BUILT_IN_PROVIDERS, local_profile
        from fuseplan.report import check_html, render_bench, render_comparison, save_html
        from fuseplan.report.bench import gain
        from fuseplan.report.summary import untold

        with ranks_of(tp, deadline, "try", debug=debug) as ranks:
            check_timing(repeats, None, (batch,))
            if ranks.rank == 0:
                check_html(html)
            config = PassConfig(cost_table=out, allow_rounding_changes=allow_rounding_changes)
            profile, command = local_profile(), command_of(ranks.size)
            ranges = (CompileRange(start=batch, end=batch),)
            able = tuple(each for each in BUILT_IN_PROVIDERS if each.unavailable() is None)
            with (
                untold(),
                measuring(ranks.rank == 0) as tell,
                built(workload, ranks, layers, weights=True) as made,
            ):
                tune(
                    made.model, made.inputs, table=out or cached_path(profile.name), ranges=ranges, repeats=repeats,
                    config=config, providers=able, ranks=ranks, command=command,
                    watch=lambda step: tell(f"tuning, {step.doing}", step.done, step.total),
                )  # fmt: skip
                found = bench(
                    made.model, made.step, (batch,), workload=workload, policies=[Policy(name="planned")],
                    config=config, repeats=repeats, ranks=ranks, notes=made.notes, command=command, watch=tell,
                )  # fmt: skip
                tell("explaining", 0, 1)
                comparison = compare(
                    made.model, made.inputs, workload=workload, tp=ranks.size, ranges=ranges, device=profile,
                    config=config, build_ns=made.build_ns, providers=able, evidence=True, notes=made.notes,
                )  # fmt: skip
            if ranks.rank == 0:
                save_html(comparison, html)
                verdict = Text(gain(found), style="bold")
                show(Group(verdict, Text(), render_comparison(comparison), Text(), render_bench(found)), False)
                say(f"the report is in {html}")
