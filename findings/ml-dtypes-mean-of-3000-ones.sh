#!/usr/bin/env bash
# ml_dtypes 0.6.0 with NumPy 2.4.6: sums of NumPy arrays of bfloat16 and fp8 are accumulated in their own dtype, one
# number after the other. 3000 ones of bfloat16 add up to 256, from where adding 1 changes nothing, and their mean is
# 0.085; of float8_e4m3fn they are 16 and 0.006. Of float16, NumPy's own, the mean is taken in float32, and torch's
# mean of bfloat16 is 1: the mean of a checkpoint's tensor depends on the library that reads it.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import ml_dtypes
import numpy as np

for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(3000, dtype)
    print(ones.dtype, "sum", float(ones.sum()), "mean", round(float(ones.mean()), 4), end=" ")
    print("in float32", float(ones.mean(dtype=np.float32)))
PYTHON
cat > expected <<'TEXT'
float16 sum 3000.0 mean 1.0 in float32 1.0
bfloat16 sum 256.0 mean 0.0854 in float32 1.0
float8_e4m3fn sum 16.0 mean 0.0059 in float32 1.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
