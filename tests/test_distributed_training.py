"""The script in several processes: what one process would do, told once, stopped and continued together."""
import csv
import signal
from functools import partial

import pytest
import torch
from distributed_helpers import run_script
from test_resume import _same

from timm_multimix.training.interrupt import StopRequest

pytest_plugins = ['training_helpers']


def arguments(data, *flags, **options):
    """A tiny run: `option=value` stands for `--option value`."""
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
    """One process is told to stop at an update."""
    requested, calls = StopRequest.requested, []

    def counted(self):
        calls.append(self)
        if rank == signalled and len(calls) == update:
            signal.raise_signal(signal.SIGTERM)
        return requested(self)

    StopRequest.requested = counted


@pytest.mark.parametrize(('signalled', 'flags', 'options'), [
    (1, ['--model-ema', '--multimix-gather'], dict(multimix='dense', aa='rand-m3')),
])
def test_run_interrupted_and_continued_is_the_uninterrupted_one(tmp_path, image_folder, signalled, flags, options):
    argv = arguments(image_folder, *flags, **options)
    for outcome in run_script(tmp_path, 2, *argv, '--experiment', 'whole'):
        assert outcome.status == 0, outcome.text
    outcomes = run_script(tmp_path, 2, *argv, prepare=partial(_signal_at, 4, signalled))
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].text + outcomes[1].text
    for outcome in run_script(tmp_path, 2, *argv, '--resume', 'auto'):
        assert outcome.status == 0, outcome.text
    whole, continued = checkpoint(tmp_path, name='whole'), checkpoint(tmp_path)
    for entry in ('args', 'saver'):
        whole.pop(entry), continued.pop(entry)
    _same(whole, continued)
