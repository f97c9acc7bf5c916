"""`python -m harness` is `dsa-eval`: for launchers that take a module, such as torchrun."""

from harness.cli import main

if __name__ == "__main__":
    main()
