"""Distributed training: failures, log lines, interruption and continuation with several processes."""
import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed_helpers import PATIENCE, run_script
from training_helpers import make_images, on_batch, on_update, on_validation_batch, same, spoiling

pytest_plugins = ['training_helpers']


def arguments(data, *flags, **options):
    """Command line of a tiny run: `option=value` stands for `--option value`."""
    defaults = dict(
        data_dir=data, model='test_resnet', img_size=32, batch_size=4, epochs=2, warmup_epochs=0, lr=0.01, opt='sgd',
        workers=0, experiment='run', multimix_n=20, device='cpu')
    given = [part for name, value in (defaults | options).items() for part in (f'--{name.replace("_", "-")}', value)]
    return *given, *flags


def checkpoint(folder, file='last.pth.tar', name='run'):
    return torch.load(folder / 'output' / 'train' / name / file, weights_only=True)


def summary(folder, name='run'):
    with open(folder / 'output' / 'train' / name / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def _signal_at(update, signalled, rank):
    """Send SIGTERM to the process `signalled` at an update, counted from 1."""
    on_update(lambda number, _: (
        signal.raise_signal(signal.SIGTERM) if rank == signalled and number == update else None))


def _stop_twice_at(batch, rank):
    """Send SIGTERM twice to all processes at a validation batch, counted from 1, so that they stop at once."""
    on_validation_batch(lambda number: (
        [signal.raise_signal(signal.SIGTERM) for _ in range(2)] if number == batch else None))


def _at_update(update, sick, act, rank):
    """Call `act` in the process `sick` in the middle of an update, counted from 1."""
    on_batch(lambda number, *_: act() if rank == sick and number == update else None)


def _spoil_first_losses(rank):
    """Make the inputs of the second process NaN in the first two updates."""
    if rank == 1:
        spoiling(1, 2)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _hang():
    time.sleep(1000)


def _break():
    raise ZeroDivisionError('a bug')


def test_dead_process_is_reported_by_the_others(tmp_path, image_folder):
    first, second = run_script(
        tmp_path, 2, *arguments(image_folder), prepare=partial(_at_update, 5, 1, _die))
    assert (first.status, second.status) == (1, -signal.SIGKILL)
    assert 'ERROR: [rank 0 of 2] Lost contact with the other processes in epoch 1, update 1' in first.text
    assert '--resume auto' in first.text and 'Traceback' not in first.text
    assert checkpoint(tmp_path)['epoch'] == 0


@pytest.mark.slow
def test_hanging_process_is_reported_within_the_timeout(tmp_path, image_folder):
    argv = arguments(image_folder, dist_timeout=10)
    first, second = run_script(tmp_path, 2, *argv, prepare=partial(_at_update, 2, 0, _hang), wait_for=1)
    assert (first.status, second.status) == (-signal.SIGKILL, 1)  # the first was killed by the test
    assert 'ERROR: [rank 1 of 2] No progress for' in second.text and 'in epoch 0, update 1.' in second.text
    assert 'ERROR: [rank 1 of 2] Lost contact with the other processes in epoch 0, update 1 (' in second.text
    assert 'Traceback' not in second.text


def test_place_of_a_failure_is_logged(tmp_path, image_folder):
    first, second = run_script(tmp_path, 2, *arguments(image_folder), prepare=partial(_at_update, 2, 1, _break))
    assert (first.status, second.status) == (1, 1)
    assert 'ERROR: [rank 1 of 2] Failed in epoch 0, update 1.' in second.text
    assert 'ZeroDivisionError: a bug' in second.text
    assert 'Lost contact' in first.text


def test_usage_errors_are_logged_once(tmp_path, image_folder):
    outcomes = run_script(tmp_path, 2, *arguments(image_folder, model='nonesuch'))
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert 'timm has no such model' in outcomes[0].text
    assert not outcomes[1].text


# train_timm.py in which one process is killed once.
KILLED_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training_helpers import main, on_batch
def kill(number, *_):
    if os.environ['RANK'] == '1' and number == 6 and not os.path.exists('killed'):
        open('killed', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
on_batch(kill)
sys.exit(main())
"""


def torchrun(script, *argv):
    """Command that runs a script in two processes and restarts them once if one fails."""
    return [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1',
        str(script), *map(str, argv)]


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(tmp_path, image_folder):
    """The restarted run continues from the recovery checkpoint and completes; each message is logged once."""
    script = tmp_path / 'script.py'
    script.write_text(KILLED_ONCE)
    argv = arguments(image_folder, '--resume', 'auto', '--model-ema', multimix='dense', recovery_interval=2)
    done = subprocess.run(
        torchrun(script, *argv), cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'killed').exists()
    lines = done.stderr.splitlines()
    assert sum('Lost contact with the other processes in epoch 1, update 2' in line for line in lines) == 1
    assert sum('Continuing from' in line and 'recovery-1-1' in line for line in lines) == 1
    assert sum(line.startswith('Epoch 1: validation') for line in lines) == 1
    assert sum(line.startswith('Best top1') for line in lines) == 1
    assert [row['epoch'] for row in summary(tmp_path)] == ['0', '1']


def test_one_process_with_losses_that_are_not_finite(tmp_path, image_folder):
    """All processes skip its updates, and each skipped update is logged once."""
    argv = arguments(image_folder, epochs=1, log_interval=1, multimix='dense')
    outcomes = run_script(tmp_path, 2, *argv, prepare=_spoil_first_losses)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].text + outcomes[1].text
    assert [outcome.text.count('The loss is not finite in epoch 0') for outcome in outcomes] == [2, 0]
    assert torch.isfinite(torch.tensor(float(summary(tmp_path)[0]['train_loss'])))
    outcomes = run_script(
        tmp_path, 2, *argv, '--max-nonfinite', 2, '--experiment', 'stopped', prepare=_spoil_first_losses)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert [outcome.text.count('not finite in 2 updates in a row') for outcome in outcomes] == [1, 0]


def test_continuing_with_another_number_of_processes(tmp_path, image_folder):
    """At the end of an epoch the run continues with a warning. In the middle of an epoch the epoch begins again."""
    argv = arguments(image_folder, '--model-ema', batch_size=8, epochs=1, sched='none')
    first, = run_script(tmp_path, 1, *argv)
    assert first.status == 0, first.text
    argv = arguments(image_folder, '--model-ema', '--resume', 'auto', epochs=2, sched='none')
    outcomes = run_script(tmp_path, 2, *argv)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].text + outcomes[1].text
    assert 'processes 1 before and 2 now' in outcomes[0].text
    assert 'processes' not in outcomes[1].text
    assert [row['epoch'] for row in summary(tmp_path)] == ['0', '1']
    trained = checkpoint(tmp_path)
    assert trained['optimizer']['state'] or trained['optimizer']['param_groups']
    outcomes = run_script(
        tmp_path, 2, *arguments(image_folder, '--resume', 'auto', epochs=3), prepare=partial(_signal_at, 1, 0))
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].text
    last, = run_script(tmp_path, 1, *arguments(image_folder, '--resume', 'auto', epochs=3))
    assert last.status == 0, last.text
    assert 'begins again with the current weights: processes 2 before and 1 now' in last.text


def test_validation_is_that_of_one_process(tmp_path):
    """Nine images on two processes: the sampler repeats an image to give both the same number."""
    make_images(tmp_path / 'images' / 'train', count=4)
    make_images(tmp_path / 'images' / 'validation', count=3)
    outcomes = run_script(tmp_path, 2, *arguments(tmp_path / 'images', epochs=1))
    assert outcomes[0].status == 0, outcomes[0].text
    path = tmp_path / 'output' / 'train' / 'run' / 'last.pth.tar'
    alone, = run_script(tmp_path, 1, *arguments(tmp_path / 'images', '--validate', path))
    row, = summary(tmp_path)
    assert f"loss {float(row['eval_loss']):.4g}  top1 {float(row['eval_top1']):.4g}" in alone.text, alone.text


@pytest.mark.parametrize(('signalled', 'flags', 'options'), [
    (1, ['--model-ema', '--multimix-gather'], dict(multimix='dense', aa='rand-m3')),
    (0, [], dict(multimix='dense', multimix_prob=0.5, mixup=1.0)),
    pytest.param(
        0, [], dict(multimix='dense', multimix_prob=0.5, mixup=1.0, workers=1), marks=pytest.mark.slow),
])
def test_run_interrupted_and_continued_is_the_uninterrupted_one(tmp_path, image_folder, signalled, flags, options):
    argv = arguments(image_folder, *flags, **options)
    for outcome in run_script(tmp_path, 2, *argv, '--experiment', 'whole'):
        assert outcome.status == 0, outcome.text
    outcomes = run_script(tmp_path, 2, *argv, prepare=partial(_signal_at, 4, signalled))
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].text + outcomes[1].text
    assert outcomes[0].text.count('Stopped in epoch 1.') == 1 and 'ERROR' not in outcomes[0].text
    assert 'torchrun --nproc-per-node 2' in outcomes[0].text  # command to continue
    assert not outcomes[1].text
    for outcome in run_script(tmp_path, 2, *argv, '--resume', 'auto'):
        assert outcome.status == 0, outcome.text
    whole, continued = checkpoint(tmp_path, name='whole'), checkpoint(tmp_path)
    for entry in ('args', 'saver'):
        whole.pop(entry), continued.pop(entry)
    same(whole, continued)


def test_run_killed_and_continued_with_a_joined_batch_is_the_uninterrupted_one(tmp_path, image_folder):
    argv = arguments(image_folder, '--multimix-gather', '--recovery-interval', 2, multimix='dense', aa='rand-m3')
    for outcome in run_script(tmp_path, 2, *argv, '--experiment', 'whole'):
        assert outcome.status == 0, outcome.text
    outcomes = run_script(tmp_path, 2, *argv, prepare=partial(_at_update, 6, 1, _die))
    assert [outcome.status for outcome in outcomes] == [1, -signal.SIGKILL], outcomes[0].text
    outcomes = run_script(tmp_path, 2, *argv, '--resume', 'auto')
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].text
    assert 'recovery-1-1.pth.tar' in outcomes[0].text
    whole, continued = checkpoint(tmp_path, name='whole'), checkpoint(tmp_path)
    for entry in ('args', 'saver'):
        whole.pop(entry), continued.pop(entry)
    same(whole, continued)


def test_second_signal_in_validation_keeps_the_statistics_of_each_process(tmp_path, image_folder):
    """The weights then contain averaged statistics. Each process validates two batches with each weight set."""
    argv = arguments(image_folder, '--no-ddp-bb', '--model-ema', multimix='dense', multimix_teacher='ema')
    for outcome in run_script(tmp_path, 2, *argv, '--experiment', 'whole'):
        assert outcome.status == 0, outcome.text
    outcomes = run_script(tmp_path, 2, *argv, prepare=partial(_stop_twice_at, 4))
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].text + outcomes[1].text
    assert list((tmp_path / 'output' / 'train' / 'run').glob('recovery-*')), outcomes[0].text
    for outcome in run_script(tmp_path, 2, *argv, '--resume', 'auto'):
        assert outcome.status == 0, outcome.text
    whole, continued = checkpoint(tmp_path, name='whole'), checkpoint(tmp_path)
    for entry in ('args', 'saver'):
        whole.pop(entry), continued.pop(entry)
    same(whole, continued)
