"""What every benchmark does with its result: prints it, and on `--write` puts it under `benchmarks/results/`."""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main(name: str, description: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Runs a benchmark from the command line.

    Args:
        name: of the script and of its file of results.
        description: for `--help`.
        what: what is measured, where and in which units.
        measure: yields the figures.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results/{name}.json")
    write = parser.parse_args().write
    result = {
        "what": what,
        "command": f"PYTHONPATH=src python benchmarks/{name}.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, one process, {torch.get_num_threads()} threads",
        **measure(),
    }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if write:
        (Path(__file__).parent / f"results/{name}.json").write_text(text + "\n")
