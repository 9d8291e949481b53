"""Weights, statistics and losses that are not finite: what is saved, what is skipped, and how a run ends."""
import argparse
import dataclasses
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from training_helpers import same

from timm_multimix import MultiMixOutput, MultiMixTask
from timm_multimix.common.errors import RunError
from timm_multimix.common.files import unlock_folders
from timm_multimix.training.checkpoints import RunSaver
from timm_multimix.training.config import parse_args
from timm_multimix.training.fit import fit
from timm_multimix.training.run import build_run

pytest_plugins = ['training_helpers']


def one_error(script):
    errors = [line for line in script.lines if line.startswith('ERROR')]
    assert len(errors) == 1 and 'Traceback' not in script.text, script.text
    return errors[0]


@pytest.mark.parametrize('flags, options', [
    ([], dict(lr=1e30, epochs=3)),
    ([], dict(lr=1e30, val_split='', epochs=3, multimix='dense')),
    ([], dict(lr=1e10, epochs=3, multimix='dense', opt='lookahead_adamw', val_split='', multimix_teacher='ema')),
    ([], dict(lr=1000.0, epochs=4)),
])
def test_divergence_ends_in_one_line(script, image_folder, flags, options):
    status = script.train(image_folder, *flags, **options)
    if status:
        assert status == 1 and '--clip-grad' in one_error(script)
    else:
        assert 'ERROR' not in script.text
    for path in script.run_folder().glob('*.pth.tar'):
        state = script.checkpoint(path.name)
        for name, value in state['state_dict'].items():
            assert value.isfinite().all(), (path.name, name)


def test_epoch_without_a_finite_loss_ends_the_run(script, image_folder):
    """Though fewer in a row than --max-nonfinite."""
    assert script.train(image_folder, lr=1e30, val_split='', epochs=3) == 1
    assert 'No loss of epoch 1 was finite' in one_error(script)
    assert '--resume auto' in script.lines[-1]


def test_constants_that_are_not_finite_are_saved(tmp_path):
    """Such as an attention mask; but not what normalization layers have measured."""
    model = timm.create_model('test_resnet', num_classes=3)
    model.register_buffer('mask', torch.tensor([0.0, -math.inf]))
    saver = RunSaver(SimpleNamespace(
        task=ClassificationTask(model), optimizer=torch.optim.SGD(model.parameters()), loss_scaler=None,
        args=argparse.Namespace(model='test_resnet', max_nonfinite=10, checkpoint_hist=1), folder=str(tmp_path),
        decreasing=False, class_to_idx=None))
    saver.save_checkpoint(0, 1.0)
    assert torch.load(tmp_path / 'last.pth.tar', weights_only=True)['state_dict']['mask'][1] == -math.inf
    model.bn1.running_var[0] = math.inf
    with pytest.raises(RunError, match=r'bn1\.running_var'):
        saver.save_checkpoint(1, 1.0)


def test_infinite_statistics_of_an_earlier_version_are_not_saved_again(script, image_folder):
    assert script.train(image_folder, epochs=2, stop_epoch=1) == 0
    state = script.checkpoint()
    state['state_dict']['bn1.running_var'][0] = math.inf
    path = script.folder / 'infinite.pth.tar'
    torch.save(state, path)
    assert script.train(image_folder, epochs=2, resume=path, experiment='other') == 1
    assert 'bn1.running_var' in one_error(script)
    assert not list(script.run_folder('other').glob('*.pth.tar'))


def train_scaled(data, scaler, *argv):
    """Train on the CPU with a loss scaler, which the script uses only on a GPU."""
    args = parse_args([str(part) for part in (
        '--data-dir', data, '--model', 'test_resnet', '--img-size', 32, '--batch-size', 4, '--warmup-epochs', 0,
        '--lr', 0.01, '--workers', 0, '--device', 'cpu', '--amp', '--amp-dtype', 'bfloat16', *argv)])
    try:
        state = build_run(args)
        state.setup = dataclasses.replace(state.setup, loss_scaler=scaler)
        fit(state)
    finally:
        unlock_folders()


@pytest.mark.parametrize('flags', [[], ['--clip-grad', '1.0'], ['--grad-accum-steps', '3']])
def test_loss_scaler_steps_only_with_finite_losses(script, image_folder, monkeypatch, flags):
    """An infinite loss whose gradients are finite."""
    scaler = NativeScaler(device='cpu')
    scaler._scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    flags = [*flags, '--opt', 'sgd', '--model-ema', '--epochs', 3, '--experiment', 'run']
    train_scaled(image_folder, scaler, *flags, '--stop-epoch', 1)
    before = script.checkpoint()
    assert before['amp_scaler']['scale'] == 8.0 and before['amp_scaler']['_growth_tracker'] > 0
    forward = LabelSmoothingCrossEntropy.forward
    monkeypatch.setattr(LabelSmoothingCrossEntropy, 'forward', lambda *args: forward(*args) + math.inf)
    with pytest.raises(RunError, match='2 updates in a row'):
        train_scaled(
            image_folder, scaler, *flags, '--recovery-interval', 1, '--resume', 'auto', '--val-split', '',
            '--eval-metric', 'loss', '--max-nonfinite', 2)
    recovery = script.checkpoint('recovery-1-0.pth.tar')
    for entry in ('state_dict', 'state_dict_ema', 'optimizer', 'amp_scaler'):
        if entry == 'state_dict' and '--grad-accum-steps' in flags:
            continue
        same(before[entry] if entry != 'optimizer' else before[entry]['state'],
             recovery[entry] if entry != 'optimizer' else recovery[entry]['state'], entry)


def test_loss_scaler_trains_as_without(script, image_folder):
    """With a power of two as the scale it changes no bit."""
    argv = ['--epochs', 2, '--opt', 'adamw', '--grad-accum-steps', 2, '--clip-grad', 0.5]
    train_scaled(image_folder, None, *argv, '--experiment', 'plain')
    train_scaled(image_folder, NativeScaler(device='cpu'), *argv, '--experiment', 'scaled')
    same(script.checkpoint(name='plain')['state_dict'], script.checkpoint(name='scaled')['state_dict'])


@pytest.mark.parametrize('value', [math.inf, math.nan])
def test_attention_that_overflowed_makes_the_loss_nan(value):
    task = MultiMixTask(timm.create_model('test_resnet', num_classes=3), num_mixes=10, verbose=False)
    images, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])

    def overflow(module, input, output):
        attention = output.attention.clone()
        attention[0, 0] = value
        return MultiMixOutput(output.logits, output.dense_logits, attention)
    task.trainable_module.register_forward_hook(overflow)
    task.train()
    result = task(images, target)
    assert result['loss'].isnan() and result['output'].isfinite().all()


def test_losses_that_cannot_be_computed_end_in_one_line(script, image_folder, monkeypatch):
    def broken(*_):
        raise ValueError('Soft targets must not be negative, got nan.')
    monkeypatch.setattr(LabelSmoothingCrossEntropy, 'forward', broken)
    assert script.train(image_folder) == 1
    assert 'cannot be computed in epoch 0, update 0: Soft targets' in one_error(script)
