"""Entry point of `python -m timm_multimix.hub`."""
import sys

from ..training.hub import command

if __name__ == '__main__':
    sys.exit(command())
