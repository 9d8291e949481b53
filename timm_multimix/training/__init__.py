"""`timm-multimix train` and train_timm.py: options, setup, training loop and output folder of a run."""
from .main import main

__all__ = ['main']
