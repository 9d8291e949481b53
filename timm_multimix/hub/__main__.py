"""`python -m timm_multimix.hub`."""
import sys

from ..training.hub import command  # builds on this package

if __name__ == '__main__':
    sys.exit(command())
