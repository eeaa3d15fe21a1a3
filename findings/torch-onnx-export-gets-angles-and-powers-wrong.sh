#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export writes atan2 by Atan of a quotient, with a correction for
# negative divisors that takes 0 for a negative number: atan2(0, -1) is -pi exported, and pi in eager mode; so is the
# angle of a negative number. A tensor of integers to the power of one of floats is float32 in eager mode; exported it
# is one Pow of both, whose result has the type of the first, int64: 3 ** 2.5 is 15, not 15.59, and 2 ** 0.5 is 1. A
# power by a Python number is right.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 onnxscript==0.7.2
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnxruntime==1.32.0
cd "$folder"
cat > finding.py <<'PYTHON'
import logging
import warnings

import onnxruntime
import torch
import torch.nn.functional as F

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def exported(function, *inputs):
    program = torch.onnx.export(Model(function), inputs, dynamo=True, verbose=False)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})[0]
    return torch.from_numpy(found), [node.op_type for node in program.model.graph]


zero, one, integers = torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([3, 2])
cases = {
    "atan2(0, -1)": (torch.atan2, zero, one),
    "angle of -1 + 0j": (lambda x: torch.view_as_complex(x).angle(), torch.tensor([[-1.0, 0.0]])),
    "[3, 2] ** tensor [2.5, 0.5]": (torch.pow, integers, torch.tensor([2.5, 0.5])),
    "[3, 2] ** 0.5": (lambda x: x**0.5, integers),
}
for name, (function, *inputs) in cases.items():
    found, _ = exported(function, *inputs)
    eager = function(*inputs)
    numbers = [[round(number, 4) for number in each.tolist()] for each in (eager, found)]
    print(f"{name}: {numbers[0]} of {eager.dtype} in eager mode, {numbers[1]} of {found.dtype} exported")
PYTHON
cat > expected <<'TEXT'
atan2(0, -1): [3.1416] of torch.float32 in eager mode, [-3.1416] of torch.float32 exported
angle of -1 + 0j: [3.1416] of torch.float32 in eager mode, [-3.1416] of torch.float32 exported
[3, 2] ** tensor [2.5, 0.5]: [15.5885, 1.4142] of torch.float32 in eager mode, [15, 1] of torch.int64 exported
[3, 2] ** 0.5: [1.7321, 1.4142] of torch.float32 in eager mode, [1.7321, 1.4142] of torch.float32 exported
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
