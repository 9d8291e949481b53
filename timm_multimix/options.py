"""MultiMix command-line options for scripts based on argparse."""
import argparse
import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.utils.distributed import world_info_from_env

from .build.model import check_model_name
from .build.option import Group, Option, option_name
from .build.option import flag as _flag
from .build.option import value as _value
from .build.parser import TrainingParser
from .common.errors import UsageError, usage_errors
from .data.alternation import BatchSchedule
from .losses.attention import ATTENTION_NORMS, ATTENTION_QUERIES
from .losses.module import PRESETS, MultiMixLoss
from .task import PRESET_PROB, TASK_MODES, MultiMixTask
from .teacher import SelfDistillationLoss, check_teacher

_logger = logging.getLogger(__name__)

_DESCRIPTION = (
    'Train on interpolations of the whole mini-batch (NeurIPS 2023). Most runs need `--multimix dense` only. Other '
    'options of the recipe can stay unchanged.')

# Values of timm options for each preset.
_PRESET_RECIPES = {'default': {}, 'paper': dict(mixup=1.0, smoothing=0.0)}
# Options that need several positions. Pooled MultiMix has one.
_DENSE_ONLY = ('multimix_attention', 'multimix_shared_weights', 'multimix_pooled_weight')
_LOSS_PARAMETERS = inspect.signature(MultiMixLoss).parameters
_PARAMETERS = {**_LOSS_PARAMETERS, **inspect.signature(MultiMixTask).parameters}


def _name_option(match: re.Match) -> str:
    keyword, _, value = match.groups()
    # Keywords without an underscore are also ordinary words.
    if value is None and '_' not in keyword and match.start() > 0:
        return match[0]
    return _OPTION_OF[keyword] + (f' {value}' if value else '')


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Context manager that replaces keyword arguments in error messages by command-line options.

    Raises:
        ValueError: Instead of a ValueError or TypeError raised in the context.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        keywords = rf"(?<![\w-])({'|'.join(_OPTION_OF)})\b(?:=('?)([\w.-]+)\2)?"
        raise ValueError(re.sub(keywords, _name_option, str(error))) from error


def _keyword(name: str) -> str:
    """Return the keyword argument of MultiMixTask that an option sets."""
    name = name.removeprefix('--').replace('-', '_').removeprefix('multimix_')
    return {'multimix': 'mode', 'n': 'num_mixes'}.get(name, name)


def _option(name: str, help: str, **settings: Any) -> Option:
    """Option of a keyword argument, with its default."""
    return _value(name, default=_PARAMETERS[_keyword(name)].default, help=help, **settings)


def _balance(name: str, action: str, help: str) -> Option:
    return Option((name,), dict(action=action, dest='no_multimix_balance', default=None, help=help))


