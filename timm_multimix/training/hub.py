"""Runs on the Hugging Face Hub: from a run folder to a model, in the background while the run trains, or afterwards."""
import argparse
import getpass
import glob
import json
import logging
import os
import queue
import re
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file
from timm.models import clean_state_dict, get_pretrained_cfg, parse_model_name
from timm.utils import unwrap_model
from timm.utils.distributed import world_info_from_env

from ..data import DEMOS
from ..hub import (
    CARD_NAME,
    CONFIG_NAME,
    CURVE_NAME,
    RETRY_WAITS,
    WEIGHTS_NAME,
    Evaluation,
    HubError,
    HubRepository,
    check_rebuilds,
    dataset_type,
    model_card,
    redact,
    save_config,
    save_weights,
    with_retries,
)
from .arguments import build_parser
from .checkpoints import read_checkpoint, weights_of_metric
from .curve import draw_curve, read_summary
from .errors import UsageError, blame
from .files import duplicate, replacing
from .logs import setup_logging
from .model import create_run_model, model_options, resolve_data
from .run import Run

_logger = logging.getLogger(__name__)

# --hub-weights, and the entries of a checkpoint that it may mean, the first that is there.
WEIGHTS = {
    'best': (),  # what the checkpoint says gave its metric
    'student': ('state_dict', 'model'),
    'ema': ('state_dict_ema',),
    'teacher': ('state_dict_teacher',),
}
_NAMES = {'state_dict': 'the trained weights', 'model': 'the trained weights',
          'state_dict_ema': 'the average of the weights', 'state_dict_teacher': 'the teacher'}
_BEST = ('model_calibrated.pth.tar', 'model_best.pth.tar', 'last.pth.tar')
_WORK_FOLDER = '.hub-'

# Options that say where and on what a run runs, not what it trains.
_LOCAL_OPTIONS = frozenset((
    'config', 'timm_script', 'data', 'data_dir', 'class_map', 'output', 'experiment', 'resume', 'no_resume_opt',
    'start_epoch', 'stop_epoch', 'validate', 'local_rank', 'device', 'device_modules', 'log_wandb', 'wandb_project',
    'wandb_tags', 'wandb_resume_id', 'save_images', 'log_interval', 'recovery_interval', 'checkpoint_hist',
    'save_epochs', 'pretrained_path', 'push_to_hub', 'hub_model_id', 'hub_strategy', 'hub_private_repo', 'hub_revision',
    'hub_always_push', 'hub_weights', 'hub_force', 'card'))


def write_config(run: Run) -> None:
    """Write timm's config.json of the model into the folder of its run, from where it is pushed.

    Raises:
        UsageError: if timm cannot describe the model, and the run is to be pushed.
    """
    try:
        with replacing(os.path.join(run.folder, CONFIG_NAME)) as path:
            save_config(
                unwrap_model(run.task.get_trainable_module()), path,
                data_config=dict(run.data_config, crop_mode='center'),  # the one that timm's validation has
                label_names=label_names(run.loaders.train.dataset, run.args.num_classes),
                from_scratch=not (run.args.pretrained or run.args.initial_checkpoint))
    except HubError as error:
        if run.args.push_to_hub:
            raise UsageError(f'--push-to-hub: {error}') from error
        _logger.debug(f'{CONFIG_NAME} is not written: {error}')


def label_names(dataset, num_classes: int) -> list[str] | None:
    """Names of the classes in order, if the dataset has one for each."""
    while hasattr(dataset, 'dataset') and not hasattr(dataset, 'reader'):  # wrapped
        dataset = dataset.dataset
    indices = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
    names = {index: str(name) for name, index in indices.items()}
    if sorted(names) != list(range(num_classes)) or len(names) != len(indices):
        return None
    return [names[index] for index in range(num_classes)]


class Model(NamedTuple):
    """A model of a run, ready to be pushed: what lies in a folder, and what it is.

    Attributes:
        architecture: timm's name.
        message: A commit message.
    """
    architecture: str
    message: str


