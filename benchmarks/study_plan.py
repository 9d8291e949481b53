"""Load a study, determine its missing runs, and run them in parallel processes."""
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import MISSING, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import yaml
from study_run import DATASET_DEFAULTS, DATASETS, TRAINING_DEFAULTS, make_task, resolve_method, run
from tqdm import tqdm

from timm_multimix import __version__

# Settings, metrics and processor time in seconds of a completed run.
Result = tuple[dict[str, Any], dict[str, float], float]
Job = tuple[Callable[[dict[str, Any]], list[Result]], dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """A dataset, a model and a method. The learning rate is tuned for each group."""
    dataset: str
    model: str
    method: str


@dataclass
class Study:
    """Description of a study.

    Attributes:
        columns: Columns of the report: metric, heading, number of decimals, whether higher is better.
        name: Name of the study.
        about: Description in one sentence.
        datasets: Options of each dataset: 'name', 'train', 'validation' and 'test' (numbers of images), 'label_noise',
            and training options that override those of the study.
        models: Options of each model: arguments of timm.create_model, 'lrs', and training options.
        methods: Options of each method: 'smoothing', 'mixup', 'cutmix', 'manifold_mixup', 'multimix' (the mode),
            options of MultiMixTask, 'lrs', and training options.
        lrs: Learning rates to tune over.
        baselines: Methods that the others are compared with.
        seeds: Number of seeds of the final runs.
        tuning_seeds: Number of seeds for tuning the learning rate.
        training: Training options, such as the number of epochs and the batch size.
        detection: Settings of a DetectionStudy.
    """
    columns: ClassVar = (
        ('accuracy', 'accuracy %', 2, True),
        ('nll', 'NLL', 3, False),
        ('ece', 'ECE %', 1, False),
        ('fgsm', 'FGSM %', 1, True),
        ('temperature', 'T', 2, None),
        ('nll_at_t', 'NLL at T', 3, False),
        ('ece_at_t', 'ECE at T', 1, False),
    )

    name: str
    datasets: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    lrs: list[float]
    baselines: list[str] = field(default_factory=lambda: ['cross-entropy'])
    seeds: int = 5
    tuning_seeds: int = 2
    training: dict[str, Any] = field(default_factory=dict)
    detection: dict[str, Any] = field(default_factory=dict)
    about: str = ''

    def groups(self) -> Iterator[Group]:
        return (Group(*names) for names in (
            (dataset, model, method) for dataset in self.datasets for model in self.models for method in self.methods))

    def group_lrs(self, group: Group) -> list[float]:
        """Return the learning rates to tune over: of the method, else of the model, else of the study."""
        return self.methods[group.method].get('lrs') or self.models[group.model].get('lrs') or self.lrs

    def settings(self, group: Group, lr: float, seed: int) -> dict[str, Any]:
        """Return all settings of a run."""
        dataset, model, method = (
            {key: value for key, value in options.items() if key != 'lrs'} for options in
            (self.datasets[group.dataset], self.models[group.model], self.methods[group.method]))
        training = dict(TRAINING_DEFAULTS)
        for options in (self.training, dataset, model, method):  # later options take precedence
            training |= {key: options.pop(key) if options is not self.training else options[key]
                         for key in TRAINING_DEFAULTS if key in options}
        dataset.setdefault('name', group.dataset)
        return dict(
            dataset=DATASET_DEFAULTS | dataset, model=model, training=training, method=resolve_method(method),
            lr=lr, seed=seed)

    def best_lr(self, group: Group, results: dict[str, dict]) -> float | None:
        """Return the learning rate with the best mean validation accuracy, or None if tuning runs are missing."""
        lrs = self.group_lrs(group)
        if len(lrs) == 1:
            return lrs[0]
        scores = {}
        for lr in lrs:
            keys = [key_of(self.settings(group, lr, seed)) for seed in range(self.tuning_seeds)]
            if any(key not in results for key in keys):
                return None
            scores[lr] = statistics.mean(results[key]['validation'] for key in keys)
        return max(lrs, key=scores.get)

    def missing(self, results: dict[str, dict], only_tuning: bool = False) -> list[dict[str, Any]]:
        """Return the settings of the missing runs, sorted by seed, so that methods can be compared early."""
        runs = []
        for group in self.groups():
            best = self.best_lr(group, results)
            wanted = ([(lr, seed) for seed in range(self.tuning_seeds) for lr in self.group_lrs(group)] if best is None
                      else [(best, seed) for seed in range(0 if only_tuning else self.seeds)])
            runs += [self.settings(group, lr, seed) for lr, seed in wanted]
        unique = {key_of(settings): settings for settings in runs}
        return sorted((s for key, s in unique.items() if key not in results), key=lambda s: s['seed'])

    def jobs(self, results: dict[str, dict]) -> list[Job]:
        """Return the functions to call for the missing runs, and their arguments."""
        return [(run_classifier, settings) for settings in self.missing(results)]

    def table(self, results: dict[str, dict]) -> dict[Group, dict[str, Any]]:
        """Return the runs by seed and a label of the learning rate for each tuned group."""
        rows = {}
        for group in self.groups():
            best, lrs = self.best_lr(group, results), self.group_lrs(group)
            if best is not None:
                runs = {seed: results.get(key_of(self.settings(group, best, seed))) for seed in range(self.seeds)}
                edge = '*' if len(lrs) > 1 and best in (min(lrs), max(lrs)) else ''
                rows[group] = dict(lr=f'{best:g}{edge}', runs={seed: run for seed, run in runs.items() if run})
        return rows

    def check(self) -> None:
        """Check the names and values of the study. A task is created for each model and method.

        Raises:
            ValueError: If a name or a value is invalid.
        """
        if not 1 <= self.tuning_seeds <= self.seeds:
            raise ValueError(f'tuning_seeds must be in [1, {self.seeds}], got {self.tuning_seeds}.')
        _check_names('training', self.training, TRAINING_DEFAULTS)
        for group in self.groups():
            dataset = self.settings(group, 0.1, 0)['dataset']
            if dataset['name'] not in DATASETS or set(dataset) != {'name', *DATASET_DEFAULTS}:
                raise ValueError(
                    f'{group.dataset}: the dataset must be one of {", ".join(DATASETS)}, with options '
                    f'{", ".join([*DATASET_DEFAULTS, *TRAINING_DEFAULTS])}.')
        for group in {(group.model, group.method): group for group in self.groups()}.values():
            settings = self.settings(group, 0.1, 0)
            try:
                make_task(timm.create_model(**settings['model'], num_classes=2, in_chans=1), settings['method'])
            except (RuntimeError, TypeError, ValueError) as error:  # errors of timm and of MultiMixTask
                raise ValueError(f'{group.model} with {group.method}: {error}') from error


def _check_names(section: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f'unknown {section} {", ".join(sorted(unknown))}, choose from {", ".join(known)}.')


def load_study(path: Path, only: dict[str, list[str] | None] | None = None) -> Study:
    """Load and check a study.

    Args:
        path: Path of the YAML file.
        only: Names of 'datasets', 'models' and 'methods' to select. None selects all.

    Returns:
        The study. It is a DetectionStudy if the file has a section `detection`.

    Raises:
        ValueError: If the file is not a valid study, or contains an unknown name.
    """
    content = yaml.safe_load(path.read_text())
    known = {part.name: part for part in fields(Study) if part.name != 'name'}
    needed = {name for name, part in known.items() if part.default is part.default_factory is MISSING}
    if not isinstance(content, dict) or not needed <= set(content) <= set(known):
        raise ValueError(
            f'{path} is not a study: required keys are {", ".join(sorted(needed))}, optional keys are '
            f'{", ".join(sorted(set(known) - needed))}.')
    kind = Study
    if 'detection' in content:
        from detection_study import DetectionStudy as kind
    study = kind(name=path.stem, **content)
    try:
        _check_names('baselines', content.get('baselines', ()), study.methods)
        for section, names in (only or {}).items():
            available = getattr(study, section)
            _check_names(section, names or (), available)
            setattr(study, section, {name: available[name] for name in available if names is None or name in names})
        study.baselines = [name for name in study.baselines if name in study.methods]
        study.check()
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return study


def key_of(settings: dict[str, Any]) -> str:
    """Return a hash of the settings, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_results(folder: Path) -> dict[str, dict]:
    """Return the metrics of all runs of all studies. Lines truncated by a crash are skipped."""
    results = {}
    for file in sorted(folder.glob('*.jsonl')):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            results[record['key']] = record['metrics']
    return results


def start_worker(niceness: int) -> None:
    os.nice(niceness)
    torch.set_num_threads(1)  # parallel runs are more efficient than threads for these small models


def run_classifier(settings: dict[str, Any]) -> list[Result]:
    """Train and evaluate a model. See study_run.run for the settings."""
    start = time.process_time()
    metrics = run(settings)
    return [(settings, metrics, time.process_time() - start)]


def run_missing(study: Study, results: dict[str, dict], folder: Path, workers: int, niceness: int) -> None:
    """Run the missing runs. Each result is appended to the file of the study and added to results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{study.name}.jsonl'
    cut_short = path.exists() and not path.read_text().endswith('\n')
    running: dict[Future, Job] = {}
    pool = ProcessPoolExecutor(workers, get_context('spawn'), start_worker, (niceness,))
    bar = tqdm(desc=study.name, unit='job', disable=None)
    try:
        with path.open('a') as file:
            if cut_short:
                print(file=file)
            while True:
                # The missing runs depend on the results, so only as many jobs are submitted as there are workers.
                missing = [job for job in study.jobs(results) if job not in running.values()]
                bar.total = bar.n + len(running) + len(missing)
                bar.refresh()
                for job in missing[:workers - len(running)]:
                    running[pool.submit(*job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    for settings, metrics, seconds in future.result():
                        record = dict(
                            key=key_of(settings), settings=settings, metrics=metrics, seconds=round(seconds, 1),
                            versions=dict(timm_multimix=__version__, timm=timm.__version__, torch=torch.__version__))
                        print(json.dumps(record), file=file, flush=True)
                        results[record['key']] = metrics
                        if not sys.stderr.isatty():
                            print(f'{metrics} in {seconds:.0f} s: {settings}', file=sys.stderr, flush=True)
                    bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
