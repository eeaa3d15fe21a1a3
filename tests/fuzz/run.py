"""Fuzzes one reader, guided by coverage, until it fails: `python -m tests.fuzz.run TARGET FOLDER [-max_total_time=60]`.

FOLDER keeps what reaches new code, and what fails as `crash-*`; further options are libFuzzer's.
"""

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fuseplan"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    _, name, folder, *options = sys.argv
    target = TARGETS[name]
    for seed in target.seeds:
        (Path(folder) / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    limits = ["-timeout=20", "-rss_limit_mb=4096", f"-max_len={4096}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], folder, *limits, *options], lambda content: bool(target(content)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
