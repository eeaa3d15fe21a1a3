"""`python -m fuseplan`, which `torchrun -m fuseplan` starts on every rank."""

from fuseplan.cli import main

if __name__ == "__main__":
    main()
