#!/usr/bin/env bash
# optimum-quanto 0.2.7: where activations are quantised too, a layer gives a tensor of int8 numbers and a scale, and
# some operators behind it compute on the int8 numbers alone. -h of a saturated negative number stays negative, since
# -(-128) is -128 in int8: half of a rotary embedding. relu after a negative factor, which is kept in the scale, gives
# negative numbers, and 0 where the result is positive. torch.where(mask, h, -inf) fills with the smallest number of
# the scale, so the softmax behind it gives weight to what is masked. Parts of split and chunk have the shape of the
# whole, by which code divides or reshapes. Nothing is raised or warned; each is exact on the dequantised numbers.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install optimum-quanto==0.2.7
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from optimum.quanto import Calibration, QTensor, freeze, qint8, quantize

mask = torch.tensor([[True, False, True, True]])
operators = {
    "-h": lambda h: -h,
    "relu(-2 * h)": lambda h: torch.relu(-2 * h),
    "where(mask, h, -inf)": lambda h: torch.where(mask, h, torch.tensor(-torch.inf)),
    "softmax of that": lambda h: torch.where(mask, h, torch.tensor(-torch.inf)).softmax(-1),
}
model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
model[0].weight.data = torch.eye(4)
quantize(model, weights=qint8, activations=qint8)
with torch.no_grad(), Calibration(streamline=False):
    model(torch.tensor([[1.0, -1.0, 0.5, -0.25]]))
freeze(model)


def numbers(tensor):
    tensor = tensor.dequantize() if isinstance(tensor, QTensor) else tensor
    return [round(number, 2) + 0.0 for number in tensor.flatten().tolist()]


with torch.no_grad():
    h = model(torch.tensor([[1.0, -2.0, 0.5, -0.25]]))
    print(f"h = {numbers(h)}")
    for name, operator in operators.items():
        print(f"{name}: {numbers(operator(h))}, dequantised {numbers(operator(h.dequantize()))}")
    first, wanted = h.split(2, -1)[0], h.dequantize().split(2, -1)[0]
    print(f"first of split: shape {tuple(first.shape)} of {numbers(first)}, dequantised {tuple(wanted.shape)}")
PYTHON
cat > expected <<'TEXT'
h = [1.0, -1.01, 0.5, -0.25]
-h: [-1.0, -1.01, -0.5, 0.25], dequantised [-1.0, 1.01, -0.5, 0.25]
relu(-2 * h): [-2.0, 0.0, -1.01, 0.0], dequantised [0.0, 2.02, 0.0, 0.5]
where(mask, h, -inf): [1.0, -1.01, 0.5, -0.25], dequantised [1.0, -inf, 0.5, -0.25]
softmax of that: [0.5, 0.06, 0.3, 0.14], dequantised [0.53, 0.0, 0.32, 0.15]
first of split: shape (1, 4) of [1.0, -1.01], dequantised (1, 2)
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
