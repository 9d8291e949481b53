"""Test the mean average precision against pycocotools and the rule of Pascal VOC."""
import contextlib
import io
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from timm_multimix.detection.metric import mean_average_precision


def random_case(num_images=12, crowds=False):
    """Return predictions and true objects, with predictions near some of the objects."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = [], []
    for index in range(num_images):
        count = index % 4
        corners = torch.rand(count, 2, generator=generator) * 100
        boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 120], dim=1)
        labels = torch.randint(1, 4, (count,), generator=generator)
        targets.append(dict(
            boxes=boxes, labels=labels, area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 0.8,
            iscrowd=(torch.rand(count, generator=generator) < 0.3 * crowds).long(),
            difficult=torch.zeros(count, dtype=torch.bool)))
        near = boxes.repeat(2, 1) + 8 * torch.randn(2 * count, 4, generator=generator)
        stray = torch.tensor([[10.0, 10, 60, 70]])
        near = torch.cat([near, stray])
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        predictions.append(dict(
            boxes=near, labels=torch.cat([labels.repeat(2), torch.tensor([1])]),
            scores=torch.rand(len(near), generator=generator)))
    return predictions, targets


def test_perfect_predictions_and_none():
    _, targets = random_case()
    perfect = [dict(boxes=one['boxes'], labels=one['labels'], scores=torch.ones(len(one['labels']))) for one in targets]
    assert mean_average_precision(perfect, targets)['mAP'] == pytest.approx(1)
    nothing = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
               for _ in targets]
    values = mean_average_precision(nothing, targets)
    assert values['mAP'] == values['mAP50'] == values['mAP75'] == 0
    small = [dict(one, boxes=one['boxes'] / 100, area=one['area'] / 1e4) for one in targets]
    assert math.isnan(mean_average_precision(nothing, small)['mAP_large'])


@pytest.mark.parametrize('crowds', [False, True])
def test_agrees_with_pycocotools(crowds):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions, targets = random_case(crowds=crowds)

    def entries(values, *extra):
        result = []
        for image, one in enumerate(values):
            for index, (x1, y1, x2, y2) in enumerate(one['boxes'].tolist()):
                result.append(dict(
                    image_id=image, bbox=[x1, y1, x2 - x1, y2 - y1], category_id=int(one['labels'][index]),
                    id=len(result) + 1, **{name: one[key][index].item() for key, name in extra}))
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(
            images=[dict(id=image) for image in range(len(targets))], categories=[dict(id=n) for n in (1, 2, 3)],
            annotations=entries(targets, ('area', 'area'), ('iscrowd', 'iscrowd')))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(entries(predictions, ('scores', 'score'))), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = list(mean_average_precision(predictions, targets).values())
    expected = [value if value >= 0 else math.nan for value in evaluation.stats[:6]]
    assert np.allclose(values, expected, atol=1e-6, equal_nan=True) and 0.05 < values[0] < 0.95


def voc_average_precision(predictions, targets, threshold):
    """Compute the average precision of one class by the rule of Pascal VOC, with the 101 recalls of COCO."""
    ranked = sorted(((score, image, box) for image, one in enumerate(predictions)
                     for score, box in zip(one['scores'].tolist(), one['boxes'], strict=True)), key=lambda r: -r[0])
    found, hits = set(), []
    for _, image, box in ranked:
        overlaps = box_iou(box[None], targets[image]['boxes'])[0].tolist()
        best = max(range(len(overlaps)), key=overlaps.__getitem__)
        if overlaps[best] > threshold:
            if targets[image]['difficult'][best]:
                continue
            hits.append((image, best) not in found)
            found.add((image, best))
        else:
            hits.append(False)
    total = sum(int((~one['difficult']).sum()) for one in targets)
    hits = np.array(hits)
    recall, precision = hits.cumsum() / total, hits.cumsum() / np.arange(1, len(hits) + 1)
    return np.mean([precision[recall >= level - 1e-12].max(initial=0) for level in np.linspace(0, 1, 101)])


def test_difficult_objects_are_ignored_as_in_voc():
    generator = torch.Generator().manual_seed(1)
    grid = torch.tensor([[x, y, x + 40.0, y + 40] for x in (0, 60, 120) for y in (0, 60)])
    predictions, targets = [], []
    for _ in range(10):
        difficult = torch.rand(len(grid), generator=generator) < 0.4
        boxes = grid.repeat(2, 1) + 7 * torch.randn(2 * len(grid), 4, generator=generator)
        inside = grid + torch.tensor([12.0, 12, -12, -12])  # inside an object, but with little overlap: not ignored
        boxes = torch.cat([boxes, inside])
        predictions.append(dict(
            boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64),
            scores=torch.rand(len(boxes), generator=generator)))
        targets.append(dict(boxes=grid, labels=torch.ones(len(grid), dtype=torch.int64), difficult=difficult))
    expected = [voc_average_precision(predictions, targets, threshold) for threshold in np.arange(0.5, 1, 0.05)]
    values = mean_average_precision(predictions, targets)
    assert values['mAP50'] == pytest.approx(expected[0], abs=1e-6)
    assert values['mAP75'] == pytest.approx(expected[5], abs=1e-6)
    assert values['mAP'] == pytest.approx(np.mean(expected), abs=1e-6)
    counted = [dict(one, difficult=torch.zeros(len(grid), dtype=torch.bool)) for one in targets]
    assert abs(mean_average_precision(predictions, counted)['mAP50'] - values['mAP50']) > 0.01
