"""`fuseplan bench`: the time of a step under each policy and without fuseplan, side by side in one process."""

from pathlib import Path
from typing import Annotated

import typer

from fuseplan.cli.console import Debug, Json, measuring, one_line_errors, say, show
from fuseplan.cli.ranks import DEADLINE_S, REPEATS, Deadline, Tp, built, command_of, ranks_of
from fuseplan.cli.request import AllowRoundingChanges, Layers, Workload, find_policies, import_torch
from fuseplan.cli.spelling import check_files, check_spelling

DEFAULT_BATCHES = (1, 8, 32)


def bench(
    workload: Workload,
    tp: Tp = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="N", help="Sequences that a step decodes; may be repeated. Default: 1, 8, 32."),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="planned, off or ordered(RULE, ...); may be repeated. Default: planned, off, orders that differ. "
            "torch.compile without fuseplan is always timed.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps in a repeat. Default: enough to be read.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often each time is taken, at least 5.")] = REPEATS,
    layers: Layers = None,
    costs: Annotated[Path | None, typer.Option(metavar="FILE", help="A cost table, for the plan.")] = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture, FILE.png and FILE.svg.")] = None,
    deadline: Deadline = DEADLINE_S,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run WORKLOAD with random weights, and show the time of a step under each policy and under plain torch.compile. A
    language model decodes a token for each sequence; a factory's model runs on its inputs, repeated to the size of the
    batch.
    """
    with one_line_errors(debug):
        check_spelling(workload, policies=policies)
        check_files(costs=costs)
        import_torch()
        from fuseplan.compilation.manager import PostGradPassManager
        from fuseplan.config import PassConfig
        from fuseplan.measurement.benchmark import bench as run
        from fuseplan.measurement.benchmark import check_timing
        from fuseplan.report import bench_to_json, check_plot, render_bench, save_plot
        from fuseplan.report.summary import untold

        with ranks_of(tp, deadline, "bench", debug=debug) as ranks:
            sizes = tuple(batches or DEFAULT_BATCHES)
            check_timing(repeats, steps, sizes)
            chosen = find_policies(policies)
            config = PassConfig(cost_table=costs, allow_rounding_changes=allow_rounding_changes)
            PostGradPassManager(config)
            if plot is not None and ranks.rank == 0:
                check_plot(plot)
            with (
                untold(),
                measuring(ranks.rank == 0) as tell,
                built(workload, ranks, layers, weights=True) as made,
            ):
                found = run(
                    made.model, made.step, sizes, workload=workload, policies=chosen, config=config,
                    repeats=repeats, steps=steps, ranks=ranks, notes=made.notes,
                    command=command_of(ranks.size), watch=tell,
                )  # fmt: skip
            if ranks.rank == 0:
                if plot is not None:
                    png, svg = save_plot(found, plot)
                    say(f"the plot is in {png} and {svg}")
                show(bench_to_json(found) if as_json else render_bench(found), as_json)
