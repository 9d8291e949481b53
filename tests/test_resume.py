"""A run that is interrupted and continued equals an uninterrupted run bit for bit, in every checkpoint entry."""
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from training_helpers import same, stopping

from timm_multimix.build.resumable import ResumableLoader
from timm_multimix.common.random_state import random_state, set_random_state

pytest_plugins = ['training_helpers']


class Noise(Dataset):
    """Samples that draw from the random generators of Python, NumPy and PyTorch."""

    def __init__(self, length: int = 22):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def _prefetched(loader, draws):
    """Load one batch ahead and draw random numbers in this process, like timm's prefetcher."""
    previous = None
    for batch in loader:
        batch = batch, draws()
        if previous is not None:
            yield previous
        previous = batch
    if previous is not None:
        yield previous


def _epoch(loader, prefetch, start=0, stop=None):
    """Return the batches of an epoch with the random numbers of a training step, and the state if stopped early."""
    def draws():
        return random.random(), torch.rand(()).item()

    seen, place = [], None
    for index, batch in enumerate(_prefetched(loader, draws) if prefetch else loader, start=start):
        seen.append((repr(batch), np.random.rand(), torch.rand(()).item()))
        loader.advance()
        if index + 1 == stop:
            place = loader.state_dict(), random_state()
            break
    return seen, place


def _loader(workers):
    return ResumableLoader(DataLoader(
        Noise(), batch_size=4, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0))


@pytest.mark.parametrize('prefetch', [False, True])
@pytest.mark.parametrize('workers,places', [
    (0, range(1, 6)), (2, [2]), pytest.param(2, [1, 5], marks=pytest.mark.slow)])
def test_loader_goes_on_in_the_middle(workers, prefetch, places):
    whole = _loader(workers)
    torch.manual_seed(1)
    _epoch(whole, prefetch)
    middle = random_state(), whole.state_dict()
    for epoch_state in (None, middle):  # stopped in the first epoch, and in the second
        for stop in places:
            if epoch_state is None:
                interrupted = _loader(workers)
                torch.manual_seed(1), random.seed(1), np.random.seed(1)
                reference = _loader(workers)
            else:
                interrupted, reference = _loader(workers), _loader(workers)
                for loader in (interrupted, reference):
                    loader.load_state_dict(middle[1], same_workers=True, in_epoch=False)
                set_random_state(epoch_state[0])
            begin = random_state()
            expected, _ = _epoch(reference, prefetch)
            expected += _epoch(reference, prefetch)[0]
            set_random_state(begin)
            seen, (place, state) = _epoch(interrupted, prefetch, stop=stop)
            continued = _loader(workers)
            random.seed(5), np.random.seed(5), torch.manual_seed(5)
            continued.load_state_dict(place, same_workers=True, in_epoch=True)
            set_random_state(state)
            seen += _epoch(continued, prefetch, start=stop)[0]
            assert continued.consumed == 5
            seen += _epoch(continued, prefetch)[0]
            assert seen == expected, (stop, epoch_state is None)


# Three updates in each of three epochs.
RUNS = {
    'plain': ([], {}, [dict(updates=1), dict(updates=6), dict(validated=3)]),
    'everything on the host': (
        ['--model-ema', '--model-ema-warmup', '--sched-on-updates'],
        dict(multimix='dense', mixup=0.2, cutmix=1.0, reprob=0.5, remode='pixel', aa='rand-m5', drop=0.1, drop_path=0.1,
             opt='adamw', warmup_epochs=1, mixup_off_epoch=2, color_jitter=0.4, smoothing=0.1),
        [dict(updates=2), dict(updates=7)]),
    'workers': (
        ['--model-ema'], dict(multimix='dense', workers=2, mixup=0.2, reprob=0.5, mixup_off_epoch=2, aa='rand-m5'),
        [dict(updates=5), dict(validated=2)]),
    'one worker without prefetcher': (
        ['--no-prefetcher'], dict(workers=1, mixup=0.2, opt='lookahead_adamw'), [dict(updates=5)]),
    'accumulation, schedule by metric': (
        ['--channels-last'],
        dict(batch_size=4, grad_accum_steps=2, sched='plateau', patience_epochs=0, warmup_epochs=1, clip_grad=0.5),
        [dict(updates=5), dict(validated=4)]),
    'MultiMix on half of the batches': (
        ['--model-ema'],
        dict(multimix='dense', multimix_prob=0.5, workers=2, mixup=1.0, cutmix=1.0, smoothing=0.1, aa='rand-m5'),
        [dict(updates=4)]),
    'MultiMix on half of the batches, on the device': (
        ['--no-prefetcher'],
        dict(multimix='dense', multimix_prob=0.5, mixup=1.0, batch_size=4, grad_accum_steps=2, multimix_views=2,
             multimix_teacher='ema', multimix_start_epoch=1, mixup_off_epoch=2),
        [dict(updates=4)]),
    'bfloat16': (['--model-ema'], dict(model_dtype='bfloat16', opt='adamw'), [dict(updates=4)]),
    'scheduled sizes': (
        ['--train-img-sizes', 32, 64, '--train-batch-sizes', 8, 4], dict(multimix='pooled'), [dict(updates=6)]),
    'augmentation splits': ([], dict(aug_splits=2, loss='jsd', aa='rand-m3', reprob=0.3), [dict(updates=4)]),
    'no validation': (['--model-ema'], dict(val_split='', model_ema_decay=0.9), [dict(updates=3), dict(updates=4)]),
    'validation now and then': ([], dict(val_interval=2, workers=1), [dict(updates=4), dict(updates=8)]),
}


SLOW_RUNS = (
    'one worker without prefetcher', 'bfloat16', 'scheduled sizes', 'no validation', 'validation now and then')


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_RUNS else name for name in RUNS])
def test_continued_run_is_the_uninterrupted_one(script, image_folder, name):
    flags, options, stops = RUNS[name]
    options = dict(epochs=3, checkpoint_hist=2) | options
    assert script.train(image_folder, *flags, **options, experiment='whole') == 0, script.text
    files = {path.name for path in script.run_folder('whole').iterdir()}
    for number, stop in enumerate(stops):
        run = f'stopped{number}'
        with stopping(**stop):
            assert script.train(image_folder, *flags, **options, experiment=run) == 143, (stop, script.text)
        assert script.train(image_folder, *flags, **options, experiment=run, resume='auto') == 0, (stop, script.text)
        assert 'uninterrupted run' not in script.text and 'begins again' not in script.text
        for file in ('last.pth.tar', 'model_best.pth.tar'):
            whole, continued = script.checkpoint(file, 'whole'), script.checkpoint(file, run)
            for entry in ('args', 'saver'):  # they contain the name of the run
                whole.pop(entry), continued.pop(entry)
            same(whole, continued, f'{stop}: ')
        summaries = [(script.run_folder(folder) / 'summary.csv').read_text() for folder in ('whole', run)]
        assert summaries[0] == summaries[1]
        left = {path.name for path in script.run_folder(run).iterdir() if not path.name.startswith('recovery')}
        assert left == files
