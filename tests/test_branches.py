"""Runs that begin in a used folder, and runs that continue from an earlier checkpoint of their own."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_helpers import stopping

pytest_plugins = ['training_helpers']

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training_helpers import main, on_batch
on_batch(lambda number, *_: os.kill(os.getpid(), signal.SIGKILL) if number == 2 else None)
sys.exit(main())
"""


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_run_stopped_in_its_first_epoch_is_not_overwritten(script, image_folder):
    with stopping(updates=2):
        assert script.train(image_folder, epochs=2) == 143
    before = files(script.run_folder())
    assert {name for name in before if name.endswith('.pth.tar')} == {'recovery-0-1.pth.tar'}
    for options in (dict(), dict(seed=7)):
        assert script.train(image_folder, epochs=2, **options) == 2, script.text
        assert 'contains a run' in script.lines[-1] and '--resume auto' in script.lines[-1]
        assert files(script.run_folder()) == before
    assert script.train(image_folder, epochs=2, resume='auto') == 0, script.text
    assert 'Continuing from output/train/run/recovery-0-1.pth.tar' in script.text


@pytest.mark.parametrize('name', [
    'last', 'recovery-0-1', 'checkpoint-3', 'milestone-2', 'model_best', 'model_calibrated'])
def test_folder_with_any_checkpoint_is_refused(script, image_folder, tmp_path, name):
    script.run_folder().mkdir(parents=True)
    (script.run_folder() / f'{name}.pth.tar').write_bytes(b'noise')
    torch.save({'state_dict': {}}, tmp_path / 'other.pth.tar')
    for options in (dict(), dict(resume=tmp_path / 'other.pth.tar')):
        assert script.train(image_folder, **options) == 2
        assert 'contains a run' in script.lines[-1] and '--resume auto' in script.lines[-1]
    assert [path.name for path in script.run_folder().iterdir()] == [f'{name}.pth.tar']


def test_folder_without_a_complete_checkpoint_is_used(script, image_folder):
    script.run_folder().mkdir(parents=True)
    (script.run_folder() / 'tmp.pth.tar').write_bytes(b'half')
    (script.run_folder() / 'args.yaml').write_text('')
    assert script.train(image_folder) == 0, script.text


@pytest.fixture
def five_epochs(script, image_folder):
    """A run of five epochs, whose best is one of the last. Returns the folder of the run."""
    assert script.train(image_folder, epochs=5) == 0, script.text
    folder = script.run_folder()
    for name in ('last', 'checkpoint-4', 'model_best'):
        state = torch.load(folder / f'{name}.pth.tar', weights_only=True)
        if name == 'model_best':
            state = torch.load(folder / 'checkpoint-4.pth.tar', weights_only=True)
        state['metric'] = 200.0
        state['saver']['best_epoch'], state['saver']['best_metric'], state['saver']['pending'] = 4, 200.0, (4, 200.0)
        os.unlink(folder / f'{name}.pth.tar')
        torch.save(state, folder / f'{name}.pth.tar')
    return folder


def test_continuing_from_an_earlier_checkpoint_begins_a_branch(script, image_folder, five_epochs):
    """Neither --resume auto nor the best checkpoint comes from the old branch, and nothing is lost."""
    folder = five_epochs
    old = files(folder)
    with stopping(updates=4):  # three updates in an epoch: in epoch 3
        argv = dict(epochs=6, lr=0.02, resume=folder / 'checkpoint-1.pth.tar')
        assert script.train(image_folder, **argv) == 143, script.text
    assert 'The latest checkpoint is output/train/run/recovery-3-0.pth.tar' in script.text
    moved = folder / 'superseded-1'
    assert f'moved to output/train/run/{moved.name}' in script.text
    assert {'last.pth.tar', 'checkpoint-2.pth.tar', 'checkpoint-3.pth.tar', 'checkpoint-4.pth.tar',
            'model_best.pth.tar', 'summary.csv'} >= {path.name for path in moved.iterdir()} >= {
                'last.pth.tar', 'checkpoint-4.pth.tar', 'model_best.pth.tar', 'summary.csv'}
    assert all(path.read_bytes() == old[path.name] for path in moved.iterdir())
    assert [row['epoch'] for row in script.summary()] == ['0', '1', '2']
    assert script.train(image_folder, epochs=6, lr=0.02, resume='auto') == 0, script.text
    assert 'Continuing from output/train/run/recovery-3-0.pth.tar' in script.text
    assert [row['epoch'] for row in script.summary()] == [*'012345']
    best = script.checkpoint('model_best.pth.tar')
    rows = [float(row['eval_top1']) for row in script.summary()]
    assert best['metric'] == max(rows) and rows[best['epoch']] == max(rows)
    assert not (folder / 'superseded-2').exists()


