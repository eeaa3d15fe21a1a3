"""Scripts of this folder that have to run in a process of their own, and what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def printed_by(script: str, **environment: str) -> Any:
    """The JSON that a script of this folder prints, whose environment has these variables, too."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.providers.{script}"], check=False, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
