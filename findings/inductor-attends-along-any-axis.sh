#!/usr/bin/env bash
# torch 2.13.0: Inductor makes scaled_dot_product_attention of a softmax between two products, whatever the axis of the
# softmax is. (q @ k.mT / 4).softmax(-2) @ v, which normalises over queries as slot attention does, and softmax(1), over
# heads, compile to softmax(-1): wrong by more than 1, without a word. In the patterns that are matched the axis is left
# open.
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
from torch._dynamo.utils import counters

torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
for axis in (-1, -2, 1):

    def attend(q, k, v, axis=axis):
        return (q @ k.mT).div(4.0).softmax(axis) @ v

    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(attend)(q, k, v)
    fused = counters["inductor"]["fuse_attention"]
    right = torch.allclose(compiled, attend(q, k, v), atol=1e-4)
    last = torch.allclose(compiled, attend(q, k, v, -1), atol=1e-4)
    print(f"softmax({axis}): fused {fused}, right: {right}, equal to softmax(-1): {last}")
PYTHON
cat > expected <<'TEXT'
softmax(-1): fused 1, right: True, equal to softmax(-1): True
softmax(-2): fused 1, right: False, equal to softmax(-1): True
softmax(1): fused 1, right: False, equal to softmax(-1): True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