MULTIMIX = Group('MultiMix parameters', (
    _value('--multimix', default='off', choices=TASK_MODES,
           help='dense mixes the logits at every position of the feature map. pooled mixes the ordinary logits: it '
                'works with any model and costs almost nothing. off disables MultiMix.'),
    _option('--multimix-preset', choices=tuple(PRESETS),
            help='defaults of other options. paper reproduces the settings of the papers: --multimix-prob 0.5, '
                 '--multimix-alpha 0.5 2, --no-multimix-balance, --multimix-pooled-weight 0, --mixup 1 and '
                 '--smoothing 0. Explicit options take precedence.'),
    _option('--multimix-prob', type=float, metavar='P',
            help='probability that a batch is trained with MultiMix, from 0 to 1. Below 1, --mixup and --cutmix apply '
                 'to the other batches only. With 1, they apply to all batches, before MultiMix. Use a value below 1 '
                 'to alternate MultiMix with image mixing, as in the papers. (default: 1, or 0.5 with '
                 '--multimix-preset paper)'),
    _option('--multimix-n', type=int, metavar='N',
            help='number of mixes per mini-batch and position, at least 1. Increase it with the batch size: it should '
                 'be several times larger.'),
    _option('--multimix-alpha', type=float, nargs='+', metavar=('LO', 'HI'),
            help='Dirichlet concentration of the interpolation weights, above 0. A small value gives mixes dominated '
                 'by one image, a large value gives nearly uniform weights. With two values, each mix draws its '
                 'concentration uniformly between them; the papers use 0.5 2. (default: 1 / number of images in a '
                 'mix)'),
    _option('--multimix-tuple-length', type=int, metavar='M',
            help='number of images in a mix, at least 1. Use 2 for pairs, as in mixup. (default: the whole '
                 'mini-batch)'),
    _flag('--multimix-shared-weights',
          help='use the same interpolation weights at all positions of the feature map. This is faster. By default '
               'weights are drawn for each position, as in the papers.'),
    _option('--multimix-attention', choices=ATTENTION_QUERIES,
            help='query of the attention that weights the positions in dense mode: the average-pooled features (gap), '
                 'the class token (token), the classifier weight of the true class (cam), or no attention (uniform).'),
    _option('--multimix-attention-norm', choices=ATTENTION_NORMS,
            help='normalization of the attention scores over positions: ReLU followed by l1 normalization (relu) or '
                 'softmax. softmax spreads the attention over all positions.'),
    _flag('--multimix-attention-grad',
          help='backpropagate through the attention. It gave no improvement in our experiments.'),
    _balance('--multimix-balance', 'store_false',
             help='use the balanced gradient (docs/method.md). This is the default, except with --multimix-preset '
                  'paper. In YAML: no_multimix_balance: false.'),
    _balance('--no-multimix-balance', 'store_true',
             help='use the literal gradient of the papers. With --multimix-alpha 0.5 2 on every batch the model '
                  'hardly trains (docs/method.md): combine it with --multimix-prob 0.5.'),
    _option('--multimix-pooled-weight', type=float, metavar='W',
            help='weight of the pooled loss relative to the dense loss, from 0 to 1. Keep it above 0 for a model that '
                 'predicts from a class token: the dense loss does not train the class token. (default: 0.5, or 0 '
                 'with --multimix-preset paper)'),
    _option('--multimix-clean-weight', type=float, metavar='W',
            help='weight of the plain loss on unmixed images, from 0 to 1. It did not improve accuracy in our '
                 'studies.'),
    _option('--multimix-logit-scale', type=float, metavar='S',
            help='factor on the mixed logits inside the loss, above 0. A value above 1 lowers the confidence of the '
                 'trained model, a value below 1 raises it.'),
    _flag('--multimix-gather',
          help='mix the joined batch of all processes instead of the batch of each process. Increase --multimix-n '
               'with the number of processes.'),
    _option('--multimix-start-epoch', type=int, metavar='N',
            help='first epoch with MultiMix, counted from 0.'),
    _option('--multimix-off-epoch', type=int, metavar='N',
            help='epoch from which MultiMix is disabled, counted from 0; 0 never disables it.'),
    _option('--multimix-teacher', metavar='{none,ema,NAME}',
            help='teacher for distillation: the exponential moving average of the model (ema), which is validated and '
                 'saved too, or the name of a timm model with weights for the same classes (NAME).'),
    _option('--multimix-teacher-decay', type=float, metavar='D',
            help='decay of the ema teacher, from 0 to below 1. It is reached gradually from a smaller value. If it '
                 'equals --model-ema-decay, one average is used for both.'),
    _option('--multimix-teacher-path', metavar='FILE',
            help='checkpoint with the weights of the teacher NAME. (default: its pretrained weights)'),
    _option('--multimix-distill-weight', type=float, metavar='W',
            help='weight of the distillation loss relative to the classification loss, from 0 to 1.'),
    _option('--multimix-distill-temperature', type=float, metavar='T',
            help='temperature that divides the logits of teacher and model in the distillation loss, above 0.'),
    _option('--multimix-distill-ramp-epochs', type=int, metavar='N',
            help='number of epochs over which the distillation weight increases linearly from 0. Use 0 if the teacher '
                 'is already trained.'),
    _option('--multimix-views', type=int, choices=(1, 2),
            help='number of augmented views of each image. With 2, the image is loaded once and augmented twice, for '
                 'the model and for the teacher. With 1, both use the same view.'),
), _DESCRIPTION)