def test_branch_that_is_killed_before_its_first_checkpoint(script, image_folder, five_epochs):
    """--resume auto then begins the branch again."""
    argv = ['--data-dir', image_folder, '--model', 'test_resnet', '--img-size', 32, '--batch-size', 8, '--epochs', 5,
            '--warmup-epochs', 0, '--lr', 0.01, '--opt', 'sgd', '--workers', 0, '--experiment', 'run',
            '--resume', five_epochs / 'checkpoint-1.pth.tar']
    done = subprocess.run(
        [sys.executable, '-c', KILLED, *map(str, argv)], cwd=script.folder,
        capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with stopping(updates=1):
        assert script.train(image_folder, epochs=5, resume='auto') == 143, script.text
    assert 'Continuing from output/train/run/checkpoint-1.pth.tar with epoch 2' in script.text


def test_earlier_start_epoch_replaces_the_checkpoint_itself(script, image_folder, five_epochs):
    """It is kept until the next one is written."""
    with stopping(updates=1):
        argv = dict(epochs=5, start_epoch=2, resume=five_epochs / 'checkpoint-4.pth.tar')
        assert script.train(image_folder, **argv) == 143, script.text
    assert not (five_epochs / 'checkpoint-4.pth.tar').exists() and not (five_epochs / 'last.pth.tar').exists()
    assert (five_epochs / 'superseded-1' / 'checkpoint-4.pth.tar').exists()
    assert script.train(image_folder, epochs=3, resume='auto') == 0, script.text
    assert 'recovery-2-0.pth.tar with epoch 2' in script.text, script.text
    assert script.checkpoint()['epoch'] == 2


def test_recovery_of_an_earlier_place_in_the_same_epoch(script, image_folder):
    """Two recovery checkpoints of one epoch: continuing from the first supersedes the second."""
    with stopping(updates=3):
        assert script.train(image_folder, '--recovery-interval', 1, epochs=2) == 143
    first, second = (script.run_folder() / f'recovery-0-{update}.pth.tar' for update in (1, 2))
    assert first.exists() and second.exists()
    with stopping(updates=1):
        assert script.train(image_folder, epochs=2, resume=first, lr=0.03) == 143, script.text
    assert (script.run_folder() / 'superseded-1' / second.name).exists()
    assert script.train(image_folder, epochs=2, resume='auto') == 0, script.text


def test_continuing_at_the_end_moves_nothing(script, image_folder):
    assert script.train(image_folder, '--calibrate', '0.5', epochs=2, lr=0.05) == 0, script.text
    before = files(script.run_folder())
    for resume in ('auto', script.run_folder() / 'checkpoint-1.pth.tar'):
        assert script.train(image_folder, '--calibrate', '0.5', epochs=2, lr=0.05, resume=resume) == 0, script.text
        assert 'moved to' not in script.text
        assert files(script.run_folder()).keys() == before.keys()


def test_folder_with_weights_only_is_not_trained_into(script, image_folder):
    """Resuming has nothing to continue from, and a new run would delete the weights."""
    folder = script.run_folder()
    folder.mkdir(parents=True)
    (folder / 'model_calibrated.pth.tar').write_bytes(b'weights')
    assert script.train(image_folder, resume='auto') == 2
    assert 'no checkpoint that a run can continue from' in script.lines[-1]
    assert (folder / 'model_calibrated.pth.tar').read_bytes() == b'weights'
