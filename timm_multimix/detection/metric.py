"""Mean average precision, with crowds of COCO and difficult objects of Pascal VOC."""
import logging
import math
import statistics
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

Boxes = dict[str, torch.Tensor]

# Measures by torchmetrics' names, and their names in our results.
MEASURES = dict(map='mAP', map_50='mAP50', map_75='mAP75', map_small='mAP_small', map_medium='mAP_medium',
                map_large='mAP_large')
MAX_DETECTIONS = [1, 10, 100]
# The same values as in pycocotools. torchmetrics' defaults are rounded to float32, which changes recalls such as 0.6.
_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALLS = np.linspace(0, 1, 101).tolist()


def _measure(predictions: Sequence[Boxes], targets: Sequence[Boxes], thresholds: list[float]) -> dict[str, float]:
    from torchmetrics.detection import MeanAveragePrecision

    logging.getLogger('faster_coco_eval').setLevel(logging.WARNING)  # it logs a table in each call
    metric = MeanAveragePrecision(
        iou_thresholds=thresholds, rec_thresholds=_RECALLS, max_detection_thresholds=MAX_DETECTIONS,
        backend='faster_coco_eval', sync_on_compute=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about images with more than 100 detections
        metric.update(
            [{key: one[key] for key in ('boxes', 'scores', 'labels')} for one in predictions],
            [{key: one[key] for key in ('boxes', 'labels', 'area', 'iscrowd') if key in one} for one in targets])
        return {name: float(value) for name, value in metric.compute().items() if name in MEASURES}


def _without_difficult(prediction: Boxes, target: Boxes, threshold: float) -> tuple[Boxes, Boxes]:
    """Remove difficult objects, and detections with a difficult object as best match, as in Pascal VOC."""
    difficult = target['difficult']
    ignored = torch.zeros(len(prediction['boxes']), dtype=torch.bool)
    if difficult.any() and len(ignored):
        overlap = box_iou(prediction['boxes'], target['boxes'])
        overlap[prediction['labels'][:, None] != target['labels'][None]] = 0
        best, index = overlap.max(dim=1)
        ignored = (best > threshold) & difficult[index]
    return ({key: value[~ignored] for key, value in prediction.items()},
            {key: value[~difficult] for key, value in target.items()})


def mean_average_precision(predictions: Sequence[Boxes], targets: Sequence[Boxes]) -> dict[str, float]:
    """Compute COCO's mean average precision of boxes, with at most 100 detections per image.

    Crowds are handled as in COCO. Difficult objects are handled as in Pascal VOC, at each IoU threshold: a detection
    that overlaps most with a difficult object of its class is ignored, and difficult objects need not be detected.

    Args:
        predictions: For each image 'boxes' (n, 4), 'scores' (n,) and 'labels' (n,).
        targets: For each image 'boxes' (m, 4) and 'labels' (m,), and optionally 'area', 'iscrowd' and 'difficult'.

    Returns:
        'mAP', 'mAP50', 'mAP75', 'mAP_small', 'mAP_medium' and 'mAP_large', in [0, 1]; NaN if there are no objects.
    """
    if any(target['difficult'].any() for target in targets if 'difficult' in target):
        parts = []
        for threshold in _THRESHOLDS:
            pairs = [_without_difficult(*pair, threshold) for pair in zip(predictions, targets, strict=True)]
            some, others = zip(*pairs, strict=True)
            parts.append(_measure(some, others, [threshold]))
        values = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
        values |= dict(map_50=parts[0]['map'], map_75=parts[5]['map'])
    else:
        values = _measure(predictions, targets, _THRESHOLDS)
    return {ours: values[name] if values[name] >= 0 else math.nan for name, ours in MEASURES.items()}
