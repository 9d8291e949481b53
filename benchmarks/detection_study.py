"""Study of detection: backbones trained by each method, transferred frozen to demo/scenes.

The learning rate of each classifier is tuned on the validation images of its dataset. The learning rate and the number
of epochs of the detector are tuned on validation scenes. `tuning_seeds` seeds are used for both. The metrics are those
of the test scenes. The backbone of the method `random weights` is not trained. benchmarks/study.py runs the study.
"""
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import timm
import torch
from study_plan import Group, Job, Result, Study, key_of, run_classifier
from study_run import IMAGE_SIZE, load_splits, train

from timm_multimix.detection.detectors import Settings
from timm_multimix.detection.metric import mean_average_precision
from timm_multimix.detection.splits import image_bounds, scenes
from timm_multimix.detection.training import transfer
from timm_multimix.evaluation.models import Candidate

RANDOM = 'random weights'
SPLITS = ('train', 'validation', 'test')


def _backbone(settings: dict[str, Any], is_random: bool) -> Candidate:
    """Return the classifier with the settings of a study, untrained if is_random."""
    options = dict(settings['model'], in_chans=1)
    if is_random:
        torch.manual_seed(settings['seed'])
        model = timm.create_model(**options)
    else:
        data = load_splits(settings['dataset'], options.get('img_size', IMAGE_SIZE))['train']
        model = train(settings, data).trainable_module
    size = options.get('img_size', IMAGE_SIZE)
    config = dict(input_size=(1, size, size), mean=(0.5,), std=(0.5,))
    return Candidate('backbone', 'backbone', 'trained', options, model, config, 'L')


def run_detectors(job: dict[str, Any]) -> list[Result]:
    """Train a backbone, and a detector for each point of the grid.

    Args:
        job: The 'classifier' settings, 'is_random', the numbers of 'scenes' and the grid 'points'.
    """
    classifier = job['classifier']
    source = _backbone(classifier, job['is_random'])
    data = [scenes(split, job['scenes'][split]) for split in SPLITS]
    min_size, max_size = image_bounds(data[0])
    results = []
    for point in job['points']:
        start = time.process_time()
        settings = Settings(min_size=min_size, max_size=max_size, **point)
        tuned, tested = (mean_average_precision(*predicted) for predicted in transfer(
            source, data, settings, torch.device('cpu'), seed=classifier['seed']))
        metrics = dict(validation=tuned['mAP'], **{name: tested[name] for name, *_ in DetectionStudy.columns})
        results.append((run_settings(job, point), metrics, time.process_time() - start))
    return results


def run_settings(job: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of the run of a detector."""
    return dict(classifier=job['classifier'], is_random=job['is_random'], scenes=job['scenes'], detector=point)


class DetectionStudy(Study):
    """Study with a section 'detection': the 'lrs' and 'epochs' to tune over, and the number of scenes of each split."""
    columns: ClassVar = (('mAP', 'mAP', 3, True), ('mAP50', 'mAP50', 3, True), ('mAP75', 'mAP75', 3, True))

    def check(self) -> None:
        super().check()
        required = {'lrs', 'epochs', *SPLITS}
        if set(self.detection) != required:
            raise ValueError(f'the section detection must have the keys {", ".join(sorted(required))}.')

    def group_lrs(self, group: Group) -> list[float]:
        lrs = super().group_lrs(group)
        return lrs[:1] if group.method == RANDOM else lrs

    def job(self, group: Group, seed: int, results: dict[str, dict]) -> dict[str, Any]:
        """Return the settings that the detectors of a group and a seed share. The learning rate must be tuned."""
        settings = self.settings(group, self.best_lr(group, results), seed)
        numbers = {split: self.detection[split] for split in SPLITS}
        return dict(classifier=settings, is_random=group.method == RANDOM, scenes=numbers)

    def best_points(self, group: Group, results: dict[str, dict]) -> list[dict[str, Any]]:
        """Return the point with the best mean mAP on validation scenes, or the whole grid if runs are missing."""
        grid = [dict(lr=lr, epochs=epochs)
                for lr, epochs in itertools.product(self.detection['lrs'], self.detection['epochs'])]
        scores = []
        for point in grid:
            keys = [key_of(run_settings(self.job(group, seed, results), point)) for seed in range(self.tuning_seeds)]
            if any(key not in results for key in keys):
                return grid
            scores.append(statistics.mean(results[key]['validation'] for key in keys))
        return [grid[scores.index(max(scores))]]

    def _detector_jobs(self, results: dict[str, dict]) -> Iterator[Job]:
        for group in self.groups():
            if self.best_lr(group, results) is None:
                continue
            best = self.best_points(group, results)
            for seed in range(self.seeds if len(best) == 1 else self.tuning_seeds):
                job = self.job(group, seed, results)
                points = [point for point in best if key_of(run_settings(job, point)) not in results]
                if points:
                    yield run_detectors, dict(job, points=points)

    def jobs(self, results: dict[str, dict]) -> list[Job]:
        tuning = [(run_classifier, settings) for settings in self.missing(results, only_tuning=True)]
        return [*tuning, *self._detector_jobs(results)]

    def table(self, results: dict[str, dict]) -> dict[Group, dict[str, Any]]:
        rows = {}
        for group in self.groups():
            points = self.best_points(group, results) if self.best_lr(group, results) is not None else []
            if len(points) == 1:
                keys = {seed: key_of(run_settings(self.job(group, seed, results), points[0]))
                        for seed in range(self.seeds)}
                rows[group] = dict(
                    lr='{lr:g}, {epochs} epochs'.format(**points[0]),
                    runs={seed: results[key] for seed, key in keys.items() if key in results})
        return rows
