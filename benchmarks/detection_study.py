#!/usr/bin/env python3
"""Study of detection: backbones trained by each method, transferred frozen to demo/scenes.

Each method has its own learning rate of the classifier, chosen on the validation images of its dataset, and its own
learning rate and number of epochs of the detector, chosen on validation scenes. `tuning_seeds` seeds choose both.
The metrics are those of the test scenes. The method `random weights` is not trained.

Runs are kept in benchmarks/results/, one JSON line each, and are never repeated: stop at any time and start again.

    python benchmarks/detection_study.py benchmarks/studies/detection.yaml               # run what is missing, report
    python benchmarks/detection_study.py benchmarks/studies/detection.yaml --report-only
"""
import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from study_plan import Group, Study, key_of, load_results, load_study, start_worker
from study_report import best_baseline, mean_and_spread, paired_difference
from study_run import IMAGE_SIZE, load_splits, run, train
from tqdm import tqdm

from timm_multimix import __version__
from timm_multimix.detection.backbones import Source
from timm_multimix.detection.detectors import Settings, find_levels
from timm_multimix.detection.metric import mean_average_precision
from timm_multimix.detection.splits import image_bounds, scenes
from timm_multimix.detection.training import transfer

RESULTS = Path(__file__).parent / 'results'
RANDOM = 'random weights'
COLUMNS = ('mAP', 'mAP50', 'mAP75')


def _backbone(settings: dict[str, Any], is_random: bool) -> Source:
    """The classifier of a study's settings, trained or not."""
    options = dict(settings['model'], in_chans=1)
    if is_random:
        torch.manual_seed(settings['seed'])
        model = timm.create_model(**options)
    else:
        data = load_splits(settings['dataset'], options.get('img_size', IMAGE_SIZE))['train']
        model = train(settings, data).trainable_module
    size = options.get('img_size', IMAGE_SIZE)
    return Source('backbone', 'backbone', 'trained', options, (1, size, size), (0.5,), (0.5,), 'L', model.state_dict())


def run_detectors(job: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, float], float]]:
    """Train a backbone, and a detector for each point of the grid.

    Args:
        job: The 'classifier' settings, whether it 'is_random', the numbers of 'scenes' and the grid 'points'.

    Returns:
        For each point: the settings of the run, its metrics and its seconds.
    """
    classifier = job['classifier']
    source = _backbone(classifier, job['is_random'])
    data = [scenes(split, job['scenes'][split]) for split in ('train', 'validation', 'test')]
    min_size, max_size = image_bounds(data[0])
    results = []
    for point in job['points']:
        start = time.process_time()
        settings = Settings(min_size=min_size, max_size=max_size, **point)
        levels = find_levels(source, settings, data[0].sizes)
        tuned, tested = (mean_average_precision(*predicted) for predicted in transfer(
            source, levels, data, settings, torch.device('cpu'), seed=classifier['seed']))
        metrics = dict(validation=tuned['mAP'], **{name: tested[name] for name in COLUMNS})
        results.append((run_settings(job, point), metrics, time.process_time() - start))
    return results


def run_settings(job: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """All that the run of a detector depends on."""
    return dict(classifier=job['classifier'], is_random=job['is_random'], scenes=job['scenes'], detector=point)


def grid(study: Study) -> list[dict[str, Any]]:
    """Settings of the detector to choose from."""
    return [dict(lr=lr, epochs=epochs)
            for lr, epochs in itertools.product(study.detection['lrs'], study.detection['epochs'])]


def classifier_lr(study: Study, group: Group, results: dict[str, dict]) -> float | None:
    """The learning rate of the classifier, None while it is not known."""
    return study.group_lrs(group)[0] if group.method == RANDOM else study.best_lr(group, results)


def job_of(study: Study, group: Group, seed: int, results: dict[str, dict]) -> dict[str, Any]:
    """What the runs of a group and a seed have in common."""
    numbers = {split: study.detection[split] for split in ('train', 'validation', 'test')}
    settings = study.settings(group, classifier_lr(study, group, results), seed)
    return dict(classifier=settings, is_random=group.method == RANDOM, scenes=numbers)


def best_point(study: Study, group: Group, results: dict[str, dict]) -> dict[str, Any] | None:
    """The point of the grid with the best mean mAP on validation scenes; None while runs are missing."""
    if classifier_lr(study, group, results) is None:
        return None
    scores = []
    for point in grid(study):
        keys = [key_of(run_settings(job_of(study, group, seed, results), point)) for seed in range(study.tuning_seeds)]
        if any(key not in results for key in keys):
            return None
        scores.append(statistics.mean(results[key]['validation'] for key in keys))
    return grid(study)[scores.index(max(scores))]


def missing_jobs(study: Study, results: dict[str, dict]) -> Iterator[dict[str, Any]]:
    """Jobs to do next: the grid for tuning seeds, the best point for the others."""
    for group in study.groups():
        if classifier_lr(study, group, results) is None:
            continue
        best = best_point(study, group, results)
        for seed in range(study.tuning_seeds if best is None else study.seeds):
            job = job_of(study, group, seed, results)
            points = [point for point in (grid(study) if best is None else [best])
                      if key_of(run_settings(job, point)) not in results]
            if points:
                yield dict(job, points=points)


def _classify(settings: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, float], float]]:
    start = time.process_time()
    metrics = run(settings)
    return [(settings, metrics, time.process_time() - start)]


