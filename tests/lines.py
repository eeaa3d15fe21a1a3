"""What commands that can't be served say: one line, and status 2."""

import torch
from typer.testing import Result


def one_line(result: Result) -> str:
    """The line, without the program's name."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fuseplan: ")
    assert not torch.distributed.is_initialized()
    return line.removeprefix("fuseplan: ")