_DEFAULTS = {option.dest: option.settings['default'] for option in MULTIMIX.options}
# Options that set one keyword argument of MultiMixTask, without conversion.
_KEYWORDS = {dest: _keyword(dest) for dest in _DEFAULTS if dest.startswith('multimix_')}
# Options that replace keyword arguments in error messages.
_OPTION_OF = {
    **{keyword: option_name(option) for option, keyword in _KEYWORDS.items()},
    'ramp_epochs': '--multimix-distill-ramp-epochs',
    'mode': '--multimix',
}


def add_multimix_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add an argument group with the MultiMix options to a parser.

    In a YAML configuration the options are spelled with underscores.

    Args:
        parser: The parser of a training script. None of its options may start with `--multimix`.

    Returns:
        The argument group.

    Raises:
        argparse.ArgumentError: If the parser already has one of the options.
    """
    return MULTIMIX.add_to(parser)


def build_training_parser() -> TrainingParser:
    """Build the parser of `timm-multimix train`, with timm's and the MultiMix options. Its errors are UsageErrors."""
    return TrainingParser(MULTIMIX)


def multimix_option_names() -> list[str]:
    """Return the attribute names of the MultiMix options in the parsed arguments."""
    return list(_DEFAULTS)


def multimix_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Convert parsed options to keyword arguments of MultiMixTask.

    Args:
        args: Arguments parsed by a parser with the options of `add_multimix_args`.

    Returns:
        Keyword arguments. With `--multimix off` the task trains as timm's ClassificationTask.

    Raises:
        ValueError: If a value is out of range. The message names the option.
    """
    options = {keyword: getattr(args, option) for option, keyword in _KEYWORDS.items()}
    options.update(
        mode=args.multimix,
        alpha=tuple(args.multimix_alpha) if isinstance(args.multimix_alpha, list) else args.multimix_alpha,
        balance=None if args.no_multimix_balance is None else not args.no_multimix_balance,
        seed=getattr(args, 'seed', None) or 0,
    )
    # Check before a model is created. MultiMixTask checks the other options.
    with errors_name_options():
        # The attention argument of the task accepts more values than the one of the loss.
        names = _LOSS_PARAMETERS.keys() - {'attention'}
        loss = MultiMixLoss(**{name: value for name, value in options.items() if name in names})
        SelfDistillationLoss(
            loss, options['distill_weight'], options['distill_temperature'], options['distill_ramp_epochs'])
        check_teacher(options['teacher'], options['teacher_decay'], options['teacher_path'], options['views'])
        batch_schedule(args)
    if args.multimix == 'off':
        options.update(teacher='none', teacher_path=None, views=1)
    return options


def preset_options(preset: str) -> dict[str, Any]:
    """Return the values of MultiMix options and of timm's `mixup` and `smoothing` that `--multimix-preset` sets."""
    values = PRESETS[preset]
    return dict(
        multimix_prob=PRESET_PROB[preset],
        multimix_alpha=list(values['alpha']) if values['alpha'] else None,
        no_multimix_balance=not values['balance'],
        multimix_pooled_weight=values['pooled_weight'],
        **_PRESET_RECIPES[preset],
    )


