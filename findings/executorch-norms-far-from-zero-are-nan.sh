#!/usr/bin/env bash
# executorch 1.5.1, the kernels of its own runtime (portable): layer_norm and group_norm take the variance as the mean
# of squares minus the square of the mean, in float32, of which nothing is left where the mean is larger than the
# deviation. Of normal numbers around 1000 the result is off by 0.5, and around 10000 it is NaN, as the difference is
# negative. torch's is off by 0.001 there, and var of the same runtime is right. An offset that is large beside the
# deviation, as of residual streams or of sensors, is enough. Nothing is raised or warned.
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


functional = torch.nn.functional
functions = {
    "layer_norm": lambda x: functional.layer_norm(x, (64,)),
    "group_norm": lambda x: functional.group_norm(x, 1),
    "var": lambda x: x.var(-1),
}
torch.manual_seed(0)
numbers = torch.randn(4, 64)
for name, function in functions.items():
    for mean in (0, 1000, 10000):
        x = numbers + mean
        right = function(x.double())
        errors = [(found - right).abs().max().item() for found in (run(function, x), function(x))]
        verdicts = ["NaN" if error != error else "right" if error < 0.003 else "wrong" for error in errors]
        print(f"{name} of numbers around {mean}: {verdicts[0]}, torch {verdicts[1]}")
PYTHON
cat > expected <<'TEXT'
layer_norm of numbers around 0: right, torch right
layer_norm of numbers around 1000: wrong, torch right
layer_norm of numbers around 10000: NaN, torch right
group_norm of numbers around 0: right, torch right
group_norm of numbers around 1000: wrong, torch right
group_norm of numbers around 10000: NaN, torch right
var of numbers around 0: right, torch right
var of numbers around 1000: right, torch right
var of numbers around 10000: right, torch right
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
