"""The MultiMix options: what they parse to, and that defaults are defined once."""
import argparse
import inspect

import pytest
import timm
import yaml

from timm_multimix.losses.module import MultiMixLoss
from timm_multimix.losses.weights import alpha_range
from timm_multimix.options import MULTIMIX, add_multimix_args, multimix_kwargs
from timm_multimix.task import MultiMixTask

OPTIONS = {
    '--multimix', '--multimix-n', '--multimix-alpha', '--multimix-tuple-length', '--multimix-attention',
    '--multimix-attention-norm', '--multimix-attention-grad', '--no-multimix-balance', '--multimix-pooled-weight',
    '--multimix-clean-weight', '--multimix-logit-scale', '--multimix-start-epoch', '--multimix-off-epoch',
    '--multimix-gather', '--multimix-teacher', '--multimix-teacher-decay', '--multimix-teacher-path',
    '--multimix-distill-weight', '--multimix-distill-temperature', '--multimix-distill-ramp-epochs', '--multimix-views',
    '--multimix-shared-weights', '--multimix-preset', '--multimix-prob', '--multimix-balance',
}


def _parser():
    parser = argparse.ArgumentParser()
    add_multimix_args(parser)
    return parser


def _kwargs(*argv):
    return multimix_kwargs(_parser().parse_args(argv))


def test_all_options_are_there_and_explained():
    assert {name for option in MULTIMIX.options for name in option.names} == OPTIONS
    assert all(len(option.settings['help']) > 30 for option in MULTIMIX.options)
    assert all(name in _parser().format_help() for name in OPTIONS)


def test_defaults_are_those_of_the_classes():
    """No default is written twice: parsing nothing gives what the classes do by themselves."""
    kwargs = _kwargs()
    assert kwargs.pop('mode') == 'off'
    defaults = {}
    for owner in (MultiMixLoss, MultiMixTask):
        defaults.update((name, p.default) for name, p in inspect.signature(owner).parameters.items())
    assert kwargs == {name: defaults[name] for name in kwargs}


def test_every_option_reaches_its_argument():
    kwargs = _kwargs(
        '--multimix', 'dense', '--multimix-n', '7', '--multimix-alpha', '0.1', '3', '--multimix-tuple-length', '2',
        '--multimix-attention', 'cam', '--multimix-attention-norm', 'softmax', '--multimix-attention-grad',
        '--no-multimix-balance', '--multimix-pooled-weight', '0.25', '--multimix-clean-weight', '0.125',
        '--multimix-logit-scale', '2', '--multimix-start-epoch', '4', '--multimix-off-epoch', '9', '--multimix-gather',
        '--multimix-teacher', 'ema', '--multimix-teacher-decay', '0.9', '--multimix-distill-weight', '0.75',
        '--multimix-distill-temperature', '3', '--multimix-distill-ramp-epochs', '6', '--multimix-views', '2',
        '--multimix-shared-weights', '--multimix-preset', 'paper', '--multimix-prob', '0.25')
    assert kwargs == dict(
        mode='dense', num_mixes=7, alpha=(0.1, 3.0), tuple_length=2, attention='cam', attention_norm='softmax',
        attention_grad=True, balance=False, pooled_weight=0.25, clean_weight=0.125, logit_scale=2.0, start_epoch=4,
        off_epoch=9, gather=True, teacher='ema', teacher_decay=0.9, teacher_path=None, distill_weight=0.75,
        distill_temperature=3.0, distill_ramp_epochs=6, views=2, shared_weights=True, preset='paper', prob=0.25,
        seed=0)
    task = MultiMixTask(timm.create_model('test_resnet', num_classes=3), verbose=False, **kwargs)
    assert (task.mode, task.schedule.start_epoch, task.schedule.off_epoch) == ('dense', 4, 9)
    for name in ('num_mixes', 'alpha', 'tuple_length', 'attention', 'attention_norm', 'attention_grad', 'balance',
                 'pooled_weight', 'clean_weight', 'logit_scale', 'gather', 'shared_weights'):
        assert getattr(task.loss, name) == kwargs[name], name
    distillation = task.distillation
    assert (distillation.distill_weight, distillation.distill_temperature, distillation.ramp_epochs) == (0.75, 3.0, 6)
    assert (task.teacher.average.decay, task.views) == (0.9, 2)


