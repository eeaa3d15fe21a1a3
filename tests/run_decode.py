"""One rank of `benchmarks/decode.py` on the CPU, whose graphs are interpreted."""

from benchmarks import decode
from tests.interpreted import no_code

if __name__ == "__main__":
    decode.REPEATS, decode.STEPS = 2, 2
    with no_code():
        decode.main()
