"""Entry point of `python -m timm_multimix.hub`."""
import sys

from .command import main

if __name__ == '__main__':
    sys.exit(main())
