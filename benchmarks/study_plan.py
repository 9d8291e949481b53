"""Load a study, determine its missing runs, and run them in parallel processes."""
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import MISSING, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from study_run import DATASET_DEFAULTS, DATASETS, TRAINING_DEFAULTS, make_task, resolve_method, run
from tqdm import tqdm

from timm_multimix import __version__


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
        detection: For a study of detection: the grid of the detector's 'lrs' and 'epochs', and numbers of scenes.
    """
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

    def missing(self, results: dict[str, dict]) -> list[dict[str, Any]]:
        """Return the settings of the missing runs, sorted by seed, so that methods can be compared early."""
        runs = []
        for group in self.groups():
            best = self.best_lr(group, results)
            wanted = ([(lr, seed) for seed in range(self.tuning_seeds) for lr in self.group_lrs(group)] if best is None
                      else [(best, seed) for seed in range(self.seeds)])
            runs += [self.settings(group, lr, seed) for lr, seed in wanted]
        unique = {key_of(settings): settings for settings in runs}
        return sorted((s for key, s in unique.items() if key not in results), key=lambda s: s['seed'])

    def table(self, results: dict[str, dict]) -> dict[Group, dict[str, Any]]:
        """Return the learning rate and the metrics of the completed runs of each tuned group."""
        rows = {}
        for group in self.groups():
            best = self.best_lr(group, results)
            if best is not None:
                runs = {seed: results.get(key_of(self.settings(group, best, seed))) for seed in range(self.seeds)}
                rows[group] = dict(lr=best, lrs=self.group_lrs(group), runs={s: r for s, r in runs.items() if r})
        return rows


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if key.tag != 'tag:yaml.org,2002:merge']
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'duplicate key {name}', node.start_mark)
        return super().construct_mapping(node, deep)


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    for kind in ('datasets', 'models', 'methods', 'training'):
        section = content.get(kind, {})
        if not isinstance(section, dict) or (kind != 'training' and not all(
                isinstance(options, dict) for options in section.values())):
            raise ValueError(f'{path}: {kind} must map names to options, such as `cross-entropy: {{}}`.')


def _check_numbers(path: Path, study: Study) -> None:
    named = {**study.models, **study.methods}
    lists = {'lrs': study.lrs} | {f'lrs of {name}': named[name]['lrs'] for name in named if 'lrs' in named[name]}
    for name, lrs in lists.items():
        if not isinstance(lrs, list) or not lrs or not all(isinstance(lr, int | float) and lr > 0 for lr in lrs):
            raise ValueError(f'{path}: {name} must be a list of positive numbers, got {lrs!r}.')
    counts = study.tuning_seeds, study.seeds
    if not all(isinstance(count, int) for count in counts) or not 1 <= study.tuning_seeds <= study.seeds:
        raise ValueError(f'{path}: tuning_seeds and seeds must satisfy 1 <= tuning_seeds <= seeds, got {counts}.')


def load_study(path: Path, only: dict[str, list[str] | None] | None = None) -> Study:
    """Load and validate a study.

    Args:
        path: Path of the YAML file.
        only: Names of 'datasets', 'models' and 'methods' to select. None selects all.

    Returns:
        The study.

    Raises:
        ValueError: If the file is not a valid study, or contains an unknown name.
    """
    content = yaml.load(path.read_text(), _UniqueKeys)
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a study: datasets, models and methods are missing.')
    about = content.pop('about', '')
    known = {part.name: part for part in fields(Study) if part.name not in ('name', 'about')}
    needed = [name for name, part in known.items() if part.default is part.default_factory is MISSING]
    if not set(needed) <= set(content) <= set(known):
        raise ValueError(
            f'{path} is not a study: required keys are {", ".join(needed)}, optional keys are '
            f'{", ".join(set(known) - set(needed))}, got {", ".join(map(str, content))}.')
    _check_sections(path, content)
    study = Study(name=path.stem, about=about, **content)
    _check_numbers(path, study)
    for kind, known in (('training', TRAINING_DEFAULTS), ('baselines', study.methods)):
        unknown = set(content.get(kind, ())) - set(known)
        if unknown:
            raise ValueError(f'{path}: unknown {kind} {", ".join(sorted(unknown))}, choose from {", ".join(known)}.')
    for kind, names in (only or {}).items():
        available = getattr(study, kind)
        if names is not None:
            unknown = set(names) - set(available)
            if unknown:
                raise ValueError(
                    f'{path}: unknown {kind} {", ".join(sorted(unknown))}, choose from {", ".join(available)}.')
            setattr(study, kind, {name: available[name] for name in available if name in names})
    study.baselines = [name for name in study.baselines if name in study.methods]
    for group in study.groups():
        try:
            settings = study.settings(group, 0.1, 0)
        except ValueError as error:
            raise ValueError(f'{path}, {group.method}: {error}') from error
        for name in ('epochs', 'batch_size'):
            value = settings['training'][name]
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{path}, {group.dataset}: {name} must be 1 or more, got {value!r}.')
        dataset = settings['dataset']
        if dataset['name'] not in DATASETS or set(dataset) != {'name', *DATASET_DEFAULTS}:
            raise ValueError(
                f'{path}, {group.dataset}: the dataset must be one of {", ".join(DATASETS)}, with options '
                f'{", ".join([*DATASET_DEFAULTS, *TRAINING_DEFAULTS])}.')
    for group in {(group.model, group.method): group for group in study.groups()}.values():
        settings = study.settings(group, 0.1, 0)
        try:
            make_task(timm.create_model(**settings['model'], num_classes=2, in_chans=1), settings['method'])
        except (RuntimeError, TypeError, ValueError) as error:  # errors of timm and of MultiMixTask
            raise ValueError(f'{path}, {group.model} with {group.method}: {error}') from error
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


def _timed_run(settings: dict[str, Any]) -> tuple[dict[str, float], float]:
    start = time.process_time()
    metrics = run(settings)
    return metrics, time.process_time() - start


def _describe(settings: dict[str, Any]) -> str:
    names = settings['dataset']['name'], settings['model']['model_name']
    values = dict(lr=settings['lr'], seed=settings['seed']) | settings['method']
    return ' '.join([*names, *(f'{name}={value}' for name, value in values.items() if value)])


def run_missing(study: Study, results: dict[str, dict], folder: Path, workers: int, niceness: int) -> None:
    """Run the missing runs. Each result is appended to the file of the study and added to results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{study.name}.jsonl'
    cut_short = path.exists() and not path.read_text().endswith('\n')
    running: dict[Future, dict[str, Any]] = {}
    pool = ProcessPoolExecutor(workers, get_context('spawn'), start_worker, (niceness,))
    bar = tqdm(desc=study.name, unit='run', disable=None)
    try:
        with path.open('a') as file:
            if cut_short:
                print(file=file)
            while True:
                # The missing runs depend on the results, so only as many runs are submitted as there are workers.
                missing = [settings for settings in study.missing(results) if settings not in running.values()]
                bar.total = bar.n + len(running) + len(missing)
                bar.refresh()
                for settings in missing[:workers - len(running)]:
                    running[pool.submit(_timed_run, settings)] = settings
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    settings = running.pop(future)
                    metrics, seconds = future.result()
                    record = dict(
                        key=key_of(settings), settings=settings, metrics=metrics, seconds=round(seconds, 1),
                        versions=dict(timm_multimix=__version__, timm=timm.__version__, torch=torch.__version__))
                    print(json.dumps(record), file=file, flush=True)
                    results[record['key']] = metrics
                    bar.update()
                    if not sys.stderr.isatty():
                        print(f'{_describe(settings)}: {metrics["accuracy"]:.2f} % ({seconds:.0f} s)',
                              file=sys.stderr, flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
