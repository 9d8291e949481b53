"""`python -m timm_multimix.detection` is the same as `timm-multimix detect`."""
import sys

from .main import main

if __name__ == '__main__':
    sys.exit(main())
