"""Distributed training: failures, log lines, interruption and continuation with several processes."""
import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from distributed_helpers import PATIENCE, run_script
from training_helpers import make_images, same

from timm_multimix import training
from timm_multimix.training.interrupt import StopRequest

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
    requested, calls = StopRequest.requested, []

    def counted(self):
        calls.append(self)
        if rank == signalled and len(calls) == update:
            signal.raise_signal(signal.SIGTERM)
        return requested(self)

    StopRequest.requested = counted


def _stop_twice_at(batch, rank):
    """Send SIGTERM twice to all processes at a validation batch, counted from 1, so that they stop at once."""
    check, calls = StopRequest.check, []

    def counted(self):
        calls.append(self)
        if len(calls) == batch:
            signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGTERM)
        return check(self)

    StopRequest.check = counted


def _at_update(update, sick, act, rank):
    """Call `act` in the process `sick` in the middle of an update, counted from 1."""
    step, calls = training.loop._train_step, []

    def counted(*args):
        calls.append(args)
        if rank == sick and len(calls) == update:
            act()
        return step(*args)

    training.loop._train_step = counted


def _spoil_first_losses(rank):
    """Make the inputs of the second process NaN in the first two updates."""
    step, calls = training.loop._train_step, []

    def spoiled(run, input, *args):
        calls.append(input)
        return step(run, input * torch.nan if rank == 1 and len(calls) <= 2 else input, *args)

    training.loop._train_step = spoiled


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _hang():
    time.sleep(1000)


def _break():
    raise ZeroDivisionError('a bug')


def test_a_process_that_dies_is_told_by_the_others(tmp_path, image_folder):
    first, second = run_script(
        tmp_path, 2, *arguments(image_folder), prepare=partial(_at_update, 5, 1, _die))
    assert (first.status, second.status) == (1, -signal.SIGKILL)
    assert 'ERROR: [rank 0 of 2] Lost contact with the other processes in epoch 1, update 1' in first.text
    assert '--resume auto' in first.text and 'Traceback' not in first.text
    assert checkpoint(tmp_path)['epoch'] == 0


@pytest.mark.slow
def test_a_process_that_hangs_is_told_within_the_timeout(tmp_path, image_folder):
    argv = arguments(image_folder, dist_timeout=10)
    first, second = run_script(tmp_path, 2, *argv, prepare=partial(_at_update, 2, 0, _hang), wait_for=1)
    assert (first.status, second.status) == (-signal.SIGKILL, 1)  # the first was killed by the test
    assert 'ERROR: [rank 1 of 2] No progress for' in second.text and 'in epoch 0, update 1.' in second.text
    assert 'ERROR: [rank 1 of 2] Lost contact with the other processes in epoch 0, update 1 (' in second.text
    assert 'Traceback' not in second.text


def test_a_process_that_fails_says_where(tmp_path, image_folder):
    first, second = run_script(tmp_path, 2, *arguments(image_folder), prepare=partial(_at_update, 2, 1, _break))
    assert (first.status, second.status) == (1, 1)
    assert 'ERROR: [rank 1 of 2] Failed in epoch 0, update 1.' in second.text
    assert 'ZeroDivisionError: a bug' in second.text
    assert 'Lost contact' in first.text


def test_mistakes_are_told_once(tmp_path, image_folder):
    outcomes = run_script(tmp_path, 2, *arguments(image_folder, model='nonesuch'))
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert 'timm has no such model' in outcomes[0].text
    assert not outcomes[1].text


# train_timm.py in which one process is killed once.
KILLED_ONCE = """
import os, signal, sys
from timm_multimix import training
step, calls = training.loop._train_step, []
def counted(*args):
    calls.append(args)
    if os.environ['RANK'] == '1' and len(calls) == 6 and not os.path.exists('killed'):
        open('killed', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
training.loop._train_step = counted
sys.exit(training.main())
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


@pytest.mark.parametrize(('batch', 'flags', 'options'), [
    (1, ['--dist-bn', 'reduce'], {}),
    (4, ['--dist-bn', 'reduce', '--model-ema'], dict(multimix='dense', multimix_teacher='ema')),
])
def test_second_signal_in_validation_keeps_the_statistics_of_each_process(
        tmp_path, image_folder, batch, flags, options):
    """The weights then contain averaged statistics. Each process validates two batches with each weight set."""
    argv = arguments(image_folder, '--no-ddp-bb', *flags, **options)
    for outcome in run_script(tmp_path, 2, *argv, '--experiment', 'whole'):
        assert outcome.status == 0, outcome.text
    outcomes = run_script(tmp_path, 2, *argv, prepare=partial(_stop_twice_at, batch))
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].text + outcomes[1].text
    assert list((tmp_path / 'output' / 'train' / 'run').glob('recovery-*')), outcomes[0].text
    for outcome in run_script(tmp_path, 2, *argv, '--resume', 'auto'):
        assert outcome.status == 0, outcome.text
    whole, continued = checkpoint(tmp_path, name='whole'), checkpoint(tmp_path)
    for entry in ('args', 'saver'):
        whole.pop(entry), continued.pop(entry)
    same(whole, continued)
