"""The command-line options of MultiMix, for any script built on argparse; in YAML they are spelled with underscores."""
import argparse
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .data.alternation import BatchSchedule
from .losses.attention import ATTENTION_NORMS, ATTENTION_QUERIES
from .losses.module import AUTO_SCALE_REMOVED, PRESETS, MultiMixLoss
from .task import PRESET_PROB, TASK_MODES, MultiMixTask
from .teacher import SelfDistillationLoss, check_teacher

_DESCRIPTION = (
    'Train on interpolations of the whole mini-batch (NeurIPS 2023). `--multimix dense` is all most runs need; keep '
    'the rest of your recipe.')

# Options of timm's scripts that a preset sets, beside those of MultiMix.
_PRESET_RECIPES = {'default': {}, 'paper': dict(mixup=1.0, smoothing=0.0)}
# Option, keyword argument of MultiMixTask. The others are not one value for one argument.
_KEYWORDS = {
    'multimix_preset': 'preset',
    'multimix_prob': 'prob',
    'multimix_n': 'num_mixes',
    'multimix_tuple_length': 'tuple_length',
    'multimix_attention': 'attention',
    'multimix_attention_norm': 'attention_norm',
    'multimix_shared_weights': 'shared_weights',
    'multimix_attention_grad': 'attention_grad',
    'multimix_pooled_weight': 'pooled_weight',
    'multimix_clean_weight': 'clean_weight',
    'multimix_logit_scale': 'logit_scale',
    'multimix_gather': 'gather',
    'multimix_start_epoch': 'start_epoch',
    'multimix_off_epoch': 'off_epoch',
    'multimix_teacher': 'teacher',
    'multimix_teacher_decay': 'teacher_decay',
    'multimix_teacher_path': 'teacher_path',
    'multimix_distill_weight': 'distill_weight',
    'multimix_distill_temperature': 'distill_temperature',
    'multimix_distill_ramp_epochs': 'distill_ramp_epochs',
    'multimix_views': 'views',
}
# Keyword arguments and their options in messages: further names, and advice for Python code.
_OPTION_OF = {
    **{keyword: '--' + option.replace('_', '-') for option, keyword in _KEYWORDS.items()},
    'alpha': '--multimix-alpha',
    'ramp_epochs': '--multimix-distill-ramp-epochs',
    'mode': '--multimix',
}
_ADVICE = (
    (r"\battach with mode='(\w+)'", r'use --multimix \1'),
    (r"`?\bglobal_pool=''`?", "--gp ''"),
    (r'\bor None for\b', 'or be left out for'),
    (r'\bor prob below\b', 'or --multimix-prob below'),
    (r'^The decay of a teacher is\b', '--multimix-teacher-decay must be'),
    (r'^An image has 1 view or 2\b', '--multimix-views must be 1 or 2'),
    (r"\btake teacher 'ema', or 1 view\b", 'take --multimix-teacher ema, or --multimix-views 1'),
    (r'^The second view is\b', '--multimix-views 2 is'),
    (r'^(.+) is for a teacher that is named, got (.+)\.$',
     r'--multimix-teacher-path \1 is for a teacher that is named: give its name to --multimix-teacher, got \2.'),
)
_OF_THE_LOSS = set(inspect.signature(MultiMixLoss).parameters) - {'attention'}  # the task's has more values


def _default(keyword: str) -> Any:
    """The default of a keyword argument, where it is defined: in MultiMixTask, else in MultiMixLoss."""
    for owner in (MultiMixTask, MultiMixLoss):
        parameter = inspect.signature(owner).parameters.get(keyword)
        if parameter is not None:
            return parameter.default
    raise KeyError(keyword)


def name_options(message: str) -> str:
    """Replace keyword arguments and advice for Python code in an error message by the options of the command line."""
    for advice, option in _ADVICE:
        message = re.sub(advice, option, message)
    for keyword, option in _OPTION_OF.items():
        message = re.sub(rf"(?<![\w-]){keyword}=('?)([\w.-]+)\1", rf'{option} \2', message)
        # a keyword that is an ordinary word stands for the argument only at the start
        name = rf'(?<![\w-]){keyword}\b' if '_' in keyword else rf'^{keyword}\b'
        message = re.sub(name, option, message)
    return message


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Let errors of MultiMixTask and MultiMixLoss name the options of the command line.

    Raises:
        ValueError: instead of a ValueError or TypeError, with the same message apart from the names.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(name_options(str(error))) from error


def _logit_scale(text: str) -> float:
    if text == 'auto':
        raise argparse.ArgumentTypeError(name_options(AUTO_SCALE_REMOVED))
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number, got {text!r}') from None


