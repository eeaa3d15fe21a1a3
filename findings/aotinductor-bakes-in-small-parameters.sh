#!/usr/bin/env bash
# torch 2.13.0: AOTInductor writes parameters and buffers of one dimension with up to 8 numbers, and those of none,
# into the code as constants: a learned scale, a temperature, a gate. They aren't among get_constant_fqns(), and
# load_constants() of the model's own state_dict raises "Constant not found". Without them the update succeeds,
# check_full_update=True included, and the loaded model computes with new weights and the old scale. A vector of 9
# numbers can be updated.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.gate = torch.nn.Parameter(torch.ones(8))
        self.weight = torch.nn.Parameter(torch.ones(9))

    def forward(self, x):
        return x[:, :8] * self.gate, x * self.weight, x * self.scale


model, x = Model(), torch.ones(1, 9)
loaded = aoti_load_package(aoti_compile_and_package(torch.export.export(model, (x,)), package_path="model.pt2"))
print("names:", loaded.get_constant_fqns())
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(3)
state = {name: value.detach() for name, value in model.state_dict().items()}
try:
    loaded.load_constants(state, check_full_update=False)
except RuntimeError as error:
    print("its state_dict:", str(error).splitlines()[0])
loaded.load_constants({name: state[name] for name in loaded.get_constant_fqns()}, check_full_update=True)
for name, eager, found in zip(("gate", "weight", "scale"), model(x), loaded(x)):
    print(f"{name}, three times as large: {eager[0, 0].item()} in eager mode, {found[0, 0].item()} loaded")
PYTHON
cat > expected <<'TEXT'
names: ['weight']
its state_dict: Constant not found: gate
gate, three times as large: 3.0 in eager mode, 1.0 loaded
weight, three times as large: 3.0 in eager mode, 3.0 loaded
scale, three times as large: 6.0 in eager mode, 2.0 loaded
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
