"""What a study has to run, and running it: plans, cached results, processes."""
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
    """A dataset, a model and a method: what gets a learning rate of its own."""
    dataset: str
    model: str
    method: str


@dataclass
class Study:
    """What to compare.

    Attributes:
        name: Name of the study.
        about: What it compares, in one sentence.
        datasets: Settings of each dataset: 'name', 'train', 'validation' and 'test' (numbers of images) and
            'label_noise'; and of the training on it, which come before the study's own.
        models: Arguments of timm.create_model, and 'lrs' or training settings that suit the model.
        methods: Options of each method: 'smoothing', 'mixup', 'cutmix', 'manifold_mixup', 'multimix' (the mode) and
            those of MultiMixTask; 'lrs' for learning rates of its own.
        lrs: Learning rates to choose from.
        baselines: Methods that the others are compared with.
        seeds: Number of seeds of the result.
        tuning_seeds: Number of seeds that choose a learning rate.
        training: Epochs, batch size and so on.
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
    about: str = ''

    def groups(self) -> Iterator[Group]:
        return (Group(*names) for names in (
            (dataset, model, method) for dataset in self.datasets for model in self.models for method in self.methods))

    def group_lrs(self, group: Group) -> list[float]:
        """Learning rates to choose from; the method's come before the model's, before the study's."""
        return self.methods[group.method].get('lrs') or self.models[group.model].get('lrs') or self.lrs

    def settings(self, group: Group, lr: float, seed: int) -> dict[str, Any]:
        """All that a run depends on."""
        dataset, model, method = (
            {key: value for key, value in options.items() if key != 'lrs'} for options in
            (self.datasets[group.dataset], self.models[group.model], self.methods[group.method]))
        training = dict(TRAINING_DEFAULTS)
        for options in (self.training, dataset, model, method):  # what is more special comes later
            training |= {key: options.pop(key) if options is not self.training else options[key]
                         for key in TRAINING_DEFAULTS if key in options}
        dataset.setdefault('name', group.dataset)
        return dict(
            dataset=DATASET_DEFAULTS | dataset, model=model, training=training, method=resolve_method(method),
            lr=lr, seed=seed)

    def best_lr(self, group: Group, results: dict[str, dict]) -> float | None:
        """The learning rate of the best mean validation accuracy; None while tuning runs are missing."""
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
        """Settings of the runs to do next, those of low seeds first, so that what is there can be compared."""
        runs = []
        for group in self.groups():
            best = self.best_lr(group, results)
            wanted = ([(lr, seed) for seed in range(self.tuning_seeds) for lr in self.group_lrs(group)] if best is None
                      else [(best, seed) for seed in range(self.seeds)])
            runs += [self.settings(group, lr, seed) for lr, seed in wanted]
        unique = {key_of(settings): settings for settings in runs}
        return sorted((s for key, s in unique.items() if key not in results), key=lambda s: s['seed'])

    def table(self, results: dict[str, dict]) -> dict[Group, dict[str, Any]]:
        """For each group with a learning rate: that, and the metrics of the seeds that have run."""
        rows = {}
        for group in self.groups():
            best = self.best_lr(group, results)
            if best is not None:
                runs = {seed: results.get(key_of(self.settings(group, best, seed))) for seed in range(self.seeds)}
                rows[group] = dict(lr=best, lrs=self.group_lrs(group), runs={s: r for s, r in runs.items() if r})
        return rows


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a name that is given twice: YAML would keep the last and be silent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if key.tag != 'tag:yaml.org,2002:merge']
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'{name} is there twice', node.start_mark)
        return super().construct_mapping(node, deep)


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    for kind in ('datasets', 'models', 'methods', 'training'):
        section = content.get(kind, {})
        if not isinstance(section, dict) or (kind != 'training' and not all(
                isinstance(options, dict) for options in section.values())):
            raise ValueError(f'{path}, {kind}: names with options are needed, such as `cross-entropy: {{}}`.')


