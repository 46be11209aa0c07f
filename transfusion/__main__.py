"""`python -m transfusion` and `torchrun -m transfusion`."""

from transfusion.cli import main

if __name__ == "__main__":
    main()
