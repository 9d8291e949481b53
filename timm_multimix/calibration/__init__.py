"""Temperature scaling: fit a temperature and fold it into the classifier of a model or of a checkpoint."""
from .temperature import calibrate, fit_temperature

__all__ = ['calibrate', 'fit_temperature']
