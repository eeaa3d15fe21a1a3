#!/usr/bin/env bash
# openvino 2026.4.1, CPU: interpolate, bilinear or bicubic, to a size of 1 without align_corners takes the first
# element of the axis; in torch it is the middle one, or the mean of the two in the middle. Of 12 pixels to 1 x 1 it is
# the corner, and to 1 x 4 the first row, as pyramids of pooled features have. Sizes of 2 and more are right, and so is
# the same model converted from ONNX, which torch.onnx.export writes as half_pixel: the frontend for torch writes
# pytorch_half_pixel, which is 0 for a size of 1. Nothing is raised or warned.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install openvino==2026.4.1 packaging==26.3
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 onnxscript==0.7.2
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


def run(source):
    model = openvino.compile_model(openvino.convert_model(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [round(number, 2) for number in model(x.numpy())[0].flatten().tolist()]


x = torch.arange(12.0).view(1, 1, 3, 4)
print(f"x = {x[0, 0].tolist()}")
for mode in ("bilinear", "bicubic"):
    for size in ((1, 1), (1, 4), (3, 1), (2, 2)):
        model = Model(lambda x, size=size, mode=mode: torch.nn.functional.interpolate(x, size=size, mode=mode)).eval()
        torch.onnx.export(model, (x,), "model.onnx", dynamo=True, verbose=False)
        wanted = [round(number, 2) for number in model(x).flatten().tolist()]
        direct, by_onnx = run(torch.export.export(model, (x,))), run("model.onnx")
        print(f"{mode} to {size}: {direct}, by ONNX {by_onnx}, torch {wanted}")
PYTHON
cat > expected <<'TEXT'
x = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
bilinear to (1, 1): [0.0], by ONNX [5.5], torch [5.5]
bilinear to (1, 4): [0.0, 1.0, 2.0, 3.0], by ONNX [4.0, 5.0, 6.0, 7.0], torch [4.0, 5.0, 6.0, 7.0]
bilinear to (3, 1): [0.0, 4.0, 8.0], by ONNX [1.5, 5.5, 9.5], torch [1.5, 5.5, 9.5]
bilinear to (2, 2): [1.5, 3.5, 7.5, 9.5], by ONNX [1.5, 3.5, 7.5, 9.5], torch [1.5, 3.5, 7.5, 9.5]
bicubic to (1, 1): [0.0], by ONNX [5.5], torch [5.5]
bicubic to (1, 4): [0.0, 1.0, 2.0, 3.0], by ONNX [4.0, 5.0, 6.0, 7.0], torch [4.0, 5.0, 6.0, 7.0]
bicubic to (3, 1): [0.0, 4.0, 8.0], by ONNX [1.5, 5.5, 9.5], torch [1.5, 5.5, 9.5]
bicubic to (2, 2): [1.17, 3.36, 7.64, 9.83], by ONNX [1.17, 3.36, 7.64, 9.83], torch [1.17, 3.36, 7.64, 9.83]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
