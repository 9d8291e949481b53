"""Recipe of a model card: the options that repeat a training run, without values that can be private."""
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from timm.models import is_model

from ..options import MULTIMIX, build_training_parser, multimix_option_names

# Options for the machine, the output and uploads, which a recipe does not contain.
_LOCAL_OPTIONS = frozenset((
    'data', 'data_dir', 'class_map', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'stop_epoch',
    'validate', 'local_rank', 'device', 'device_modules', 'report_to', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'save_images', 'log_interval', 'recovery_interval', 'checkpoint_hist', 'save_epochs',
    'pretrained_path', 'push_to_hub', 'hub_model_id', 'hub_strategy', 'hub_private_repo', 'hub_revision',
    'hub_always_push', 'hub_weights', 'hub_force'))

_WORD = r'\w+(?:-\w+)*'
_NUMBERS = r'\d*\.?\d+(?:,\d*\.?\d+)*'
_ON_HUB = r'hf-hub:[\w-][\w.-]*/[\w-][\w.-]*(?:@[\w.-]+)?'
_MODEL = rf'\w+(?:\.\w+)?|{_ON_HUB}'
_SPLIT = r'\w+(?:\[[\d:%]*\])?'
# Options with text values that a card can contain, and a pattern of their public values: names in timm's registries, on
# the Hub and of datasets. The patterns match no path and no host name with a domain, except for TYPE/NAME of a dataset
# and of a model on the Hub. All other text is private, including the text of options that are added later.
_PUBLIC_TEXT = {
    **dict.fromkeys((
        'amp_dtype', 'asl_reduction', 'clip_mode', 'dist_bn', 'eval_metric', 'eval_weights', 'fuser', 'gp',
        'input_img_mode', 'input_key', 'interpolation', 'kd_distill_type', 'kd_loss_type', 'kd_token_distill_type',
        'loss', 'lr_base_scale', 'lr_decay_fn', 'mixup_mode', 'model_dtype', 'naflex_loss_scale', 'opt', 'remode',
        'sched', 'target_format', 'task', 'torchcompile', 'torchcompile_mode', 'train_crop_mode', 'train_interpolation',
        'train_size_schedule', 'variable_batch_loss_scale', 'worker_seeding',
        *(option.dest for option in MULTIMIX.options if 'choices' in option.settings)), _WORD),
    **dict.fromkeys(('model', 'kd_model_name', 'multimix_teacher'), _MODEL),
    'initial_checkpoint': _ON_HUB,
    'dataset': r'(?i:demo|torch|hfds|hfids|tfds|wds)(?:/\w[\w.-]*){1,2}(?::[\d.*]+)?',
    **dict.fromkeys(('train_split', 'val_split'), _SPLIT),
    'calibrate': rf'{_NUMBERS}|{_SPLIT}',
    'target_key': r'\w+(?:,\w+)*',
    'aa': r'\w+(?:-[a-z]+(?:\d*\.?\d+)?)*',
    'loss_pos_weight': rf'{_NUMBERS}|neg_pos',
    'loss_class_weight': rf'{_NUMBERS}|inv_freq|effective_num',
}


class Recipe(NamedTuple):
    """Options of a training run that a card contains."""
    options: Mapping[str, Any]  # that differ from their defaults, and all MultiMix options of a run with MultiMix
    left_out: tuple[str, ...] = ()  # names of options with values that can be private
    # Options of the parts before a resume that differ from `options`, by texts such as 'Before epoch 3'.
    earlier: Mapping[str, Mapping[str, Any]] = {}

    @property
    def has_multimix(self) -> bool:
        return any(part.get('multimix', 'off') != 'off' for part in (self.options, *self.earlier.values()))


def is_public(name: str, value: Any) -> bool:
    """Return whether a card can contain a value of an option: a number, a flag, or text that is known to be public."""
    if isinstance(value, Mapping):
        return all(str(key).isidentifier() and is_public('', item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_public(name, item) for item in value)
    if isinstance(value, str):
        pattern = _PUBLIC_TEXT.get(name)
        is_known = pattern is not None and (not value or re.fullmatch(pattern, value) is not None)
        return is_known and (pattern != _MODEL or ':' in value or value in ('none', 'ema') or is_model(value))
    return value is None or isinstance(value, (bool, int, float))


def public_text(args: Mapping[str, Any], name: str, otherwise: str) -> str:
    """Return the text of an option, or another text if it is empty or can be private."""
    value = args.get(name)
    return value if value and is_public(name, value) else otherwise


def _earlier(args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    parts = []
    for part in reversed(args.get('earlier') or ()):
        options = {**options, **part['options']}
        when = f'{"Until partway through" if part["in_epoch"] else "Before"} epoch {int(part["epoch"])}'
        parts.append((when, {name: value for name, value in options.items()
                             if is_public(name, value) and value != args.get(name)}))
    return dict(reversed(parts))


def recipe_of(args: Mapping[str, Any], architecture: str) -> Recipe:
    """Select the options of a run that its card contains. The architecture replaces a private value of --model."""
    defaults = vars(build_training_parser().parse_args([]))
    settings = multimix_option_names() if args.get('multimix', 'off') != 'off' else ()
    given = {name: value for name, value in args.items()
             if name in defaults and (value != defaults[name] or name in settings) and name not in _LOCAL_OPTIONS}
    options = {name: value for name, value in given.items() if is_public(name, value)}
    if 'model' in given.keys() - options.keys():
        options['model'] = architecture
    return Recipe(options, tuple(sorted(given.keys() - options.keys())), _earlier(args))
