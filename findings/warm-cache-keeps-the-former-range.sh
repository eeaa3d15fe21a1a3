#!/usr/bin/env bash
# torch 2.13.0: the range of a dynamic size is part of what Inductor's cache holds, and not of its key. A function that was
# compiled for sizes up to 48 can't be compiled for sizes up to 49 while the cache is warm; with a cold one it can.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import os
import tempfile

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
import torch


def function(x):
    return x.cos() + 1


for most, cold in ((48, False), (49, False), (49, True)):
    torch._dynamo.reset()
    x = torch.randn(8)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=most)
    try:
        with torch._inductor.config.patch(force_disable_caches=cold):
            torch.compile(function)(x)
        print(most, "cold" if cold else "warm", "compiled")
    except Exception as error:
        print(most, "cold" if cold else "warm", type(error).__name__)
PYTHON
cat > expected <<'TEXT'
48 warm compiled
49 warm ConstraintViolationError
49 cold compiled
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
