"""Continuing with another optimizer, and with other options of it."""
import argparse

import pytest
import torch

pytest_plugins = ['training_helpers']


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory, image_folder):
    """Paths of checkpoints after one epoch, by the optimizer."""
    from timm_multimix.training import main
    output, paths = tmp_path_factory.mktemp('optimizers'), {}
    for name, flags in {'adamw': [], 'sgd': [], 'adamw, other options': ['--opt-kwargs', 'amsgrad=True']}.items():
        argv = ['--data-dir', image_folder, '--model', 'test_resnet', '--img-size', 32, '--batch-size', 8,
                '--epochs', 3, '--stop-epoch', 1, '--warmup-epochs', 0, '--lr', 0.01, '--opt', name.partition(',')[0],
                '--workers', 0, '--val-split', '', '--output', output, '--experiment', name, *flags]
        assert main([str(part) for part in argv]) == 0
        paths[name] = output / name / 'last.pth.tar'
    return paths


@pytest.mark.parametrize('before, now, flags', [
    ('adamw', 'nadamw', []), ('sgd', 'lookahead_sgd', []), ('adamw', 'adamw', ['--opt-kwargs', 'amsgrad=True']),
    ('adamw, other options', 'adamw', []),
])
def test_another_optimizer_is_refused(script, image_folder, checkpoints, before, now, flags):
    path = checkpoints[before]
    argv = dict(opt=now, val_split='', epochs=3, stop_epoch=2, resume=path)
    assert script.train(image_folder, *flags, **argv) == 2, script.text
    error = script.lines[-1]
    assert error.startswith('ERROR') and 'Traceback' not in script.text
    assert f'--opt {before.partition(",")[0]}' in error and f'--opt {now}' in error and '--no-resume-opt' in error
    assert ('amsgrad=True' in error) == ('amsgrad=True' in flags or ',' in before)
    assert script.written() == []


@pytest.mark.parametrize('before, now, flags', [
    ('adamw', 'sgd', ['--no-resume-opt']), ('adamw', 'AdamW', [])])
def test_run_continues(script, image_folder, checkpoints, before, now, flags):
    argv = dict(opt=now, val_split='', epochs=3, stop_epoch=2, resume=checkpoints[before])
    assert script.train(image_folder, *flags, **argv) == 0, script.text


def edited(path, target, **entries):
    state = torch.load(path, weights_only=True)
    state.update(entries)
    torch.save({name: value for name, value in state.items() if value is not None}, target)
    return target


def test_checkpoint_of_timm(script, image_folder, checkpoints, tmp_path):
    """With arguments in a Namespace, some of which timm had no names for."""
    args = argparse.Namespace(model='test_resnet', opt='adamw', lr=0.01)
    path = edited(checkpoints['adamw'], tmp_path / 'x.pth.tar', args=args, progress=None)
    argv = dict(val_split='', epochs=3, stop_epoch=2, resume=path)
    assert script.train(image_folder, opt='adamw', **argv) == 0, script.text
    assert 'no random state' in script.text and [row['epoch'] for row in script.summary()] == ['1']
    assert script.train(image_folder, opt='sgd', experiment='other', **argv) == 2
    assert '--opt adamw' in script.lines[-1]


def test_state_of_other_parameters(script, image_folder, checkpoints, tmp_path):
    state = torch.load(checkpoints['adamw'], weights_only=True)['optimizer']
    state['param_groups'] = state['param_groups'][:1]
    path = edited(checkpoints['adamw'], tmp_path / 'x.pth.tar', optimizer=state)
    assert script.train(image_folder, opt='adamw', val_split='', epochs=3, resume=path) == 2, script.text
    assert 'optimizer state' in script.lines[-1] and '--no-resume-opt' in script.lines[-1]


def test_options_of_a_file_and_of_the_command_line_are_the_same(script, image_folder):
    """A tuple on the command line is a list in args.yaml."""
    flags = ['--opt-kwargs', 'betas=(0.8,0.9)']
    assert script.train(image_folder, *flags, opt='adamw', val_split='', epochs=2, stop_epoch=1) == 0, script.text
    config = str(script.run_folder() / 'args.yaml')
    assert script('--config', config, '--resume', 'auto', '--stop-epoch', '2') == 0, script.text
