#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1, compiled for sm_90: `x.to(tl.bfloat16).to(tl.float32)`, which rounds a float32 value, takes one
# F2F.BF16.F32 for each element. That is an instruction of a unit with an eighth of the throughput of others. The same
# rounding of two elements by one `cvt.rn.bf16x2.f32`, as inline PTX, takes F2FP for each two. Where a value is only
# stored as bfloat16, the compiler uses F2FP by itself.
# Seen: 8 F2F for 8 elements of a thread, and 0 with inline PTX.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cat > "$folder/finding.py" <<'PYTHON'
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def plainly(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, (x * x).to(tl.bfloat16).to(tl.float32) * 3.0)


@triton.jit
def by_twos(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    x = tl.load(x_ptr + at)
    y = tl.inline_asm_elementwise(
        "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2; shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }",
        "=f,=f,f,f", [x * x], dtype=tl.float32, is_pure=True, pack=2,
    )
    tl.store(y_ptr + at, y * 3.0)


def instructions(kernel):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {},
                       {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\bF2F\.BF16\.F32\b", text))


found = instructions(plainly), instructions(by_twos)
print(triton.__version__, "F2F.BF16.F32 a thread of 8 elements:", found[0], "plainly,", found[1], "by twos")
raise SystemExit(found != (8, 0))
PYTHON
for version in 3.6.0 3.7.1; do
  "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps "triton==$version"
  TRITON_CACHE_DIR="$folder/cache-$version" "$folder/venv/bin/python" "$folder/finding.py"
done
