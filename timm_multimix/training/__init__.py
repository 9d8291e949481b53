"""`timm-multimix train` and train_timm.py. It depends on MultiMix only through task.py and options.py."""
from .main import main

__all__ = ['main']