def check_multimix(args: argparse.Namespace) -> None:
    """Check that timm's options can be combined with MultiMix. Warn of MultiMix options without effect.

    Raises:
        UsageError: for the first invalid combination, with the reason.
    """
    if args.multimix == 'off':
        _warn_of_unused_options(args, '', 'add --multimix dense or --multimix pooled')
        return
    batch_size = min([args.batch_size, *(getattr(args, 'train_batch_sizes', None) or ())])
    if args.multimix_gather:
        batch_size *= world_info_from_env()[2]
    length = args.multimix_tuple_length
    naflex = getattr(args, 'naflex_loader', False)
    rules = (
        (args.torchscript, 'TorchScript cannot return the outputs that MultiMix needs: use --torchcompile.'),
        (args.kd_model_name, 'distillation uses another training task: remove one of the two options.'),
        (naflex and args.multimix_views == 2, '--naflex-loader creates one view of an image: use --multimix-views 1.'),
        (naflex and args.multimix_teacher not in ('none', 'ema'),
         f'--naflex-loader supports --multimix-teacher ema, got {args.multimix_teacher}.'),
        (args.jsd_loss or getattr(args, 'loss', None) == 'jsd',
         'the jsd loss compares views of an image, and MultiMix mixes images.'),
        (batch_size < 2, 'a batch of 1 image cannot be mixed: raise --batch-size.'),
        (length is not None and not 1 <= length <= batch_size,
         f'--multimix-tuple-length must be between 1 and the batch size {batch_size}, got {length}.'),
        (args.multimix_views == 2 and args.aug_splits, '--aug-splits already creates views: use --multimix-views 1.'),
    )
    for is_wrong, message in rules:
        if is_wrong:
            raise UsageError(f'--multimix {args.multimix}: {message}')
    with usage_errors(f'--multimix {args.multimix}'):
        multimix_kwargs(args)
    if naflex and batch_schedule(args).alternates:
        raise UsageError(
            f'--multimix {args.multimix}: the mixup of --naflex-loader cannot be disabled for single batches: use '
            '--multimix-prob 1.')
    if args.multimix == 'pooled':
        _warn_of_unused_options(args, _DENSE_ONLY, '--multimix pooled has a single position and no attention')
    if args.multimix_teacher == 'none':
        _warn_of_unused_options(args, ('multimix_teacher', 'multimix_distill'), 'add --multimix-teacher ema')
    elif args.multimix_teacher != 'ema':
        check_model_name(args.multimix_teacher, '--multimix-teacher', ('none', 'ema'))


def _warn_of_unused_options(args: argparse.Namespace, prefix: str | tuple[str, ...], reason: str) -> None:
    """Warn of MultiMix options with this prefix that differ from the default and from the preset."""
    preset = preset_options(args.multimix_preset)
    unused = [option_name(name) for name, value in _DEFAULTS.items()
              if name.startswith(prefix) and getattr(args, name) not in (value, preset.get(name, value))]
    if unused:
        _logger.warning(f'{", ".join(unused)}: without effect, {reason}.')


def batch_schedule(args: argparse.Namespace) -> BatchSchedule:
    """Create the schedule of MultiMix batches from parsed options.

    Raises:
        ValueError: If a value is out of range.
    """
    prob = PRESET_PROB[args.multimix_preset] if args.multimix_prob is None else args.multimix_prob
    schedule = BatchSchedule(
        prob, getattr(args, 'seed', None) or 0, args.multimix_start_epoch, args.multimix_off_epoch)
    return schedule if args.multimix != 'off' else BatchSchedule(prob=0)


def describe_batches(args: argparse.Namespace) -> str:
    """Describe in one line which batches are MultiMix batches and which have mixed images."""
    schedule = batch_schedule(args)
    mixup, cutmix = getattr(args, 'mixup', 0), getattr(args, 'cutmix', 0) or getattr(args, 'cutmix_minmax', None)
    kinds = [*([f'mixup (alpha {mixup:g})'] if mixup else []), *(['CutMix'] if cutmix else [])]
    mixing = ' or '.join(kinds) if getattr(args, 'mixup_prob', 1) else ''
    epochs = f' from epoch {schedule.start_epoch} on' if schedule.start_epoch else ''
    epochs += f' until epoch {schedule.off_epoch}' if schedule.off_epoch else ''
    if schedule.prob == 0:
        return 'No batch is a MultiMix batch.'
    if schedule.alternates:
        return (f'Each batch is a MultiMix batch with probability {schedule.prob:g}{epochs}; the other batches are '
                f'trained {f"with {mixing}" if mixing else "without any mixing"}.')
    return f'Every batch is a MultiMix batch{epochs}{f", after {mixing} of its images" if mixing else ""}.'
