#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1, compiled for sm_90: a kernel of one `tl.max` over a row compiles with `num_ctas=1`. With
# `num_ctas=4`, a documented option of launches on Hopper, compiling raises "PassManager::run failed": the pass
# TritonGPUPlanCTAPass fails, and says nothing of what it doesn't take. So a row cannot be spread over a cluster.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cat > "$folder/finding.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def largest(x_ptr, y_ptr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * WIDTH + tl.arange(0, WIDTH)).to(tl.float32)
    tl.store(y_ptr + row, tl.max(tl.abs(x), axis=0))


def compiles(count):
    source = ASTSource(largest, {"x_ptr": "*bf16", "y_ptr": "*fp32", "WIDTH": "constexpr"}, {"WIDTH": 8192},
                       {(0,): [["tt.divisibility", 16]]})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_ctas": count, "num_warps": 4})
    except RuntimeError as error:
        return str(error)
    return "compiled"


found = {count: compiles(count) for count in (1, 4)}
print(triton.__version__, found)
raise SystemExit(found != {1: "compiled", 4: "PassManager::run failed"})
PYTHON
for version in 3.6.0 3.7.1; do
  "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps "triton==$version"
  TRITON_CACHE_DIR="$folder/cache-$version" "$folder/venv/bin/python" "$folder/finding.py" 2> "$folder/said"
done
grep -o "TritonGPUPlanCTAPass" "$folder/said" | head -1
