"""The tools' way in: `python -m distill.cache COMMAND ...`. Like `distill.__main__` it stands above all layers."""

import sys

from distill.run.tools import main

if __name__ == "__main__":
    sys.exit(main())
