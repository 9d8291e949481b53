"""`python -m timm_multimix.hub` is the same as `timm-multimix hub`."""
import sys

from .command import main

if __name__ == '__main__':
    sys.exit(main())
