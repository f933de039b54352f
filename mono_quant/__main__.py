"""``python -m mono_quant``: the command line."""

import sys

from mono_quant.cli import main

if __name__ == "__main__":
    sys.exit(main())
