"""One of two processes that share a file of words: `run_whole_words.py writes|reads FILE` stores or loads them all, in
turns. Who reads prints how many words were half of one number and half of another.
"""

import sys

import numpy as np

from tests.providers import whole_words

WORDS, TURNS, EMPTY, SENT = 2000, 1000, -1, 0x1234


def main() -> None:
    role, file = sys.argv[1:]
    shared = np.memmap(file, dtype=np.int64, mode="r+", shape=(1 + WORDS // 4,))
    turn, words = shared[:1], shared[1:].view(np.int16)
    pointers = np.uint64(words.ctypes.data) + np.arange(WORDS, dtype=np.uint64) * np.uint64(2)
    everywhere, torn = np.ones(WORDS, dtype=bool), 0
    for number in range(1, 1 + TURNS):
        if role == "writes":
            while turn[0] < number:
                pass
            whole_words.store(pointers, np.full(WORDS, SENT, dtype=np.int16), everywhere)
            continue
        words[:], found = EMPTY, np.full(WORDS, EMPTY)
        turn[0] = number
        while (found == EMPTY).any():
            found = whole_words.load(pointers, everywhere, np.zeros(WORDS, dtype=np.int16), np.dtype(np.int16))
            torn += int(((found != EMPTY) & (found != SENT)).sum())
    print(torn)


if __name__ == "__main__":
    main()
