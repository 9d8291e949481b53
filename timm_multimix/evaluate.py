"""python -m timm_multimix.evaluate: measure and compare models. --help explains it."""
import sys

from .evaluation.main import main

if __name__ == '__main__':
    sys.exit(main())
