#!/usr/bin/env python3
"""Train image classifiers with timm's parts and options, and with MultiMix: `train_timm.py --multimix dense`."""
import sys

from timm_multimix.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