def _plain(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the plain timm model: without wrappers' names, and without the extra BatchNorms of --split-bn."""
    return {name: value for name, value in clean_state_dict(state_dict).items() if 'aux_bn' not in name}


def _weights_key(checkpoint: Mapping[str, Any], which: str, path: str) -> str:
    keys = WEIGHTS[which] or (weights_of_metric(checkpoint),)
    key = next((key for key in keys if checkpoint.get(key) is not None), None)
    if key is None:
        raise UsageError(f'{path} holds no {_NAMES[keys[0]]} ({keys[0]}): choose other weights than {which!r}.')
    return key


def _is_private(value: Any) -> bool:
    """Whether an option's value may tell something of this machine or its user."""
    if isinstance(value, Mapping):
        return any(map(_is_private, value.values())) or any(map(_is_private, value))
    if isinstance(value, (list, tuple)):
        return any(map(_is_private, value))
    if not isinstance(value, str):
        return False
    if value.startswith('hf-hub:'):
        return False
    names = {socket.gethostname(), socket.gethostname().partition('.')[0], os.environ.get('WANDB_API_KEY', '')}
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    looks_local = re.search(r'(^|[\s=:,])(/|~|\.\.?/|[A-Za-z]:[\\/]|\\\\)|\\|://|\bhf_\w{6}|\b[0-9a-f]{40}\b', value)
    return bool(looks_local) or any(
        re.search(rf'(?<![\w-]){re.escape(name)}(?![\w-])', value) for name in names if len(name) > 2)


def _public(value: str | None, otherwise: str) -> str:
    return otherwise if not value or _is_private(value) else value


def recipe(args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options that repeat a training, without those that are private.

    Returns:
        Options that differ from their defaults; names of those that are left out because of what they say.
    """
    defaults = vars(build_parser().parse_args([]))
    given = {name: value for name, value in args.items()
             if name in defaults and value != defaults[name] and name not in _LOCAL_OPTIONS}
    private = sorted(name for name, value in given.items() if _is_private(value))
    return {name: value for name, value in given.items() if name not in private}, private


def _base_model(args: Mapping[str, Any]) -> str | None:
    """The model on the Hub that a run started from."""
    source, name = parse_model_name(args['model'])
    start_source, start = _split(args.get('initial_checkpoint') or '')
    if start_source == 'hf-hub':
        return start.partition('@')[0]
    if not args.get('pretrained') or args.get('pretrained_path') or start:
        return None
    if source == 'hf-hub':
        return name.partition('@')[0]
    cfg = get_pretrained_cfg(name, allow_unregistered=True) if source is None else None
    return cfg.hf_hub_id if cfg is not None else None


def _split(name: str) -> tuple[str | None, str]:
    source, separator, rest = name.partition(':')
    return ('hf-hub', rest) if separator and source.lower() in ('hf-hub', 'hf_hub') else (None, name)


def _evaluation(args: Mapping[str, Any], checkpoint: Mapping[str, Any], row: Mapping[str, float]) -> Evaluation | None:
    """What the summary tells of the very weights that are pushed, or else the metric of their checkpoint."""
    name, value = args.get('eval_metric', ''), checkpoint.get('metric')
    if value is None or not args.get('val_split'):
        return None
    prefix = 'eval_'
    metrics = {name: float(value)}
    if name and abs(row.get(prefix + name, float('inf')) - value) <= 1e-6 * max(1, abs(value)):
        metrics = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
    if 'temperature' in checkpoint:
        metrics.pop('loss', None)  # calibration changes it, and no accuracy
    dataset, split = _public(args.get('dataset'), ''), _public(args['val_split'], 'validation')
    demo = DEMOS.get(dataset.lower())
    fields = args.get('card') or {}
    kind = dataset_type(dataset)
    shown = demo.description if demo else 'images in folders' if kind == 'imagefolder' else kind
    return Evaluation((fields.get('datasets') or [kind])[0], fields.get('dataset_name') or shown, split, metrics)


def _summary(args: Mapping[str, Any], config: Mapping[str, Any], weights: str, epoch: int | None, base: str | None):
    """A sentence or two on what was trained."""
    how = {'dense': ' with dense [MultiMix](https://arxiv.org/abs/2311.05538)',
           'pooled': ' with pooled [MultiMix](https://arxiv.org/abs/2311.05538)'}.get(args.get('multimix'), '')
    start = f', fine-tuned from [{base}](https://huggingface.co/{base})' if base else ''
    when = f', after epoch {epoch} (counted from 0)' if epoch is not None else ''
    return (f'An image classifier for {config["num_classes"]} classes: `{config["architecture"]}`{start}, trained{how}.'
            f' These are {_NAMES[weights]}{when}.')


def _multimix(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get('multimix', 'off') == 'off':
        return None
    return {name: value for name, value in args.items()
            if name.startswith(('multimix', 'no_multimix')) and value is not None and not _is_private(value)}


def _check_public(text: str, folder: str) -> None:
    """The last look at a card. What it looks for has no business there, wherever it came from."""
    secrets = {get_token(), os.environ.get('HF_TOKEN'), os.environ.get('WANDB_API_KEY'), os.path.realpath(folder),
               os.path.expanduser('~')}
    for secret in secrets:
        if secret and len(secret) > 1 and re.search(rf'(?<![\w.-]){re.escape(secret)}', text):
            raise HubError('The card would tell something private (a token or a path of this machine): see '
                           '`python -m timm_multimix.hub card RUN_FOLDER`.')


def _arguments(folder: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the run in a folder, settled ones where they are known."""
    args = checkpoint.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args  # timm's own script saves a Namespace
    if not args:
        try:
            with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
                args = yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f'{folder} has no readable args.yaml: it is not the folder of a run.') from error
    return {**vars(build_parser().parse_args([])), 'card': {}, **args}


def _rebuilt_config(args: Mapping[str, Any], path: str) -> None:
    """Write config.json for a run of timm's own script, which leaves none."""
    settings = argparse.Namespace(**{**args, 'pretrained': False, 'initial_checkpoint': '', 'pretrained_path': None})
    model = create_run_model(settings, model_options(settings))
    save_config(model, path, data_config=dict(resolve_data(settings, model), crop_mode='center'),
                from_scratch=not (args['pretrained'] or args['initial_checkpoint']))


def export(
        folder: str,
        target: str,
        repo_id: str,
        *,
        revision: str | None = None,
        weights: str = 'best',
        checkpoint_path: str | None = None,
        card_only: bool = False,
) -> Model:
    """Write the model of a run as the Hub has it: model.safetensors, config.json, README.md and training_curve.png.

    Args:
        folder: The folder of the run.
        target: An empty folder.
        repo_id: 'user/name'.
        revision: Branch, for the card.
        weights: A key of WEIGHTS.
        checkpoint_path: Checkpoint to take, by default the calibrated one, else the best, else the last.
        card_only: Leave the weights out.

    Raises:
        UsageError: if the folder holds no such run.
        HubError: if timm cannot describe the model.
    """
    paths = [checkpoint_path] if checkpoint_path else [os.path.join(folder, name) for name in _BEST]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise UsageError(f'{folder} holds no checkpoint of a run: there is none of {", ".join(_BEST)}.')
    checkpoint = read_checkpoint(path)
    args = _arguments(folder, checkpoint)
    key = _weights_key(checkpoint, weights, path)
    config_path = os.path.join(target, CONFIG_NAME)
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        shutil.copyfile(os.path.join(folder, CONFIG_NAME), config_path)
    else:
        _rebuilt_config(args, config_path)
    with open(config_path, encoding='utf-8') as file:
        config = json.load(file)

    if not card_only:
        save_weights(_plain(checkpoint[key]), os.path.join(target, WEIGHTS_NAME))
    epoch = checkpoint.get('epoch')
    rows = read_summary(folder)
    has_curve = draw_curve(rows, os.path.join(target, CURVE_NAME))
    base = _base_model(args)
    options, left_out = recipe(args)
    if 'model' in left_out:
        options['model'] = config['architecture']
    evaluation = _evaluation(args, checkpoint, next((row for row in rows if row['epoch'] == epoch), {}))
    with blame('The card'):
        card = str(model_card(
            repo_id, config, revision=revision, summary=_summary(args, config, key, epoch, base), evaluation=evaluation,
            multimix=_multimix(args), recipe=options, left_out=left_out, has_curve=has_curve,
            fields={**_dataset_fields(args), **({'base_model': base} if base else {}), **(args['card'] or {})}))
    _check_public(card, folder)
    Path(target, CARD_NAME).write_text(card, encoding='utf-8')
    metric = checkpoint.get('metric')
    shown = f', {args.get("eval_metric")} {metric:.4g}' if metric is not None else ''
    return Model(config['architecture'], f'{config["architecture"]}, epoch {epoch}{shown}')


def _dataset_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    dataset = _public(args.get('dataset'), '')
    return {'datasets': [dataset_type(dataset)]} if dataset.lower().startswith(('hfds/', 'hfids/')) else {}


@contextmanager
def _work_folder(folder: str) -> Iterator[str]:
    """A folder for a model on its way, on the disk of the run, which has room for models."""
    with TemporaryDirectory(prefix=_WORK_FOLDER, dir=folder if os.access(folder, os.W_OK) else None) as path:
        yield path


def _push_command(folder: str, repository: HubRepository, weights: str) -> str:
    options = ['--revision', repository.revision] if repository.revision else []
    options += ['--private'] if repository.private else []
    options += ['--weights', weights] if weights != 'best' else []
    return shlex.join(['python', '-m', 'timm_multimix.hub', 'push', folder, repository.repo_id, *options])


class HubPush:
    """Pushes a run while it trains, from a thread that nothing waits for, and at its end.

    Made by `start`, in the first process only. What goes wrong after training began is told, and never stops it.

    Args:
        args: Arguments of the run.
        repository: Where to; logged in.
    """
    retry_waits: Sequence[float] = RETRY_WAITS

    def __init__(self, args: argparse.Namespace, repository: HubRepository):
        self.args = args
        self.repository = repository
        self.folder = ''
        self._jobs: queue.Queue[TemporaryDirectory | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name='hub', daemon=True)
        self._stopped = threading.Event()
        self._seen: tuple[int, int] | None = None  # the checkpoint that was looked at last

    @classmethod
    def start(cls, args: argparse.Namespace) -> 'HubPush | None':
        """Log in, before anything is built. Returns None unless this process is to push.

        Raises:
            UsageError: if there is no token that may write, or the name cannot be one.
        """
        if not args.push_to_hub or args.validate or world_info_from_env()[1] != 0:
            return None
        return cls(args, cls._logged_in(args, os.path.basename(args.experiment) or 'run'))

    @staticmethod
    def _logged_in(args: argparse.Namespace, name: str) -> HubRepository:
        with blame('--push-to-hub'):
            repository = HubRepository(
                args.hub_model_id or name, revision=args.hub_revision, private=args.hub_private_repo or None,
                force=args.hub_force)
            repository.log_in()
        return repository

    def begin(self, run: Run) -> None:
        """Open the repository, and start the thread; call it before training, when the folder holds config.json.

        Raises:
            UsageError: if the model cannot be pushed there.
        """
        self.folder = run.folder
        if not self.args.hub_model_id:
            self.repository = self._logged_in(self.args, os.path.basename(run.folder))
        for leftover in glob.glob(os.path.join(glob.escape(self.folder), _WORK_FOLDER + '*')):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed
        with blame('--push-to-hub'):
            # Here and not in the thread: making a model draws random numbers.
            check_rebuilds(self.folder, _plain(run.task.get_checkpoint_state()['state_dict']))
            with open(os.path.join(self.folder, CONFIG_NAME), encoding='utf-8') as file:
                self.repository.open(json.load(file)['architecture'])
        _logger.info(f'Pushing to {self.repository.api.endpoint}/{self.repository.repo_id} '
                     + {'end': 'at the end.', 'best': 'every new best.', 'every_save': 'every checkpoint.'}[
                         self.args.hub_strategy])
        disable_progress_bars()  # two bars on one terminal are none
        self._thread.start()

    def after_save(self, is_best: bool) -> None:
        """Push the last checkpoint in the background, if it is new and the strategy says so; returns at once.

        Args:
            is_best: Whether it is the best so far.
        """
        strategy = self.args.hub_strategy
        if strategy == 'end' or (strategy == 'best' and not is_best):
            return
        if self._jobs.unfinished_tasks and not self.args.hub_always_push:
            return
        last = os.path.join(self.folder, 'last.pth.tar')
        try:
            saved = os.stat(last)
            if self._seen == (saved.st_ino, saved.st_mtime_ns):
                return  # an epoch that saved nothing
            self._seen = saved.st_ino, saved.st_mtime_ns
            # Training goes on to replace its checkpoints; another name keeps this one.
            job = TemporaryDirectory(prefix=_WORK_FOLDER, dir=self.folder)
            kept = os.path.join(job.name, 'checkpoint.pth.tar')
            duplicate(last, kept)
        except OSError as error:
            _logger.warning(f'This checkpoint is not pushed: {error}')
            return
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not self._stopped.is_set():
                    self._push(os.path.join(job.name, 'checkpoint.pth.tar'), self._sleep)
            except Exception as error:  # training goes on whatever happens here
                if not self._stopped.is_set():
                    _logger.warning(f'This checkpoint is not pushed: {error}')
                    _logger.debug('', exc_info=True)
            finally:
                job.cleanup()
                self._jobs.task_done()

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise HubError('The run has ended.')

    def _push(self, checkpoint_path: str | None, sleep: Callable[[float], Any] | None = None) -> None:
        with _work_folder(self.folder) as target:
            model = export(
                self.folder, target, self.repository.repo_id, revision=self.repository.revision,
                weights=self.args.hub_weights, checkpoint_path=checkpoint_path)
            url = with_retries(lambda: self.repository.commit(target, model.message), self.retry_waits, sleep)
        _logger.info(f'Pushed {model.message}: {url}')

    def finish(self) -> None:
        """Push the result of the run, and wait for it. A failure is told, with the command that finishes it later."""
        if not self.args.hub_always_push:
            self._stopped.set()  # what waits to be pushed is older than what comes now
        self._jobs.put(None)
        try:
            self._thread.join()
            self._push(None)
        except KeyboardInterrupt:
            self._tell_how_to_finish('The upload was interrupted.')
            raise
        except Exception as error:  # of a library, or a full disk: the run is complete all the same
            _logger.debug('', exc_info=True)
            self._tell_how_to_finish(str(error))

    def abandon(self) -> None:
        """Stop pushing, without waiting: the user stopped the run."""
        self._stopped.set()
        self._jobs.put(None)

    def _tell_how_to_finish(self, why: str) -> None:
        _logger.error(
            f'{why} The run itself is complete in {self.folder}. Finish the upload with\n  '
            + _push_command(self.folder, self.repository, self.args.hub_weights))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(redact(message))


def _command_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m timm_multimix.hub',
        description='Push the model of a run to the Hugging Face Hub, or show its card. The token comes from '
                    '`hf auth login` or HF_TOKEN.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{push,card}', parser_class=_Parser)
    push = commands.add_parser('push', help='push the model of a run, or finish an upload that failed')
    card = commands.add_parser('card', help='show the card that it would have; needs no network')
    for command in (push, card):
        command.add_argument('folder', metavar='RUN_FOLDER', help='folder of the run, with its checkpoints')
        command.add_argument('repo_id', nargs='?', metavar='USER/NAME',
                             help='repository (default: --hub-model-id of the run)')
        command.add_argument('--revision', metavar='BRANCH', help='branch (default: main)')
        command.add_argument('--weights', default='best', choices=WEIGHTS,
                             help='which weights: best is what gave the metric (default: %(default)s)')
    push.add_argument('--private', action='store_true', help='make the repository private, if it is made now')
    push.add_argument('--force', action='store_true', help='push over another architecture, or the weights of others')
    card.add_argument('--output', metavar='DIR', help='write the card and its picture here instead of printing it')
    return parser


