"""`python -m fastrnn RECIPE [options]`: see :mod:`fastrnn.recipes`."""

import sys

from fastrnn.recipes.command_line import main

if __name__ == "__main__":
    sys.exit(main())
