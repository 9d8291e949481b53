"""Accuracy, calibration, robustness, detection of other kinds of images and the shape of the embeddings of models."""
from .metrics import classification_metrics, cross_fit, reliability
from .ood import detection_metrics
from .robustness import fgsm, pgd

__all__ = ['classification_metrics', 'cross_fit', 'detection_metrics', 'fgsm', 'pgd', 'reliability']
