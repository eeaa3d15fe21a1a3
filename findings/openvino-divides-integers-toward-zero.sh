#!/usr/bin/env bash
# openvino 2026.4.1, CPU: a division of integers that rounds down, `//` or torch.div(rounding_mode="floor"), becomes one
# that cuts the fraction off where the result is negative: -5 // 3 is -1, and -2 in torch, NumPy and Python, by a number
# as by a tensor, int32 and int64. The remainder, %, is floored as in torch, so a // b * b + a % b is no longer a.
# torch.div(rounding_mode="trunc") of floats goes through int32: 3e9 / 1 is -2147483648. Offsets of relative positions
# and of windows are such divisions. Nothing is raised or warned.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install openvino==2026.4.1 packaging==26.3
cd "$folder"
cat > finding.py <<'PYTHON'
import openvino
import torch


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def compare(name, function, *given):
    exported = torch.export.export(Model(function), given)
    converted = openvino.compile_model(openvino.convert_model(exported), "CPU")
    found = converted([tensor.numpy() for tensor in given])[0]
    print(f"{name}: {found.tolist()}, torch {function(*given).tolist()}")


for dtype in (torch.int32, torch.int64):
    a, b = torch.tensor([5, -5, 7, -7], dtype=dtype), torch.tensor([3, 3, -3, -3], dtype=dtype)
    print(f"{dtype}: a = {a.tolist()}, b = {b.tolist()}")
    compare("a // b", lambda a, b: a // b, a, b)
    compare("a // 3", lambda a: a // 3, a)
    compare("a % b", lambda a, b: a % b, a, b)
    compare("a // b * b + a % b", lambda a, b: a // b * b + a % b, a, b)
x = torch.tensor([3e9, -2.5])
compare("floor of floats", lambda x: x // 2, x)
compare("trunc of floats", lambda x: torch.div(x, 1, rounding_mode="trunc"), x)
PYTHON
cat > expected <<'TEXT'
torch.int32: a = [5, -5, 7, -7], b = [3, 3, -3, -3]
a // b: [1, -1, -2, 2], torch [1, -2, -3, 2]
a // 3: [1, -1, 2, -2], torch [1, -2, 2, -3]
a % b: [2, 1, -2, -1], torch [2, 1, -2, -1]
a // b * b + a % b: [5, -2, 4, -7], torch [5, -5, 7, -7]
torch.int64: a = [5, -5, 7, -7], b = [3, 3, -3, -3]
a // b: [1, -1, -2, 2], torch [1, -2, -3, 2]
a // 3: [1, -1, 2, -2], torch [1, -2, 2, -3]
a % b: [2, 1, -2, -1], torch [2, 1, -2, -1]
a // b * b + a % b: [5, -2, 4, -7], torch [5, -5, 7, -7]
floor of floats: [1500000000.0, -2.0], torch [1500000000.0, -2.0]
trunc of floats: [-2147483648.0, -2.0], torch [3000000000.0, -2.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
