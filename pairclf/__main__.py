"""`python -m pairclf` runs the command line; `accelerate launch -m pairclf` needs this file."""

from pairclf.cli import main

if __name__ == "__main__":
    main()
