#!/usr/bin/env bash
# openvino 2026.4.1, CPU: convert_model(model, example_input=...), which traces the model, leaves out what its operators
# don't have: softplus without its beta and threshold, and round without its decimals. Of a program by torch.export
# softplus is right, as torch takes it apart, and round isn't converted, with an error that says so. logsigmoid is the
# logarithm of a sigmoid by both ways: of -110 it is minus infinity, so that losses and gates are infinite. Nothing is
# raised or warned.
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


def compare(name, function, given):
    found = []
    for source in (Model(function), torch.export.export(Model(function), (given,))):
        try:
            model = openvino.convert_model(source, example_input=given)
            result = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given.numpy())[0]
            found.append([round(number, 4) for number in result.tolist()])
        except Exception as error:
            found.append(type(error).__name__)
    print(f"{name}: traced {found[0]}, exported {found[1]},", end=" ")
    print(f"torch {[round(number, 4) for number in function(given).tolist()]}")


F = torch.nn.functional
compare("softplus, beta=2", lambda x: F.softplus(x, beta=2.0), torch.tensor([0.0, 1.0, -1.0]))
compare("softplus, threshold=0.5", lambda x: F.softplus(x, threshold=0.5), torch.tensor([0.0, 1.0, -1.0]))
compare("round, decimals=1", lambda x: x.round(decimals=1), torch.tensor([0.26, 1.17, -2.0]))
compare("logsigmoid", F.logsigmoid, torch.tensor([-110.0, -1.0]))
PYTHON
cat > expected <<'TEXT'
softplus, beta=2: traced [0.6931, 1.3133, 0.3133], exported [0.3466, 1.0635, 0.0635], torch [0.3466, 1.0635, 0.0635]
softplus, threshold=0.5: traced [0.6931, 1.3133, 0.3133], exported [0.6931, 1.0, 0.3133], torch [0.6931, 1.0, 0.3133]
round, decimals=1: traced [0.0, 1.0, -2.0], exported OpConversionFailure, torch [0.3, 1.2, -2.0]
logsigmoid: traced [-inf, -1.3133], exported [-inf, -1.3133], torch [-110.0, -1.3133]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
