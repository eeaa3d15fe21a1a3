#!/usr/bin/env bash
# torch 2.13.0: a buffer of one number that a model writes, a step count or the position in a KV cache, is written
# into the code of a package of AOTInductor as a constant: each call starts from the value that it was exported with.
# torch.export's own module and torch.compile count. A buffer of two numbers or more is kept from call to call, in the
# package too.
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
from torch._inductor import aoti_compile_and_package, aoti_load_package


class Model(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("steps", torch.zeros(shape))

    def forward(self, x):
        self.steps.add_(1)
        return x + self.steps.max()


x = torch.zeros(2)
for shape in ((), (1,), (2,)):
    program = torch.export.export(Model(*shape), (x,))
    loaded = aoti_load_package(aoti_compile_and_package(program, package_path="model.pt2"))
    functions = {"packaged": loaded, "exported": program.module(), "compiled": torch.compile(Model(*shape))}
    counts = (f"{name} {[int(function(x)[0]) for _ in range(3)]}" for name, function in functions.items())
    print(f"shape {shape}:", ", ".join(counts))
PYTHON
cat > expected <<'TEXT'
shape (): packaged [1, 1, 1], exported [1, 2, 3], compiled [1, 2, 3]
shape (1,): packaged [1, 1, 1], exported [1, 2, 3], compiled [1, 2, 3]
shape (2,): packaged [1, 2, 3], exported [1, 2, 3], compiled [1, 2, 3]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
