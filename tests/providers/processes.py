"""Scripts of this folder that have to run in a process of their own, and what they print."""

import json
from typing import Any

from tests.forks import Forks, Request


def printed_by(forks: Forks, script: str, *arguments: str) -> Any:
    """The JSON that a script of this folder prints in its last line."""
    request = Request(module=f"tests.providers.{script}", processes=((arguments, {}),))
    (outcome,) = forks.outcomes(forks.start(request))
    assert outcome.status == 0, outcome.output
    return json.loads(outcome.output.splitlines()[-1])
