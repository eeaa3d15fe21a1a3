#!/usr/bin/env bash
# Triton 3.7.1, TRITON_INTERPRET=1, with glibc 2.36 on x86-64: a load of two bytes that another process writes meanwhile
# can give one byte from before and one from after. The interpreter copies each element by memcpy, which reads the second
# byte once more; of a word that turns from 0xffff to 0x1234 it sees 0x12ff. On GPUs such a load is one access. So a
# kernel that waits for words of float16 or bfloat16, as all-reduces in Lamport's or NCCL's LL manner do, takes a wrong
# number now and then in the interpreter; words of four and eight bytes come whole.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy triton==3.7.1
cd "$folder"
cat > finding.py <<'PYTHON'
import os
import time

import torch
import triton
import triton.language as tl

WORDS = 2048


@triton.jit
def write(words_ptr, value, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(words_ptr + at, tl.full((COUNT,), 0, words_ptr.dtype.element_ty) + value)


@triton.jit
def read(words_ptr, found_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(found_ptr + at, tl.load(words_ptr + at, volatile=True))


def torn(dtype, limit_s):
    """What is read beside -1 and 0x1234, of words that another process turns from one to the other."""
    words = torch.full((WORDS,), -1, dtype=dtype).share_memory_()
    turn = torch.zeros(1, dtype=torch.int64).share_memory_()
    found = torch.empty_like(words)
    writer = os.fork()
    if not writer:
        for number in range(1, 1 << 40):
            while turn[0] < number:
                pass
            write[(1,)](words, 0x1234, WORDS)
    others, until = set(), time.monotonic() + limit_s
    while not others and time.monotonic() < until:
        words.fill_(-1)
        turn += 1
        while (found == -1).any() or not others and (words == -1).any():
            read[(1,)](words, found, WORDS)
            others |= {*found.tolist()} - {-1, 0x1234}
            if others or time.monotonic() > until:
                break
        found.fill_(-1)
    os.kill(writer, 9)
    os.waitpid(writer, 0)
    return others


print("two bytes:", *map(hex, sorted(torn(torch.int16, 100))))
print("four bytes:", *map(hex, sorted(torn(torch.int32, 10))))
PYTHON
cat > expected <<'TEXT'
two bytes: 0x12ff
four bytes:
TEXT
seen=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
