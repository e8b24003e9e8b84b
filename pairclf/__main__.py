"""`python -m pairclf` is `pairclf`; `accelerate launch -m pairclf` needs it."""

from pairclf.cli import main

if __name__ == "__main__":
    main()
