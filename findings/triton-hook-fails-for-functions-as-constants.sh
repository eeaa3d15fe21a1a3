#!/usr/bin/env bash
# Triton 3.6.0: a kernel that takes another function of Triton as a `tl.constexpr` compiles and runs, until somebody sets
# `triton.knobs.runtime.jit_post_compile_hook`, as inference engines do to log compilations while they serve. Then its
# next compilation raises "TypeError: Object of type JITFunction is not JSON serializable" out of the launch: constants
# are written as JSON for the hook. Triton 3.7.1 names such functions, and the hook is called.
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
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


class Driver:
    """Of a GPU that isn't there: compiling asks for no more."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit
def double(x):
    return x * 2


@triton.jit
def apply(x_ptr, FUNCTION: tl.constexpr, STEP: tl.constexpr):
    tl.store(x_ptr + STEP, FUNCTION(tl.load(x_ptr)))


triton.runtime.driver._active = Driver()
print(triton.__version__)
print("without a hook:", apply.warmup(torch.float32, double, 1, grid=(1,)) is not None)
triton.knobs.runtime.jit_post_compile_hook = lambda **told: print("the hook was called")
try:
    apply.warmup(torch.float32, double, 2, grid=(1,))
except TypeError as error:
    print("TypeError:", error)
PYTHON
cat > expected <<'TEXT'
3.6.0
without a hook: True
TypeError: Object of type JITFunction is not JSON serializable
3.7.1
without a hook: True
the hook was called
TEXT
for version in 3.6.0 3.7.1; do
    "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps "triton==$version"
    TRITON_CACHE_DIR="$folder/$version" "$folder/venv/bin/python" finding.py
done > found
diff expected found
echo "as expected"
