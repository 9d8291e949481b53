"""`python -m timm_multimix.evaluate` is the same as `timm-multimix evaluate`."""
import sys

from .evaluation.main import main

if __name__ == '__main__':
    sys.exit(main())