def missing_classifiers(study: Study, results: dict[str, dict]) -> list[dict[str, Any]]:
    """Runs that choose the learning rates of the classifiers."""
    settings = [study.settings(group, lr, seed) for group in study.groups() for lr in study.group_lrs(group)
                for seed in range(study.tuning_seeds) if classifier_lr(study, group, results) is None]
    return [one for one in settings if key_of(one) not in results]


def run_missing(study: Study, results: dict[str, dict], folder: Path, workers: int, niceness: int) -> None:
    """Run what the study lacks; append each run to the study's file as soon as it ends, and to results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{study.name}.jsonl'
    if path.exists() and not path.read_text().endswith('\n'):  # a line cut short
        with path.open('a') as file:
            print(file=file)
    pool = ProcessPoolExecutor(workers, get_context('spawn'), start_worker, (niceness,))
    try:
        while True:
            jobs = [(_classify, one) for one in missing_classifiers(study, results)]
            jobs = jobs or [(run_detectors, one) for one in missing_jobs(study, results)]
            if not jobs:
                return
            futures = [pool.submit(*job) for job in jobs]
            for future in tqdm(as_completed(futures), study.name, len(futures), unit='job', disable=None):
                for settings, metrics, seconds in future.result():
                    record = dict(
                        key=key_of(settings), settings=settings, metrics=metrics, seconds=round(seconds, 1),
                        versions=dict(timm_multimix=__version__, timm=timm.__version__, torch=torch.__version__))
                    with path.open('a') as file:
                        print(json.dumps(record), file=file, flush=True)
                    results[record['key']] = metrics
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def report(study: Study, results: dict[str, dict]) -> str:
    """Markdown: a table for each dataset and model, compared with the best baseline on validation scenes."""
    parts = []
    for dataset, model in itertools.product(study.datasets, study.models):
        rows = {}
        for group in study.groups():
            point = best_point(study, group, results) if (group.dataset, group.model) == (dataset, model) else None
            if point is not None:
                keys = {seed: key_of(run_settings(job_of(study, group, seed, results), point))
                        for seed in range(study.seeds)}
                rows[group.method] = dict(
                    point=point, runs={seed: results[key] for seed, key in keys.items() if key in results})
        baseline = best_baseline(rows, study.baselines)
        lines = [f'| method | lr | epochs | n | {" | ".join(COLUMNS)} | mAP over {baseline} [95 %] |', '|---' * 8 + '|']
        for name, row in rows.items():
            compared = paired_difference(row['runs'], rows[baseline]['runs'], 'mAP') if baseline else None
            difference = '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*compared) if compared and name != baseline else ''
            values = [mean_and_spread([run[column] for run in row['runs'].values()], 3) for column in COLUMNS]
            lines.append(f'| {name} | {row["point"]["lr"]:g} | {row["point"]["epochs"]} | {len(row["runs"])} | '
                         f'{" | ".join(values)} | {difference} |')
        if rows:
            parts.append(f'**{dataset}, {model}**\n\n' + '\n'.join(lines))
    return f'## {study.name}\n\n{study.about}\n\n' + ('\n\n'.join(parts) or 'No method has its settings yet.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path, help='YAML file of a study with a section `detection`')
    for kind in ('datasets', 'models', 'methods'):
        parser.add_argument(f'--{kind}', nargs='+', metavar='NAME', help=f'only these {kind} (default: all)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='runs at a time (default: %(default)s)')
    parser.add_argument('--nice', type=int, default=0, help='lower the priority of the runs by this')
    parser.add_argument('--report-only', action='store_true', help='report what has been run, and run nothing')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='(default: %(default)s)')
    args = parser.parse_args()
    try:
        study = load_study(args.study, {kind: getattr(args, kind) for kind in ('datasets', 'models', 'methods')})
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(str(error))
    needed = {'lrs', 'epochs', 'train', 'validation', 'test'}
    if set(study.detection) != needed:
        sys.exit(f'{args.study}: the section detection needs {", ".join(sorted(needed))}.')
    results = load_results(args.results)
    try:
        if not args.report_only:
            run_missing(study, results, args.results, args.workers, args.nice)
    except KeyboardInterrupt:
        print('Stopped; start again to continue.', file=sys.stderr)
    print(report(study, results))


if __name__ == '__main__':
    main()
