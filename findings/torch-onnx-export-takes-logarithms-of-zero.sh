#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export writes functions that exist to avoid a logarithm of 0 or of
# infinity as what they avoid. logsigmoid becomes Sigmoid and Log: of -110 it is minus infinity, not -110. logaddexp
# becomes the logarithm of a sum of Exp: of 1000 and 1000 it is infinite, not 1000.69. log1p becomes Add and Log: of
# 1e-8 it is 0. logcumsumexp loses what is far under a row's maximum. softplus, log_softmax and logsumexp, which ONNX
# has, are right. So losses and probabilities of exported models are infinite where the model's aren't.
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


cases = {
    "logsigmoid": (F.logsigmoid, torch.tensor([-110.0])),
    "logaddexp": (torch.logaddexp, torch.tensor([1000.0]), torch.tensor([1000.0])),
    "log1p": (torch.log1p, torch.tensor([1e-8])),
    "logcumsumexp": (lambda x: x.logcumsumexp(0), torch.tensor([-100.0, 100.0])),
    "softplus": (F.softplus, torch.tensor([-30.0, 100.0])),
    "log_softmax": (lambda x: x.log_softmax(0), torch.tensor([-100.0, 100.0])),
    "logsumexp": (lambda x: x.logsumexp(0), torch.tensor([1000.0, 1000.0])),
}
for name, (function, *inputs) in cases.items():
    found, operators = exported(function, *inputs)
    numbers = [[float(f"{number:.4g}") for number in each.flatten().tolist()] for each in (function(*inputs), found)]
    given = ", ".join(str(x.tolist()) for x in inputs)
    print(f"{name} of {given}: {numbers[0]} in eager mode, {numbers[1]} exported, by {', '.join(operators[-3:])}")
PYTHON
cat > expected <<'TEXT'
logsigmoid of [-110.0]: [-110.0] in eager mode, [-inf] exported, by Sigmoid, Log
logaddexp of [1000.0], [1000.0]: [1001.0] in eager mode, [inf] exported, by Exp, Add, Log
log1p of [9.99999993922529e-09]: [1e-08] in eager mode, [0.0] exported, by Add, Log
logcumsumexp of [-100.0, 100.0]: [-100.0, 100.0] in eager mode, [-inf, 100.0] exported, by CumSum, Log, Add
softplus of [-30.0, 100.0]: [9.358e-14, 100.0] in eager mode, [9.358e-14, 100.0] exported, by Softplus, Greater, Where
log_softmax of [-100.0, 100.0]: [-200.0, 0.0] in eager mode, [-200.0, 0.0] exported, by LogSoftmax
logsumexp of [1000.0, 1000.0]: [1001.0] in eager mode, [1001.0] exported, by ReduceLogSumExp
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
