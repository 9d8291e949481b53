"""Evaluation of classifiers: accuracy, calibration, robustness, out-of-distribution detection, embeddings."""
from .metrics import classification_metrics, cross_fit, reliability
from .ood import detection_metrics
from .robustness import fgsm, pgd

__all__ = ['classification_metrics', 'cross_fit', 'detection_metrics', 'fgsm', 'pgd', 'reliability']
