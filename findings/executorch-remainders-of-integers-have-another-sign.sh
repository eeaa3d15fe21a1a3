#!/usr/bin/env bash
# executorch 1.5.1, the kernels of its own runtime (portable): a % b of integers has the sign of a, as in C: -5 % 3 is
# -2, and 1 in torch and Python, by a tensor as by a number, int32, int64 and int8. Of floats it is 1, and a // b is
# rounded down, so that a // b * b + a % b is no longer a for integers. Positions in rings of a KV cache and of windows
# are such remainders, and a negative one is outside. Nothing is raised or warned.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install executorch==1.5.1
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from executorch.exir import to_edge
from executorch.runtime import Runtime


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def run(function, *given):
    program = to_edge(torch.export.export(Model(function), given)).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    return method.execute(list(given))[0].clone()


for dtype in (torch.int32, torch.int64, torch.int8, torch.float32):
    a, b = torch.tensor([5, -5, 7, -7], dtype=dtype), torch.tensor([3, 3, -3, -3], dtype=dtype)
    print(f"{dtype}: a = {a.tolist()}, b = {b.tolist()}")
    functions = {"a % b": lambda a, b: a % b, "a % 3": lambda a, b: a % 3 + b - b}
    functions["a // b * b + a % b"] = lambda a, b: a // b * b + a % b
    for name, function in functions.items():
        print(f"{name}: {run(function, a, b).tolist()}, torch {function(a, b).tolist()}")
PYTHON
cat > expected <<'TEXT'
torch.int32: a = [5, -5, 7, -7], b = [3, 3, -3, -3]
a % b: [2, -2, 1, -1], torch [2, 1, -2, -1]
a % 3: [2, -2, 1, -1], torch [2, 1, 1, 2]
a // b * b + a % b: [5, -8, 10, -7], torch [5, -5, 7, -7]
torch.int64: a = [5, -5, 7, -7], b = [3, 3, -3, -3]
a % b: [2, -2, 1, -1], torch [2, 1, -2, -1]
a % 3: [2, -2, 1, -1], torch [2, 1, 1, 2]
a // b * b + a % b: [5, -8, 10, -7], torch [5, -5, 7, -7]
torch.int8: a = [5, -5, 7, -7], b = [3, 3, -3, -3]
a % b: [2, -2, 1, -1], torch [2, 1, -2, -1]
a % 3: [2, -2, 1, -1], torch [2, 1, 1, 2]
a // b * b + a % b: [5, -8, 10, -7], torch [5, -5, 7, -7]
torch.float32: a = [5.0, -5.0, 7.0, -7.0], b = [3.0, 3.0, -3.0, -3.0]
a % b: [2.0, 1.0, -2.0, -1.0], torch [2.0, 1.0, -2.0, -1.0]
a % 3: [2.0, 1.0, 1.0, 2.0], torch [2.0, 1.0, 1.0, 2.0]
a // b * b + a % b: [5.0, -5.0, 7.0, -7.0], torch [5.0, -5.0, 7.0, -7.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
