"""`python -m trpts_peft` is the `trpts` command."""

from .cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
