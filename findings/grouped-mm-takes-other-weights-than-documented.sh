#!/usr/bin/env bash
# torch 2.13.0: the documentation of torch.nn.functional.grouped_mm says that for out = input @ weight.T the weights are
# (groups, N, K), that out_dtype=torch.float32 accumulates bfloat16 in float32, that a bias is added, and that the last
# offset must be less than the number of rows. On a CPU it multiplies by weights of (groups, K, N): as documented,
# weights with N = K give input @ weight without a word, others an error. It refuses float32 results and any bias, and
# takes a last offset of all rows, as every layer of experts has it.
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
from torch.nn.functional import grouped_mm

torch.manual_seed(0)
documented = " ".join(grouped_mm.__doc__.split())
print("documented:", "shape ``(num_groups, N, K)``" in documented, "strictly less than the total" in documented)
x, ends = torch.randn(6, 8), torch.tensor([2, 6], dtype=torch.int32)
square, wide = torch.randn(2, 8, 8), torch.randn(2, 16, 8)
found = grouped_mm(x, square, offs=ends)
print("x @ weight.T:", torch.allclose(found, torch.cat([x[:2] @ square[0].T, x[2:] @ square[1].T]), atol=1e-5))
print("x @ weight:", torch.allclose(found, torch.cat([x[:2] @ square[0], x[2:] @ square[1]]), atol=1e-5))
calls = {
    "(groups, N, K)": lambda: grouped_mm(x, wide, offs=ends),
    "(groups, K, N)": lambda: grouped_mm(x, wide.mT, offs=ends),
    "bias": lambda: grouped_mm(x, wide.mT, offs=ends, bias=torch.ones(16)),
    "out_dtype": lambda: grouped_mm(x.bfloat16(), wide.mT.bfloat16(), offs=ends, out_dtype=torch.float32),
}
for name, call in calls.items():
    try:
        print(f"{name}: {list(call().shape)}")
    except RuntimeError as error:
        print(f"{name}: {str(error).splitlines()[0]}")
PYTHON
cat > expected <<'TEXT'
documented: True True
x @ weight.T: False
x @ weight: True
(groups, N, K): contraction dimension of mat_a and mat_b must match
(groups, K, N): [6, 16]
bias: Bias not supported yet
out_dtype: Grouped gemm output dtype must match `mat_a` dtype
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
