"""The tools' way in: `codistill-cache COMMAND ...`, the same as `python -m distill.cache`. Above all layers."""

import sys

from distill.run.tools import main

if __name__ == "__main__":
    sys.exit(main())
