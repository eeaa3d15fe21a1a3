#!/usr/bin/env bash
# executorch 1.5.1, the kernels of its own runtime (portable): nonzero() gives a tensor whose strides say columns, (1,
# n), as torch's does, and its kernel writes it by rows. So the numbers are those of other positions, where there are
# two dimensions or more: of [[5, 0], [3, 4]] they are [0, 0], [0, 1] and [1, 1]; in torch [0, 0], [1, 0] and [1, 1].
# [0, 1] is a zero; others are outside of the tensor. Their columns and products fail with an error, and x[x > 0] is
# right. Tokens and boxes that the caller picks by a model's positions are others. Nothing is raised or warned.
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


def positions(x):
    return x.nonzero()


for x in ([[5, 0], [3, 4]], [[0, 0, 7], [8, 0, 0]], [[[0, 1], [0, 0]], [[0, 0], [1, 0]]], [0, 1, 1]):
    x = torch.tensor(x)
    found = run(positions, x)
    print(f"{x.tolist()}: {found.tolist()}, strides {found.stride()}, torch {positions(x).tolist()}")
PYTHON
cat > expected <<'TEXT'
[[5, 0], [3, 4]]: [[0, 0], [0, 1], [1, 1]], strides (1, 3), torch [[0, 0], [1, 0], [1, 1]]
[[0, 0, 7], [8, 0, 0]]: [[0, 1], [2, 0]], strides (1, 2), torch [[0, 2], [1, 0]]
[[[0, 1], [0, 0]], [[0, 0], [1, 0]]]: [[0, 1, 1], [0, 1, 0]], strides (1, 2), torch [[0, 0, 1], [1, 1, 0]]
[0, 1, 1]: [[1], [2]], strides (1, 2), torch [[1], [2]]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
