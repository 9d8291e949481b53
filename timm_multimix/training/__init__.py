"""What train_timm.py runs. Knows MultiMix through task.py and options.py only."""
from .main import main

__all__ = ['main']
