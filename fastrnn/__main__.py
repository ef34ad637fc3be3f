"""`python -m fastrnn RECIPE|TOOL [options]`: see :mod:`fastrnn.recipes.command_line`."""

import sys

from fastrnn.recipes.command_line import main

if __name__ == "__main__":
    sys.exit(main())