@pytest.mark.parametrize('alpha', [['1'], ['0.5', '2']])
def test_alpha_is_one_number_or_two(alpha):
    kwargs = _kwargs('--multimix', 'pooled', '--multimix-alpha', *alpha)
    task = MultiMixTask(timm.create_model('test_resnet', num_classes=3), verbose=False, **kwargs)
    assert alpha_range(task.loss.alpha, 9) == (float(alpha[0]), float(alpha[-1]))


def test_off_trains_as_the_plain_task_whatever_the_other_options_are():
    kwargs = _kwargs('--multimix-teacher', 'ema', '--multimix-views', '2')
    assert MultiMixTask(timm.create_model('test_resnet', num_classes=3), verbose=False, **kwargs).teacher is None
    parser = _parser()
    parser.set_defaults(multimix_alpha=1.0)  # as from a configuration of the script
    assert multimix_kwargs(parser.parse_args(['--multimix', 'pooled']))['alpha'] == 1.0


@pytest.mark.parametrize('argv', [
    ['--multimix', 'sparse'], ['--multimix-attention', 'all'], ['--multimix-n', '1.5'],
    ['--multimix-attention-norm', 'l2'],
])
def test_wrong_values_are_refused(argv):
    with pytest.raises(SystemExit):
        _parser().parse_args(argv)


def test_the_logit_scale_is_a_number(capsys):
    with pytest.raises(SystemExit, match='2'):
        _parser().parse_args(['--multimix-logit-scale', 'auto'])
    assert "argument --multimix-logit-scale: invalid float value: 'auto'" in capsys.readouterr().err
    values = dict(vars(_parser().parse_args([])), multimix_logit_scale='auto')  # from the configuration of a script
    with pytest.raises(ValueError, match="--multimix-logit-scale must be a positive number, got 'auto'"):
        multimix_kwargs(argparse.Namespace(**values))


@pytest.mark.parametrize('argv', [
    ['--multimix-n', '0'],
    ['--multimix-n', '-3'],
    ['--multimix-alpha', '0'],
    ['--multimix-alpha', '2', '1'],
    ['--multimix-alpha', '1', '2', '3'],
    ['--multimix-tuple-length', '0'],
    ['--multimix-pooled-weight', '1.5'],
    ['--multimix-clean-weight', '-1'],
    ['--multimix-logit-scale', '0'],
    ['--multimix-logit-scale', 'inf'],
    ['--multimix-prob', '1.5'],
    ['--multimix-start-epoch', '-1'],
    ['--multimix-off-epoch', '-1'],
    ['--multimix-start-epoch', '3', '--multimix-off-epoch', '3'],
    ['--multimix-distill-weight', '2'],
    ['--multimix-distill-temperature', '0'],
    ['--multimix-distill-ramp-epochs', '-1'],
    ['--multimix-teacher-decay', '1'],
    ['--multimix-views', '2'],
    ['--multimix-teacher-path', 'x.pth', '--multimix-teacher', 'ema'],
])
def test_values_out_of_range_name_their_option(argv):
    """Before a model is built, and without the keyword arguments of Python."""
    with pytest.raises(ValueError) as error:
        _kwargs('--multimix', 'dense', *argv)
    message = str(error.value)
    assert argv[0] in message and argv[1] in message, message
    words = set(inspect.signature(MultiMixLoss).parameters) | set(inspect.signature(MultiMixTask).parameters)
    assert not [word for word in words if '_' in word and word in message] and 'None' not in message, message



def test_options_that_a_parser_has_already_clash():
    with pytest.raises(argparse.ArgumentError):
        add_multimix_args(_parser())


def test_round_trip_through_yaml():
    args = _parser().parse_args(['--multimix', 'dense', '--multimix-alpha', '1'])
    again = argparse.Namespace(**yaml.safe_load(yaml.safe_dump(vars(args))))
    assert multimix_kwargs(again) == multimix_kwargs(args)
