#!/usr/bin/env bash
# torch 2.13.0, CPU: the gradient of an embedding of bfloat16 is added up in bfloat16, one number after the other: of a
# token that occurs 1000 times, each with a gradient of 1, it is 256, from where adding 1 changes nothing. By
# weight[ids] and take it is 256, too; by index_select and gather it is 1000. How a lookup is written decides how much a
# frequent token learns. index_add of a vector gives 256, and of a matrix 1000. In float16, which has three bits more,
# all are 1000.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torch.nn.functional import embedding

ids = torch.zeros(1000, dtype=torch.int64)
lookups = {
    "embedding": lambda weight: embedding(ids, weight),
    "weight[ids]": lambda weight: weight[ids],
    "take": lambda weight: weight.take(ids),
    "index_select": lambda weight: weight.index_select(0, ids),
    "gather": lambda weight: weight.gather(0, ids[:, None]),
}
for dtype in (torch.float16, torch.bfloat16):
    for name, lookup in lookups.items():
        weight = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
        lookup(weight).sum().backward()
        print(dtype, name, weight.grad.item())
    for shape in ((1,), (1, 1)):
        sums = torch.zeros(shape, dtype=dtype).index_add(0, ids, torch.ones(1000, *shape[1:], dtype=dtype))
        print(dtype, f"index_add of {len(shape)}-D", sums.item())
PYTHON
cat > expected <<'TEXT'
torch.float16 embedding 1000.0
torch.float16 weight[ids] 1000.0
torch.float16 take 1000.0
torch.float16 index_select 1000.0
torch.float16 gather 1000.0
torch.float16 index_add of 1-D 1000.0
torch.float16 index_add of 2-D 1000.0
torch.bfloat16 embedding 256.0
torch.bfloat16 weight[ids] 256.0
torch.bfloat16 take 256.0
torch.bfloat16 index_select 1000.0
torch.bfloat16 gather 1000.0
torch.bfloat16 index_add of 1-D 256.0
torch.bfloat16 index_add of 2-D 1000.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