def add_multimix_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the MultiMix options to a parser, as a group of their own.

    Args:
        parser: The parser of a training script. None of its options may start with `--multimix`.

    Returns:
        The group.

    Raises:
        argparse.ArgumentError: if the parser has one of the options already.
    """
    group = parser.add_argument_group('MultiMix parameters', _DESCRIPTION)
    add = group.add_argument
    add('--multimix', default='off', choices=TASK_MODES,
        help='mix the logits at every position of the feature map (dense), the ordinary logits only (pooled: for any '
             'model, at no cost), or nothing (off). (default: off)')
    add('--multimix-preset', default=_default('preset'), choices=tuple(PRESETS),
        help='paper sets what the papers\' experiments use: --multimix-prob 0.5, --multimix-alpha 0.5 2, the literal '
             'gradient, --multimix-pooled-weight 0, --mixup 1 and --smoothing 0. Explicit options take precedence. '
             '(default: %(default)s)')
    add('--multimix-prob', type=float, default=_default('prob'), metavar='P',
        help='probability of a MultiMix batch. Below 1 its images are not mixed, and all other batches are trained as '
             'without MultiMix: with --mixup and --cutmix, if you give them. With 1 every batch is a MultiMix batch, '
             'after mixup and CutMix. (default: 1)')
    add('--multimix-n', type=int, default=_default('num_mixes'), metavar='N',
        help='mixes per mini-batch, at every position. More cost little; keep it well above the batch size. '
             '(default: %(default)s)')
    add('--multimix-alpha', type=float, nargs='+', default=_default('alpha'),
        metavar=('LO', 'HI'),
        help='Dirichlet concentration of a mix: small means nearly one image, large means all alike. Of two numbers, '
             'each mix draws its own in between; 0.5 2.0 in the papers. (default: 1 / images in a mix, for mixes that '
             'are about as varied as pairs)')
    add('--multimix-tuple-length', type=int, default=_default('tuple_length'), metavar='M',
        help='images in a mix; 2 is mixup of features. (default: the whole mini-batch)')
    add('--multimix-shared-weights', action='store_true', default=_default('shared_weights'),
        help='draw one set of mixes for all positions of the feature map, which saves time; the papers draw one for '
             'each.')
    add('--multimix-attention', default=_default('attention'), choices=ATTENTION_QUERIES,
        help='weight positions by how much they show of the object: likeness to the average of the map (gap), to the '
             'class token (token), logit of the true class (cam), or not at all (uniform). (default: %(default)s)')
    add('--multimix-attention-norm', default=_default('attention_norm'), choices=ATTENTION_NORMS,
        help='how likeness becomes a weight. (default: %(default)s)')
    add('--multimix-attention-grad', action='store_true', default=_default('attention_grad'),
        help='let gradient through the attention. No better where we tried it.')
    balance = group.add_mutually_exclusive_group()
    balance.add_argument(
        '--multimix-balance', action='store_false', dest='no_multimix_balance', default=None,
        help='use the balanced gradient (docs/method.md); the default without --multimix-preset paper. In YAML: '
             'no_multimix_balance: false.')
    balance.add_argument(
        '--no-multimix-balance', action='store_true', dest='no_multimix_balance', default=None,
        help='use the literal gradient of the papers. With their alpha on every batch it hardly trains, the '
             'balanced gradient does (see docs/method.md).')
    add('--multimix-pooled-weight', type=float, default=_default('pooled_weight'), metavar='W',
        help='share of the pooled loss beside the dense one, 0 to 1. A model that predicts from a class token trains '
             'that path through it: leave it above 0 there. (default: 0.5)')
    add('--multimix-clean-weight', type=float, default=_default('clean_weight'), metavar='W',
        help='share of the plain loss on unmixed images, 0 to 1. (default: %(default)s)')
    add('--multimix-logit-scale', type=_logit_scale, default=_default('logit_scale'), metavar='S',
        help='factor on mixed logits inside the loss. Above 1 it lowers the confidence of the trained model, below 1 '
             'it raises it. (default: %(default)s)')
    add('--multimix-gather', action='store_true', default=_default('gather'),
        help='mix the joined batch of all processes, not each its own: as one process with all the images would. '
             'Raise --multimix-n with it.')
    add('--multimix-start-epoch', type=int, default=_default('start_epoch'), metavar='N',
        help='first epoch with MultiMix, counted from 0. (default: %(default)s)')
    add('--multimix-off-epoch', type=int, default=_default('off_epoch'), metavar='N',
        help='first epoch without it again; 0 for never. (default: %(default)s)')
    _add_teacher_args(group)
    return group


def _add_teacher_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--multimix-teacher', default=_default('teacher'), metavar='{none,ema,NAME}',
        help='learn from a teacher as well as from the labels: the moving average of the model itself (ema), which is '
             'validated and saved too, or a timm model with weights for these classes (NAME). '
             '(default: %(default)s)')
    add('--multimix-teacher-decay', type=float, default=_default('teacher_decay'), metavar='D',
        help='share of the average that an update keeps; smaller at first. With that of --model-ema-decay, one average '
             'serves as both. (default: %(default)s)')
    add('--multimix-teacher-path', default=_default('teacher_path'), metavar='FILE',
        help='checkpoint with the weights of a teacher NAME. (default: its pretrained weights)')
    add('--multimix-distill-weight', type=float, default=_default('distill_weight'), metavar='W',
        help='share of what the teacher says beside the labels, 0 to 1. (default: %(default)s)')
    add('--multimix-distill-temperature', type=float, default=_default('distill_temperature'), metavar='T',
        help='divides the logits of teacher and model where they are compared. (default: %(default)s)')
    add('--multimix-distill-ramp-epochs', type=int, default=_default('distill_ramp_epochs'), metavar='N',
        help='epochs over which that share grows from 0: a new teacher knows nothing. (default: %(default)s)')
    add('--multimix-views', type=int, choices=(1, 2), default=_default('views'),
        help='2 shows the teacher another augmentation of each image, loaded once and augmented twice; 1 shows it the '
             'same, which saves that work. (default: %(default)s)')


def multimix_option_names() -> list[str]:
    """Names of the options that add_multimix_args adds, as attributes of the parsed arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    add_multimix_args(parser)
    return list(vars(parser.parse_args([])))


