#!/usr/bin/env bash
# openvino 2026.4.1, CPU: functions that give int64 for small integers in torch keep their dtype: cumsum of bools is
# true and false, where torch counts them, as positions are made of masks; of int8 it wraps around, and prod of uint8
# stops at 255. sum is int64, and right. A clamp of integers by a float bound stays an integer: 3 up to 2.5 is 2.
# Products and sums of int8 and uint8 stop at the ends of their range, where torch's and NumPy's wrap around:
# 100 * 100 is 127, not 16. Nothing is raised or warned.
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
    found, wanted = converted([tensor.numpy() for tensor in given])[0], function(*given)
    print(f"{name}: {found.tolist()} of {found.dtype}, torch {wanted.tolist()} of {str(wanted.dtype)[6:]}")


bytes_, small = torch.tensor([200, 2], dtype=torch.uint8), torch.tensor([100, 100], dtype=torch.int8)
compare("cumsum of bools", lambda mask: mask.cumsum(0), torch.tensor([True, True, False, True]))
compare("sum of bools", lambda mask: mask.sum(), torch.tensor([True, True, False, True]))
compare("cumsum of int8", lambda x: x.cumsum(0), small)
compare("prod of uint8", lambda x: x.prod(), bytes_)
compare("clamp(0, 2.5) of int64", lambda x: x.clamp(0, 2.5), torch.tensor([1, 3]))
compare("x * x of int8", lambda x: x * x, small)
compare("x + x of uint8", lambda x: x + x, bytes_)
compare("x - 100 of uint8", lambda x: x - 100, bytes_)
PYTHON
cat > expected <<'TEXT'
cumsum of bools: [True, True, True, True] of bool, torch [1, 2, 2, 3] of int64
sum of bools: 3 of int64, torch 3 of int64
cumsum of int8: [100, -56] of int8, torch [100, 200] of int64
prod of uint8: 255 of uint8, torch 400 of int64
clamp(0, 2.5) of int64: [1, 2] of int64, torch [1.0, 2.5] of float32
x * x of int8: [127, 127] of int8, torch [16, 16] of int8
x + x of uint8: [255, 4] of uint8, torch [144, 4] of uint8
x - 100 of uint8: [100, 0] of uint8, torch [100, 158] of uint8
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
