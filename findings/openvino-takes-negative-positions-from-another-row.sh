#!/usr/bin/env bash
# openvino 2026.4.1, CPU: x[rows, columns], one element for each pair, with a negative column takes it from the row
# before, as if x were one long row: x[[0, 1, 2], [-1, -1, -1]] is the last number of rows 2, 0 and 1. So the last token
# of each sequence of a batch, hidden[torch.arange(batch), positions] with positions of -1, or lengths - 1 of an empty
# sequence, is another sequence's. A single position, a list for one axis, x[:, [1, -1]], and negative rows are right.
# torch.export and tracing give the same. Nothing is raised or warned.
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


x = torch.arange(12).view(3, 4)
last = torch.tensor([-1, -1, -1])
print(f"x = {x.tolist()}")
compare("x[[0, 1, 2], last]", lambda x, last: x[torch.arange(3), last], x, last)
compare("x[[0, 2], [1, -1]]", lambda x: x[[0, 2], [1, -1]], x)
compare("x[[0, -1], [1, 2]]", lambda x: x[[0, -1], [1, 2]], x)
compare("x[:, [1, -1]]", lambda x: x[:, [1, -1]], x)
compare("x[[0, 1, 2], -1]", lambda x: x[torch.arange(3), -1], x)
PYTHON
cat > expected <<'TEXT'
x = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
x[[0, 1, 2], last]: [11, 3, 7] of int64, torch [3, 7, 11] of int64
x[[0, 2], [1, -1]]: [1, 7] of int64, torch [1, 11] of int64
x[[0, -1], [1, 2]]: [1, 10] of int64, torch [1, 10] of int64
x[:, [1, -1]]: [[1, 3], [5, 7], [9, 11]] of int64, torch [[1, 3], [5, 7], [9, 11]] of int64
x[[0, 1, 2], -1]: [3, 7, 11] of int64, torch [3, 7, 11] of int64
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
