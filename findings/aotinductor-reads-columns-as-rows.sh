#!/usr/bin/env bash
# torch 2.13.0: a package of AOTInductor reads an input by the strides of the one that the model was exported with. A
# transposed matrix of the same shape is read as if it were not transposed, and a softmax over its rows is that of
# other numbers. In eager mode and by torch.export's own module it is right. Nothing is raised, unless
# AOTI_RUNTIME_CHECK_INPUTS=1 is set, which isn't the default: then it is a RuntimeError that names the stride.
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


class Softmax(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1)


def verdict(function, x):
    try:
        return "right" if torch.allclose(function(x), torch.softmax(x, -1)) else "wrong"
    except RuntimeError as error:
        return "an error of strides" if "stride" in str(error) else "another error"


torch.manual_seed(0)
x = torch.randn(3, 3)
program = torch.export.export(Softmax(), (x,))
loaded = aoti_load_package(aoti_compile_and_package(program, package_path="model.pt2"))
for name, given in (("rows", x), ("columns", x.t()), ("columns, copied", x.t().contiguous())):
    print(f"{name}: exported {verdict(program.module(), given)}, packaged {verdict(loaded, given)}")
PYTHON
cat > expected <<'TEXT'
rows: exported right, packaged right
columns: exported right, packaged wrong
columns, copied: exported right, packaged right
with AOTI_RUNTIME_CHECK_INPUTS=1
rows: exported right, packaged right
columns: exported right, packaged an error of strides
columns, copied: exported right, packaged right
TEXT
seen=$(
    AOTI_RUNTIME_CHECK_INPUTS=0 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    echo "with AOTI_RUNTIME_CHECK_INPUTS=1"
    AOTI_RUNTIME_CHECK_INPUTS=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
