#!/usr/bin/env bash
# torch 2.13.0: a function under torch.compiler.nested_compile_region that was called with two tensors and then with one
# tensor twice ends in an IndexError while it is traced, whatever the backend.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch


@torch.compiler.nested_compile_region
def region(x, residual):
    return x + residual, x * 2


def apart(x, residual):
    total, twice = region(x, residual)
    return region(total, twice)


def same(x, residual):
    total, _ = region(x, residual)
    return region(total, total)


for function in (apart, same):
    torch._dynamo.reset()
    try:
        torch.compile(function, backend="eager")(torch.ones(4), torch.ones(4))
        print(function.__name__, "compiled")
    except Exception as error:
        print(function.__name__, type(error).__name__, str(error).splitlines()[0])
PYTHON
cat > expected <<'TEXT'
apart compiled
same IndexError list index out of range
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
