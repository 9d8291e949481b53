"""`python -m timm_multimix.hub`."""
import sys

from ..training.hub import command  # builds on this package

sys.exit(command())
