#!/usr/bin/env bash
# gguf 0.19.0: a block of 32 numbers in which one is NaN or infinite is quantised to 32 zeros in MXFP4, silently: the
# conversion of a broken model gives a file that runs. In Q8_0 and Q4_0 the block's scale becomes NaN, or its numbers
# infinite, and BF16 keeps them. The scale of an MX block has a code for NaN, which isn't used.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install gguf==0.19.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import gguf
import numpy as np

for given in (np.nan, np.inf):
    x = np.ones((1, 32), np.float32)
    x[0, 7] = given
    for kind in ("MXFP4", "Q8_0", "Q4_0", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        with np.errstate(all="ignore"):
            back = gguf.quants.dequantize(gguf.quants.quantize(x, number), number)[0]
        wrong = int((~np.isfinite(back)).sum())
        print(f"31 ones and {given}, {kind}: {wrong} aren't finite, {int((back == 0).sum())} are 0")
PYTHON
cat > expected <<'TEXT'
31 ones and nan, MXFP4: 0 aren't finite, 32 are 0
31 ones and nan, Q8_0: 32 aren't finite, 0 are 0
31 ones and nan, Q4_0: 32 aren't finite, 0 are 0
31 ones and nan, BF16: 1 aren't finite, 0 are 0
31 ones and inf, MXFP4: 0 aren't finite, 32 are 0
31 ones and inf, Q8_0: 32 aren't finite, 0 are 0
31 ones and inf, Q4_0: 32 aren't finite, 0 are 0
31 ones and inf, BF16: 1 aren't finite, 0 are 0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