def _repo_id_of(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
            return (yaml.safe_load(file) or {}).get('hub_model_id')
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _push_folder(args: argparse.Namespace, repo_id: str) -> None:
    with blame(repo_id):
        repository = HubRepository(
            repo_id, revision=args.revision, private=args.private or None, force=args.force)
        repository.log_in()
        with _work_folder(args.folder) as target:
            model = export(args.folder, target, repository.repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(target, load_file(os.path.join(target, WEIGHTS_NAME)))
            repository.open(model.architecture)
            url = with_retries(lambda: repository.commit(target, model.message))
    _logger.info(f'Pushed {model.message}: {url}')
    _logger.info(f"Load it with timm.create_model('hf-hub:{repository.shown}', pretrained=True)")


def _show_card(args: argparse.Namespace, repo_id: str) -> None:
    with TemporaryDirectory() as target:
        with blame(args.folder):
            export(args.folder, target, repo_id, revision=args.revision, weights=args.weights, card_only=True)
        if args.output is None:
            sys.stdout.write(Path(target, CARD_NAME).read_text(encoding='utf-8'))
            return
        with blame(f'--output {args.output}'):
            os.makedirs(args.output, exist_ok=True)
            for name in (CARD_NAME, CURVE_NAME):
                if os.path.isfile(os.path.join(target, name)):
                    shutil.copy(os.path.join(target, name), args.output)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `python -m timm_multimix.hub`.

    Returns:
        Exit status: 0, 2 for something that the user can put right, 130 after Ctrl-C.
    """
    setup_logging()
    try:
        args = _command_parser().parse_args(argv)
        if not os.path.isdir(args.folder):
            raise UsageError(f'{args.folder}: no such folder.')
        repo_id = args.repo_id or _repo_id_of(args.folder)
        if args.command == 'card':
            _show_card(args, repo_id or f'user/{os.path.basename(os.path.abspath(args.folder))}')
        elif repo_id:
            _push_folder(args, repo_id)
        else:
            raise UsageError(f'Where to? Give a repository: push {args.folder} user/name')
    except UsageError as error:
        _logger.error(error)
        return 2
    except KeyboardInterrupt:
        _logger.error('Interrupted. The run is as it was; run the same command again.')
        return 130
    return 0
