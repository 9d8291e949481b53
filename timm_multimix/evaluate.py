"""Evaluate and compare models: `python -m timm_multimix.evaluate --help`."""
import sys

from .evaluation.main import main

if __name__ == '__main__':
    sys.exit(main())
