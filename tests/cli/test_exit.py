"""How a command ends: quietly, with everything collected that a native module would otherwise complain of."""

import os
import subprocess
import sys
from pathlib import Path

HOLDER = """
import os

class Holder:
    def __init__(self):
        self.me = self  # a cycle: collected, not counted down

    def __del__(self, write=os.write):
        write(1, b"collected\\n")

held = Holder()
"""
COMMAND = "import holder; from fuseplan.cli import main; import sys; sys.argv[1:] = ['rules', '--json']; main()"


def test_what_modules_hold_is_collected_as_a_command_ends(tmp_path: Path) -> None:
    """nanobind and filelock print to standard error where objects outlive their module."""
    (tmp_path / "holder.py").write_text(HOLDER)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout.endswith("collected\n")
    assert done.stderr == ""
