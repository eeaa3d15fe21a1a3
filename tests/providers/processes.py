"""Scripts of this folder that have to run in a process of their own, and what they print."""

import json
from typing import Any

from tests.forks import Forks, Request


def printed_by(forks: Forks, script: str) -> Any:
    """The JSON that a script of this folder prints in its last line."""
    (outcome,) = forks.outcomes(forks.start(Request(module=f"tests.providers.{script}")))
    assert outcome.status == 0, outcome.output
    return json.loads(outcome.output.splitlines()[-1])
