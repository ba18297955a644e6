"""The tools' way in: `codistill-cache COMMAND ...`, the same as `python -m distill.tools`. Above all layers."""

import sys

from distill.tools.commands import main

if __name__ == "__main__":
    sys.exit(main())