def _check_numbers(path: Path, study: Study) -> None:
    named = {**study.models, **study.methods}
    lists = {'lrs': study.lrs} | {f'lrs of {name}': named[name]['lrs'] for name in named if 'lrs' in named[name]}
    for what, lrs in lists.items():
        if not isinstance(lrs, list) or not lrs or not all(isinstance(lr, int | float) and lr > 0 for lr in lrs):
            raise ValueError(f'{path}: {what} must be a list of positive numbers, got {lrs!r}.')
    counts = study.tuning_seeds, study.seeds
    if not all(isinstance(count, int) for count in counts) or not 1 <= study.tuning_seeds <= study.seeds:
        raise ValueError(f'{path}: 1 <= tuning_seeds <= seeds is needed, got {counts}.')


def load_study(path: Path, only: dict[str, list[str] | None] | None = None) -> Study:
    """Read and check a study.

    Args:
        path: The YAML file.
        only: Names to keep of 'datasets', 'models' and 'methods'; None keeps all.

    Raises:
        ValueError: if it is not a study, or names something that does not exist.
    """
    content = yaml.load(path.read_text(), _UniqueKeys)
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a study: it has no datasets, models and methods.')
    about = content.pop('about', '')
    known = {part.name: part for part in fields(Study) if part.name not in ('name', 'about')}
    needed = [name for name, part in known.items() if part.default is part.default_factory is MISSING]
    if not set(needed) <= set(content) <= set(known):
        raise ValueError(
            f'{path} is not a study: it needs {", ".join(needed)}, and may have {", ".join(set(known) - set(needed))}; '
            f'it has {", ".join(map(str, content))}.')
    _check_sections(path, content)
    study = Study(name=path.stem, about=about, **content)
    _check_numbers(path, study)
    for kind, known in (('training', TRAINING_DEFAULTS), ('baselines', study.methods)):
        unknown = set(content.get(kind, ())) - set(known)
        if unknown:
            raise ValueError(f'{path}, {kind}: no {", ".join(sorted(unknown))}, there is {", ".join(known)}.')
    for kind, names in (only or {}).items():
        have = getattr(study, kind)
        if names is not None:
            unknown = set(names) - set(have)
            if unknown:
                raise ValueError(f'{path} has no {", ".join(sorted(unknown))} in {kind}: there is {", ".join(have)}.')
            setattr(study, kind, {name: have[name] for name in have if name in names})
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
                f'{path}, {group.dataset}: datasets are {", ".join(DATASETS)}, with '
                f'{", ".join([*DATASET_DEFAULTS, *TRAINING_DEFAULTS])}.')
    for group in {(group.model, group.method): group for group in study.groups()}.values():
        settings = study.settings(group, 0.1, 0)
        try:
            make_task(timm.create_model(**settings['model'], num_classes=2, in_chans=1), settings['method'])
        except (RuntimeError, TypeError, ValueError) as error:  # what timm and our own options raise
            raise ValueError(f'{path}, {group.model} with {group.method}: {error}') from error
    return study


def key_of(settings: dict[str, Any]) -> str:
    """A hash of the settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_results(folder: Path) -> dict[str, dict]:
    """Metrics of all runs so far, of every study. A line cut short by a crash is skipped: its run is repeated."""
    results = {}
    for file in sorted(folder.glob('*.jsonl')):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            results[record['key']] = record['metrics']
    return results


def _start_worker(niceness: int) -> None:
    os.nice(niceness)
    torch.set_num_threads(1)  # runs are small: more of them at a time beat more threads for each


def _timed_run(settings: dict[str, Any]) -> tuple[dict[str, float], float]:
    start = time.process_time()
    metrics = run(settings)
    return metrics, time.process_time() - start


def _describe(settings: dict[str, Any]) -> str:
    names = settings['dataset']['name'], settings['model']['model_name']
    values = dict(lr=settings['lr'], seed=settings['seed']) | settings['method']
    return ' '.join([*names, *(f'{name}={value}' for name, value in values.items() if value)])


def run_missing(study: Study, results: dict[str, dict], folder: Path, workers: int, niceness: int) -> None:
    """Run what the study lacks; append each run to the study's file as soon as it ends, and to results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{study.name}.jsonl'
    cut_short = path.exists() and not path.read_text().endswith('\n')
    running: dict[Future, dict[str, Any]] = {}
    pool = ProcessPoolExecutor(workers, get_context('spawn'), _start_worker, (niceness,))
    bar = tqdm(desc=study.name, unit='run', disable=None)
    try:
        with path.open('a') as file:
            if cut_short:
                print(file=file)
            while True:
                # What is best to do next changes with every result, so no more is handed out than can start.
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
