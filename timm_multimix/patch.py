"""Run timm's train.py with MultiMix: `timm-multimix patch path/to/train.py --multimix dense ...`.

The script is loaded as a module. Its parser gets the MultiMix options, and MultiMixTask replaces its
ClassificationTask. Files of timm are not changed. Without `--multimix` the script runs unmodified.
"""
import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import timm

from .build.saved_weights import split_metric
from .common.command_line import program
from .common.errors import UsageError, usage_errors
from .data.alternation import AlternatingCollateMixup, AlternatingMixup, alternate
from .data.views import add_second_view
from .losses.module import PRESETS
from .options import (
    add_multimix_args,
    batch_schedule,
    check_multimix,
    describe_batches,
    errors_name_options,
    multimix_kwargs,
    preset_options,
)
from .task import MultiLabelMultiMixTask, MultiMixTask

_logger = logging.getLogger(__name__)

# Required top-level names of the script. timm's script has them since 1.0.29.
_REQUIRED_NAMES = ('parser', '_parse_args', 'main', 'train_one_epoch', 'create_loader', 'ClassificationTask')
_TASKS = {'ClassificationTask': MultiMixTask, 'MultiLabelClassificationTask': MultiLabelMultiMixTask}

_USAGE = """usage: {program} path/to/train.py [OPTION ...]

Run timm's train.py with MultiMix. `{program} path/to/train.py --help` lists the options of the
script and of MultiMix.

Example: {program} train.py --data-dir path/to/images --model resnet50 --multimix dense"""


def _load_script(path: str) -> ModuleType:
    """Load timm's training script as a module, without running its main function."""
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, path))
    module = importlib.util.module_from_spec(spec)
    # Appended, so that the installed timm takes precedence over a timm package next to the script.
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    sys.modules[name] = module  # for pickling its functions
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UsageError(f'{path} does not run with the installed timm {timm.__version__}: {error}') from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f'{path} cannot be loaded: {error}') from error
    missing = [name for name in _REQUIRED_NAMES if not hasattr(module, name)]
    if missing:
        raise UsageError(
            f"{path} is not the train.py of timm 1.0.29 or later: it has no {', '.join(missing)}. In your own script, "
            'use add_multimix_args and MultiMixTask.')
    return module


class _Patch:
    """MultiMix modifications of a loaded script.

    Attributes:
        task: The task that the script created.
        epoch: The current epoch.
        index: Index of the next training batch in the epoch.
        mixup: The Mixup object of the script, if images are mixed on the device.
        batch_sampler: The batch sampler that assigns batches, if the loader mixes images.
    """

    def __init__(self, module: ModuleType):
        self.module = module
        self.task: MultiMixTask | None = None
        self.epoch = self.index = 0
        self.mixup: AlternatingMixup | None = None
        self.batch_sampler: Any = None
        try:
            add_multimix_args(module.parser)
        except argparse.ArgumentError as error:
            raise UsageError(f'{module.__file__} has MultiMix options already: {error}') from error
        self._parse_args = module._parse_args
        module._parse_args = self.parse_args

    def parse_args(self) -> tuple[argparse.Namespace, str]:
        """Parse the arguments, and install MultiMix if it is enabled."""
        args, text = self._parse_args()
        if (args.multimix or 'off') != 'off' and args.multimix_preset in PRESETS:
            # Parse again with the values of the preset as defaults. Explicit options take precedence.
            known = vars(args)
            preset = preset_options(args.multimix_preset)
            self.module.parser.set_defaults(**{name: value for name, value in preset.items() if name in known})
            args, text = self._parse_args()
        args.multimix = args.multimix or 'off'  # YAML reads a bare off as false
        if args.multimix != 'off':
            check_multimix(args)
            if split_metric(args.eval_metric)[0] is not None:
                raise UsageError(
                    f"--eval-metric {args.eval_metric}: timm's script does not validate teachers. Use "
                    f'`{program("train")}`, or --model-ema with the same decay, so that the EMA model is the teacher.')
            self._install(args)
        return args, text

    def _install(self, args: argparse.Namespace) -> None:
        self.schedule = batch_schedule(args)
        _logger.info(describe_batches(args))
        for name, task_cls in _TASKS.items():
            if hasattr(self.module, name):
                setattr(self.module, name, self._bound(task_cls, args))
        self.module.train_one_epoch = self._with_epoch(self.module.train_one_epoch)
        self.module.create_loader = self._with_changes(self.module.create_loader, args)
        self.module.FastCollateMixup = AlternatingCollateMixup
        self.module.Mixup = self._make_mixup

    def _make_mixup(self, *args: Any, **kwargs: Any) -> AlternatingMixup:
        self.mixup = AlternatingMixup(*args, **kwargs)
        return self.mixup

    def _with_changes(self, create_loader: Callable, args: argparse.Namespace) -> Callable:
        """Wrap create_loader: add the second view, and assign batches if the loader mixes images."""
        def create(*positional: Any, is_training: bool = False, collate_fn: Any = None, **keywords: Any) -> Any:
            loader = create_loader(*positional, is_training=is_training, collate_fn=collate_fn, **keywords)
            if is_training and args.multimix_views == 2:
                add_second_view(loader)
            if is_training and self.schedule.alternates and isinstance(collate_fn, AlternatingCollateMixup):
                try:
                    alternate(loader, self.schedule)
                    self.batch_sampler = loader.batch_sampler
                except TypeError as error:
                    raise UsageError(f'--multimix-prob {self.schedule.prob}: {error} Add --no-prefetcher.') from error
            return loader

        return create

    def _decide(self) -> bool | None:
        """Return whether the current batch is a MultiMix batch, and set up the mixing of the next batch."""
        if not self.schedule.alternates:
            return None
        self.index += 1
        self._set_mixup()
        return self.schedule.is_multimix(self.epoch, self.index - 1)

    def _set_mixup(self) -> None:
        if self.mixup is not None:
            self.mixup.mixes_images = self.schedule.mixes_images(self.epoch, self.index)

    def _bound(self, task_cls: type[MultiMixTask], args: argparse.Namespace) -> type[MultiMixTask]:
        """Create a subclass of the task with the options of this run."""
        patch = self

        class BoundTask(task_cls):  # type: ignore[valid-type]  # the class is chosen by the script
            def __init__(self, *positional: Any, **keywords: Any):
                with usage_errors(f'--multimix {args.multimix}'), errors_name_options():
                    super().__init__(*positional, **keywords, **multimix_kwargs(args))
                patch.task = self

            def forward(self, input: Any, target: Any) -> Any:
                return super().forward(input, target, patch._decide())

        BoundTask.__name__ = BoundTask.__qualname__ = task_cls.__name__
        return BoundTask

    def _with_epoch(self, train_one_epoch: Callable) -> Callable:
        def train(epoch: int, *args: Any, **kwargs: Any) -> Any:
            if self.task is None:
                raise UsageError('--multimix does not support the task of the script, for example distillation.')
            self.task.set_epoch(epoch)
            self.epoch, self.index = epoch, 0
            self._set_mixup()
            if self.batch_sampler is not None:
                self.batch_sampler.set_epoch(epoch)
            return train_one_epoch(epoch, *args, **kwargs)

        return train


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix patch SCRIPT OPTIONS`.

    Returns:
        Exit status: 0, or 2 for a usage error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith('-'):
        is_help = argv[:1] in (['-h'], ['--help'])
        print(_USAGE.format(program=program('patch')), file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    try:
        module = _load_script(argv[0])
        _Patch(module)
        sys.argv = argv
        module.main()
    except UsageError as error:
        print(f'ERROR: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
