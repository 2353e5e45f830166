"""``python -m nsvd``, and so ``torchrun … -m nsvd``, is the command ``nsvd``."""

import sys

from nsvd.cli import main

if __name__ == "__main__":
    sys.exit(main())
