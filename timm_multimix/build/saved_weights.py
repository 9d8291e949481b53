"""Named weight sets in a checkpoint (student, EMA, teacher) and their metrics.

The sets are the trained weights ('student'), their EMA with --model-ema ('ema') and the weights of an EMA teacher
('teacher'), which can be the same entry as 'ema'. --eval-weights and --hub-weights use these names. 'eval_weights' in a
checkpoint is the set that its 'metric' belongs to, 'metrics' contains the metrics of all validated sets by entry.
"""
import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import clean_state_dict

CALIBRATED = 'model_calibrated.pth.tar'
# Checkpoints of a run folder in the order of preference.
RUN_CHECKPOINTS = (CALIBRATED, 'model_best.pth.tar', 'last.pth.tar')

STUDENT, AVERAGE, TEACHER = 'student', 'ema', 'teacher'
_ENTRIES = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema', TEACHER: 'state_dict_teacher'}
WEIGHTS = tuple(_ENTRIES)
_DESCRIPTIONS = {
    STUDENT: 'the trained weights', AVERAGE: 'the average of the weights', TEACHER: "the teacher's weights"}


def arguments_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments stored in a checkpoint, an empty dict if there are none."""
    args = checkpoint.get('args') or {}
    return vars(args) if isinstance(args, argparse.Namespace) else args  # timm's train.py saves a Namespace


def split_metric(name: str) -> tuple[str | None, str]:
    """Split a metric name into weight set (None without a prefix) and metric: 'teacher_top1' into 'teacher', 'top1'."""
    weight_set, _, metric = name.partition('_')
    return (weight_set, metric) if weight_set in _ENTRIES else (None, name)


def validated_weights(args: argparse.Namespace) -> list[str]:
    """Return the weight sets that a run validates. The first one selects the best checkpoint by default."""
    is_validated = {
        AVERAGE: args.model_ema and not args.model_ema_force_cpu,
        TEACHER: args.multimix != 'off' and args.multimix_teacher == 'ema',
        STUDENT: True,
    }
    return [weight_set for weight_set, validated in is_validated.items() if validated]


def selecting_weights(args: argparse.Namespace) -> str:
    """Return the weight set that selects the best checkpoint of a run."""
    return args.eval_weights or validated_weights(args)[0]


def eval_weights_of(checkpoint: Mapping[str, Any]) -> str:
    """Return the weight set that a checkpoint's metric belongs to, without a metric the one that timm would load."""
    if checkpoint.get('eval_weights') is not None:
        return checkpoint['eval_weights']
    # Before eval_weights: the name of an entry, for calibrated weights that of the entry before calibration.
    entry = checkpoint.get('weights_of') or checkpoint.get('metric_of')
    sets = {entry: weight_set for weight_set, entry in _ENTRIES.items()}
    return sets.get(entry) or (AVERAGE if _ENTRIES[AVERAGE] in checkpoint else STUDENT)


def saved_weights(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return the entry of each weight set in a checkpoint. A calibrated checkpoint contains one set as 'state_dict'."""
    args, is_calibrated = arguments_of(checkpoint), 'temperature' in checkpoint
    names = [_ENTRIES[eval_weights_of(checkpoint)]] if is_calibrated else checkpoint
    found = {weight_set: entry for weight_set, entry in _ENTRIES.items() if entry in names}
    if STUDENT not in found and 'model' in names:
        found[STUDENT] = 'model'
    teaches = args.get('multimix', 'off') != 'off' and args.get('multimix_teacher') == 'ema'
    if teaches and TEACHER not in found and AVERAGE in found:
        found[TEACHER] = found[AVERAGE]
    return dict.fromkeys(found, 'state_dict') if is_calibrated else found


def selects_alike(checkpoint: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Return whether a run selects the best checkpoint by the weights and the metric of a checkpoint."""
    before = {'eval_metric': args.eval_metric, 'val_split': args.val_split, **arguments_of(checkpoint)}
    if not (before['val_split'] and args.val_split):
        return not (before['val_split'] or args.val_split)
    metric = split_metric(before['eval_metric'])[1]
    return (eval_weights_of(checkpoint), metric) == (selecting_weights(args), args.eval_metric)


def weights_entry(checkpoint: Mapping[str, Any], weights: str = 'best') -> str | None:
    """Return the entry of 'student', 'ema' or 'teacher' weights in a checkpoint, None if it does not contain them.

    'best' are the weights that the metric of the checkpoint belongs to.
    """
    saved = saved_weights(checkpoint)
    if weights != 'best':
        return saved.get(weights)
    return saved.get(eval_weights_of(checkpoint)) or next(iter(saved.values()))


def plain_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the plain timm model, without wrapper prefixes and the BatchNorms of --split-bn."""
    return {name: value for name, value in clean_state_dict(state_dict).items() if 'aux_bn' not in name}


def described(checkpoint: Mapping[str, Any], entry: str) -> str:
    """Return a description of the weights in an entry, for messages."""
    names = [weight_set for weight_set, saved in saved_weights(checkpoint).items() if saved == entry]
    return _DESCRIPTIONS[names[-1] if names else STUDENT]


def metrics_of(checkpoint: Mapping[str, Any], entry: str, eval_metric: str = '') -> dict[str, float]:
    """Return the finite metrics that a checkpoint stores for the weights in an entry, by timm's names.

    `eval_metric` is the name of its 'metric', for checkpoints of timm without 'metrics'.
    """
    metrics = dict((checkpoint.get('metrics') or {}).get(entry, {}))
    if 'metrics' not in checkpoint and checkpoint.get('metric') is not None and entry == weights_entry(checkpoint):
        metrics = {split_metric(eval_metric)[1]: float(checkpoint['metric'])}
    if 'temperature' in checkpoint:
        metrics.pop('loss', None)  # calibration changes the loss but not the accuracies
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
