"""What every benchmark does with its result: prints it, and on `--write` puts it under `benchmarks/results/`."""

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

NO_OPTIONS: Mapping[str, str] = {}


def main(
    name: str, description: str, what: str, measure: Callable[..., dict[str, Any]],
    options: Mapping[str, str] = NO_OPTIONS,
) -> None:  # fmt: skip
    """Runs a benchmark from the command line.

    Args:
        name: of the script and of its file of results.
        description: for `--help`.
        what: what is measured, where and in which units.
        measure: yields the figures; it takes the options by name, None where one isn't given.
        options: further ones that have a value, and what `--help` says of them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results/{name}.json")
    for option, text in options.items():
        parser.add_argument(f"--{option}", help=text)
    given = vars(parser.parse_args())
    write = given.pop("write")
    asked = [part for option, value in given.items() if value is not None for part in (f"--{option}", value)]
    result = {
        "what": what,
        "command": f"PYTHONPATH=src python benchmarks/{name}.py {shlex.join([*asked, '--write'])}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, one process, {torch.get_num_threads()} threads",
        **measure(**given),
    }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if write:
        (Path(__file__).parent / f"results/{name}.json").write_text(text + "\n")
