"""python -m timm_multimix.evaluate: evaluate and compare models. See --help."""
import sys

from .evaluation.main import main

if __name__ == '__main__':
    sys.exit(main())