def multimix_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Convert parsed options to keyword arguments of MultiMixTask.

    Args:
        args: Parsed arguments of a parser with `add_multimix_args`.

    Returns:
        Keyword arguments. With `--multimix off` they make a task that trains as timm's ClassificationTask.

    Raises:
        ValueError: if a value is out of range; the message names the option.
    """
    options = dict(
        mode=args.multimix,
        alpha=tuple(args.multimix_alpha) if args.multimix_alpha else None,
        balance=None if args.no_multimix_balance is None else not args.no_multimix_balance,
        seed=getattr(args, 'seed', None) or 0,
        **{keyword: getattr(args, option) for option, keyword in _KEYWORDS.items()},
    )
    # Checked before a model is built. MultiMixTask checks the rest.
    with errors_name_options():
        batch_schedule(args)
        loss = MultiMixLoss(**{name: value for name, value in options.items() if name in _OF_THE_LOSS})
        SelfDistillationLoss(
            loss, options['distill_weight'], options['distill_temperature'], options['distill_ramp_epochs'])
        check_teacher(options['teacher'], options['teacher_decay'], options['teacher_path'], options['views'])
    return options


def preset_options(preset: str) -> dict[str, Any]:
    """The options that `--multimix-preset` sets, by their names in a namespace. Explicit options take precedence.

    Args:
        preset: 'default' or 'paper'.

    Returns:
        Values of MultiMix options, and of timm's options `mixup` and `smoothing` for 'paper'.
    """
    values = PRESETS[preset]
    return dict(
        multimix_prob=PRESET_PROB[preset],
        multimix_alpha=list(values['alpha']) if values['alpha'] else None,
        no_multimix_balance=not values['balance'],
        multimix_pooled_weight=values['pooled_weight'],
        **_PRESET_RECIPES[preset],
    )


def batch_schedule(args: argparse.Namespace) -> BatchSchedule:
    """The schedule of MultiMix batches that the parsed options describe, for a loader that mixes images.

    Raises:
        ValueError: if a value is out of range.
    """
    if args.multimix_preset not in PRESETS:
        raise ValueError(f'preset must be one of {", ".join(PRESETS)}, got {args.multimix_preset!r}.')
    prob = PRESET_PROB[args.multimix_preset] if args.multimix_prob is None else args.multimix_prob
    schedule = BatchSchedule(
        prob, getattr(args, 'seed', None) or 0, args.multimix_start_epoch, args.multimix_off_epoch)
    return schedule if args.multimix != 'off' else BatchSchedule(prob=0)


def describe_batches(args: argparse.Namespace) -> str:
    """One line that says which batches are MultiMix batches, and which have mixed images.

    Args:
        args: Parsed arguments of a parser with `add_multimix_args`, and with timm's options of mixup and CutMix if the
            script mixes images.
    """
    schedule = batch_schedule(args)
    mixup, cutmix, minmax, prob = (
        getattr(args, name, default) for name, default in
        (('mixup', 0), ('cutmix', 0), ('cutmix_minmax', None), ('mixup_prob', 1)))
    kinds = [f'mixup (alpha {mixup:g})'] if mixup else []
    if minmax:
        kinds.append(f'CutMix (ratio {minmax[0]:g} to {minmax[-1]:g})')
    elif cutmix:
        kinds.append(f'CutMix (alpha {cutmix:g})')
    mixing = ' or '.join(kinds) if prob else ''
    epochs = f' from epoch {schedule.start_epoch} on' if schedule.start_epoch else ''
    epochs += f' until epoch {schedule.off_epoch}' if schedule.off_epoch else ''
    if schedule.prob == 0:
        return 'No batch is a MultiMix batch.'
    if schedule.alternates:
        return (f'Each batch is a MultiMix batch with probability {schedule.prob:g}{epochs}; the other batches are '
                f'trained {f"with {mixing}" if mixing else "without any mixing"}.')
    return f'Every batch is a MultiMix batch{epochs}{f", after {mixing} of its images" if mixing else ""}.'
