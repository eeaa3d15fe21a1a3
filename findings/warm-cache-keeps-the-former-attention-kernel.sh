#!/usr/bin/env bash
# torch 2.13.0: `torch.nn.attention.sdpa_kernel` around torch.compile decides which attention kernel is compiled only while
# the cache of graphs is cold. Compiled again under another kernel, a function runs the former one: the choice isn't part
# of AOTAutograd's key. Seen on a CPU; also in a later process, since the cache is on disk.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import os
import tempfile

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


q, k, v = (torch.randn(1, 2, 16, 32) for _ in range(3))
for backend, cold in ((SDPBackend.FLASH_ATTENTION, False), (SDPBackend.MATH, False), (SDPBackend.MATH, True)):
    torch._dynamo.reset()
    with torch.inference_mode(), sdpa_kernel(backend), torch._inductor.config.patch(force_disable_caches=cold):
        _, codes = run_and_get_code(torch.compile(attend), q, k, v)
    runs = "flash" if any("flash_attention_for_cpu" in code for code in codes) else "math"
    print(f"asked for {backend.name}, cache {'off' if cold else 'on'}: runs {runs}")
PYTHON
cat > expected <<'TEXT'
asked for FLASH_ATTENTION, cache on: runs flash
asked for MATH, cache on: runs flash
asked for MATH, cache off: runs math
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
