#!/usr/bin/env bash
# torch 2.13.0: numbers and flags that a model was exported with are part of a package of AOTInductor, which takes
# them as arguments all the same, and ignores them. A model that was exported with n=3 multiplies by 3 when it is
# called with n=4, and takes the same way for flag=False as for True. torch.export's own module raises an
# AssertionError, "Guard failed: n == 3". A dynamic dimension's bounds, Dim("rows", min=2, max=8), aren't checked
# either, and with AOTI_RUNTIME_CHECK_INPUTS=1 sizes are and numbers aren't.
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

os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "0")
import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package


class Model(torch.nn.Module):
    def forward(self, x, n, flag):
        return x * n if flag else x - n


def tried(function, *inputs):
    try:
        return str(function(*inputs)[0, 0].item())
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}"


x = torch.ones(3, 2)
rows = torch.export.Dim("rows", min=2, max=8)
program = torch.export.export(Model(), (x, 3, True), dynamic_shapes=({0: rows}, None, None))
loaded = aoti_load_package(aoti_compile_and_package(program, package_path="model.pt2"))
for name, inputs in (("n=3", (x, 3, True)), ("n=4", (x, 4, True)), ("flag=False", (x, 3, False)),
                     ("20 rows", (torch.ones(20, 2), 3, True))):
    print(f"{name}: {tried(Model(), *inputs)} in eager mode, exported {tried(program.module(), *inputs)},",
          f"packaged {tried(loaded, *inputs)}")
PYTHON
cat > expected <<'TEXT'
n=3: 3.0 in eager mode, exported 3.0, packaged 3.0
n=4: 4.0 in eager mode, exported AssertionError, packaged 3.0
flag=False: -2.0 in eager mode, exported AssertionError, packaged 3.0
20 rows: 3.0 in eager mode, exported AssertionError, packaged 3.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
