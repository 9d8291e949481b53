"""Files in a run folder: atomic writes, locks, loading as plain data, and selection of the checkpoint to resume."""
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from training_helpers import make_images, on_update, same, spoiling, stopping

from timm_multimix.build.checkpoint import read_checkpoint
from timm_multimix.common.errors import UsageError
from timm_multimix.common.files import duplicate, lock_folder, replacing, unlock_folders
from timm_multimix.training.checkpoints import newest_checkpoint
from timm_multimix.training.interrupt import StopRequest

pytest_plugins = ['training_helpers']

TRAIN_SCRIPT = str(Path(__file__).parent.parent / 'train_timm.py')
RUN_OF_TWO_EPOCHS = Path(__file__).parent / 'data' / 'checkpoints_0.1' / 'recovery'


def test_files_are_replaced_at_once(tmp_path):
    path = tmp_path / 'file'
    with replacing(str(path)) as temporary, open(temporary, 'w') as file:
        file.write('one')
    with pytest.raises(OSError, match='full'), replacing(str(path)) as temporary:
        with open(temporary, 'w') as file:
            file.write('two')
        assert path.read_text() == 'one'
        raise OSError('full')
    assert path.read_text() == 'one' and os.listdir(tmp_path) == ['file']
    with replacing(str(path)) as temporary, open(temporary, 'w') as file:
        file.write('two')
    assert path.read_text() == 'two' and os.listdir(tmp_path) == ['file']
    with replacing(str(path)) as temporary:
        assert not os.path.exists(temporary)
    assert path.read_text() == 'two'


@pytest.mark.parametrize('links', [True, False])
def test_names_are_replaced_at_once(tmp_path, monkeypatch, links):
    source, target = tmp_path / 'source', tmp_path / 'target'
    source.write_text('new'), target.write_text('old')
    if not links:
        monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError()))
    for _ in range(2):
        duplicate(str(source), str(target))
        assert target.read_text() == 'new' and len(os.listdir(tmp_path)) == 2
    source.write_text('newer'), os.unlink(source)
    assert target.exists()


@contextmanager
def held_by_another_process(folder):
    """Lock a folder in another process, which has a worker that outlives it. Yields the process ID."""
    folder.mkdir(parents=True, exist_ok=True)
    output, input = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            lock_folder(str(folder))
            worker = os.fork()
            if worker:
                os.write(input, str(worker).encode())
            while True:
                signal.pause()
        finally:
            os._exit(1)
    worker = int(os.read(output, 100))
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL), os.waitpid(process, 0)
        try:
            lock_folder(str(folder), patience=0.3)
        finally:
            os.kill(worker, signal.SIGKILL), unlock_folders()
            os.close(input), os.close(output)


def test_folder_is_locked_until_its_process_ends(tmp_path):
    # The context manager also checks that the lock is released when the process is killed.
    with held_by_another_process(tmp_path), pytest.raises(UsageError, match='is in use by another run'):
        lock_folder(str(tmp_path), patience=0.3)
    lock_folder(str(tmp_path)), lock_folder(f'{tmp_path}/.')
    unlock_folders()


def test_folder_of_a_process_that_is_ending_is_waited_for(tmp_path):
    with held_by_another_process(tmp_path) as process:
        threading.Timer(1.0, os.kill, [process, signal.SIGKILL]).start()
        lock_folder(str(tmp_path))
        unlock_folders()


@pytest.mark.parametrize('options', [dict(resume='auto'), dict(experiment='new')])
def test_second_run_in_a_folder_is_refused(script, image_folder, options):
    shutil.copytree(RUN_OF_TWO_EPOCHS, script.run_folder())
    with held_by_another_process(script.run_folder(options.get('experiment', 'run'))):
        (script.run_folder() / 'half.tmp').write_text('of the other')
        before = {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')}
        assert script.train(image_folder, epochs=3, **options) == 2, script.text
        assert 'in use by another run' in script.lines[-1]
        assert {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')} == before


def test_run_that_another_has_just_made_is_not_overwritten(script, image_folder):
    """The other run writes a checkpoint and ends while this run waits for the lock of its new folder."""
    with held_by_another_process(script.run_folder()) as process:
        def end():
            (script.run_folder() / 'last.pth.tar').write_text('')
            os.kill(process, signal.SIGKILL)
        threading.Timer(2.0, end).start()
        assert script.train(image_folder) == 2, script.text
    assert 'contains a run' in script.lines[-1]
    assert {path.name for path in script.run_folder().iterdir()} == {'.lock', 'last.pth.tar'}


def test_trains_where_nothing_can_be_locked(script, image_folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, 'not supported')
    monkeypatch.setattr(fcntl, 'flock', flock)
    assert script.train(image_folder) == 0
    assert script.text.count('does not support locks') == 1


def test_worker_of_a_killed_run_does_not_keep_its_folder_locked(script, image_folder):
    """The workers are stopped, so that they cannot notice the end of the run."""
    argv = ['--data-dir', image_folder, '--model', 'test_resnet', '--img-size', 32, '--batch-size', 8, '--workers', 2,
            '--epochs', 10000, '--log-interval', 1, '--experiment', 'run']
    process = subprocess.Popen(
        [sys.executable, TRAIN_SCRIPT, *map(str, argv)], cwd=script.folder, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.startswith('Train: 1'))
    workers = [int(number) for task in Path(f'/proc/{process.pid}/task').iterdir()
               for number in (task / 'children').read_text().split()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    process.kill(), process.wait()
    try:
        assert script.train(image_folder, epochs=2, stop_epoch=1, resume='auto') == 0, script.text
        assert 'Continuing from' in script.text
        assert len(workers) >= 2 and all(os.path.exists(f'/proc/{worker}') for worker in workers)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_of_equal_checkpoints_last_is_taken(tmp_path):
    for age, name in enumerate(('last', 'checkpoint-1', 'model_best')):
        state = {'state_dict': {}, 'epoch': 1, 'progress': {'in_epoch': False, 'consumed': 0}}
        torch.save(state, tmp_path / f'{name}.pth.tar')
        os.utime(tmp_path / f'{name}.pth.tar', (1 + age, 1 + age))  # copied one after another
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'last.pth.tar')


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('good') / 'last.pth.tar'
    torch.save({'state_dict': {'weight': torch.arange(1000.)}, 'epoch': 3}, path)
    return path


@pytest.mark.parametrize('damage,reason', [
    (lambda data: b'', 'it is empty'), (lambda data: data[:-1], 'not a PyTorch checkpoint|truncated'),
    (lambda data: data[:100], 'truncated'), (lambda data: b'noise' * 100, 'not a PyTorch checkpoint'),
    (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], 'differs from its checksum'),
])
def test_damaged_checkpoints_are_refused(good, tmp_path, damage, reason):
    path = tmp_path / 'last.pth.tar'
    path.write_bytes(damage(good.read_bytes()))
    with pytest.raises(UsageError, match=f'{path} is not a training checkpoint: .*({reason})'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('content,reason', [
    ({'state_dict': print}, 'objects that are not data'), ({'weight': torch.ones(1)}, 'no state_dict'),
    ([1, 2], 'no state_dict'), ({'state_dict': {}, 'x': Path('x')}, 'objects that are not data'),
])
def test_foreign_files_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / 'x.pth.tar')
    with pytest.raises(UsageError, match=reason):
        read_checkpoint(str(tmp_path / 'x.pth.tar'))


def test_auto_takes_the_furthest_that_is_good(tmp_path, good, caplog):
    assert newest_checkpoint(str(tmp_path)) is None
    for epoch, name in enumerate(('checkpoint-1', 'recovery-2-5', 'last')):
        state = {'state_dict': {}, 'epoch': 1 + (name == 'last'), 'progress': {'consumed': 5 * (epoch == 1)}}
        torch.save(state, tmp_path / f'{name}.pth.tar')
        os.utime(tmp_path / f'{name}.pth.tar', (9 - epoch, 9 - epoch))  # times in reverse order
    for name in ('last', 'recovery-2-5', 'checkpoint-1'):
        path = tmp_path / f'{name}.pth.tar'
        assert newest_checkpoint(str(tmp_path)) == str(path)
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UsageError, match='none of the 3'):
        newest_checkpoint(str(tmp_path))
    assert 'last.pth.tar is not a training checkpoint' in caplog.text


def test_a_checkpoint_names_no_files_elsewhere(script, image_folder):
    """timm removes the worst of the files that a checkpoint lists."""
    victim = script.folder / 'victim.pth.tar'
    victim.write_text('precious')
    script.train(image_folder, epochs=1, checkpoint_hist=1)
    state = script.checkpoint()
    state['saver']['checkpoint_files'] = [('../../../victim.pth.tar', 0.0), (str(victim), 0.0)]
    torch.save(state, script.run_folder() / 'last.pth.tar')
    assert script.train(image_folder, epochs=3, checkpoint_hist=1, resume='auto') == 0, script.text
    assert victim.read_text() == 'precious'


@pytest.mark.parametrize('changed,message', [
    (dict(workers=1), 'Augmentations, but not images, will differ'), (dict(batch_size=6), 'begins again'),
    (dict(grad_accum_steps=2), 'begins again')])
def test_inexact_resume_is_logged(script, image_folder, changed, message):
    with stopping(updates=5):
        script.train(image_folder, epochs=3)
    assert script.train(image_folder, epochs=3, resume='auto', **changed) == 0, script.text
    assert message in script.text and len(script.summary()) == 3
    name, value = next(iter(changed.items()))
    assert f'{name.replace("_", " ")} ' in script.text and f'and {value} now' in script.text


def test_inexact_resume_of_a_loader_is_logged(script, image_folder):
    with stopping(updates=5):
        script.train(image_folder, '--use-multi-epochs-loader', epochs=3)
    assert script.train(image_folder, '--use-multi-epochs-loader', epochs=3, resume='auto') == 0, script.text
    assert 'Epoch 1 was interrupted after' in script.text and 'begins again' in script.text


def test_the_checkpoint_that_a_run_continues_from_stays(script, image_folder):
    """Damaged checkpoints that look newer do not replace it."""
    with stopping(updates=5):
        script.train(image_folder, epochs=3)
    good = script.run_folder() / 'recovery-1-1.pth.tar'
    for name in ('recovery-1-2', 'recovery-1-3', 'last'):
        (script.run_folder() / f'{name}.pth.tar').write_bytes(b'noise')
    os.utime(good, (1, 1))
    with stopping(updates=1):
        assert script.train(image_folder, epochs=3, resume='auto') == 143, script.text
    assert 'Continuing from output/train/run/recovery-1-1.pth.tar' in script.text
    assert [path.name for path in script.run_folder().glob('recovery-*')] == ['recovery-1-2.pth.tar']
    assert script.train(image_folder, epochs=3, resume='auto') == 0, script.text


def test_lost_best_checkpoint_is_made_again(script, image_folder):
    script.train(image_folder, epochs=4, stop_epoch=2)
    best = script.checkpoint('model_best.pth.tar')
    os.unlink(script.run_folder() / 'model_best.pth.tar')
    script.train(image_folder, epochs=4, stop_epoch=2, resume='auto')
    same(best, script.checkpoint('model_best.pth.tar'))
    for name in ('model_best', f'checkpoint-{best["epoch"]}', 'last'):
        path = script.run_folder() / f'{name}.pth.tar'
        content = path.read_bytes()
        path.unlink(), path.write_bytes(content[:1000])
    assert script.train(image_folder, epochs=4, resume='auto') == 0, script.text
    intact = [path.name for path in script.run_folder().glob('checkpoint-*') if path.stat().st_size > 1000]
    metrics = [script.checkpoint(name)['metric'] for name in intact]
    assert script.checkpoint('model_best.pth.tar')['metric'] == max(metrics)


def test_resuming_with_other_data_is_reported_and_args_repeat_the_run(script, image_folder):
    assert script.train(image_folder, epochs=3, stop_epoch=1) == 0
    assert script.train(image_folder, epochs=3, stop_epoch=1, resume='auto') == 0
    assert 'other data' not in script.text
    assert '\nresume:' not in (script.run_folder() / 'args.yaml').read_text()
    assert script.train(image_folder, epochs=3, resume='auto', seed=7, sched='step') == 0
    assert 'continues with other data or another schedule: --seed was 42 and is 7' in script.text
    assert '--sched was cosine and is step' in script.text


def test_experiment_that_starts_with_a_dash_can_be_continued(script, image_folder):
    with stopping(updates=1):
        assert script.train(image_folder, '--experiment=-y') == 143
    command = script.lines[-1].split()
    assert '--experiment=-y' in command and script.train(image_folder, '--experiment=-y', resume='auto') == 0


def test_best_checkpoint_without_a_copy_is_reported(script, image_folder):
    options = dict(model='test_vit', lr=1e-30, epochs=4)  # the first epoch is the best: all have the same metric
    script.train(image_folder, stop_epoch=2, **options)
    assert script.checkpoint('model_best.pth.tar')['epoch'] == 0
    for name in ('model_best', 'checkpoint-0'):
        os.unlink(script.run_folder() / f'{name}.pth.tar')
        script.train(image_folder, stop_epoch=2, resume='auto', **options)
        lost = 'The best checkpoint, of epoch 0, is missing or damaged. Epoch 1 replaces it.' in script.text
        assert lost == (not (script.run_folder() / 'checkpoint-0.pth.tar').exists())
        os.unlink(script.run_folder() / 'model_best.pth.tar')


@pytest.mark.parametrize('flags,options', [
    (['--model-ema'], dict(momentum=0.9)), (['--model-ema'], dict(multimix='dense', opt='adamw')),
    ([], dict(clip_grad=1.0)), ([], dict(batch_size=4, grad_accum_steps=2)),
])
def test_nothing_is_left_of_a_loss_that_is_not_finite(script, image_folder, flags, options):
    accumulated = options.get('grad_accum_steps', 1)
    flags = [*flags, '--recovery-interval', 1]
    with spoiling(3 * accumulated):  # the last of three updates
        assert script.train(image_folder, *flags, val_split='', **options) == 0, script.text
    assert 'not finite in epoch 0, update 2, at learning rate 0.01' in script.text
    before, after = script.checkpoint('recovery-0-1.pth.tar'), script.checkpoint()
    for entry in ('state_dict', 'state_dict_ema', 'optimizer'):
        if entry in before and not (accumulated > 1 and entry == 'state_dict'):
            same(before[entry], after[entry], entry)
    if accumulated > 1:  # its other batch changes the BatchNorm statistics
        assert all(value.isfinite().all() for value in after['state_dict'].values())
        assert torch.equal(before['state_dict']['fc.weight'], after['state_dict']['fc.weight'])
    assert 0 < float(script.summary()[0]['train_loss']) < 5


def test_many_losses_that_are_not_finite_stop_the_run(script, image_folder):
    with spoiling(5, 100):
        assert script.train(image_folder, epochs=4, max_nonfinite=3) == 1
    assert '3 updates in a row, last in epoch 2, update 0, at learning rate' in script.text
    assert '--resume auto' in script.lines[-1] and 'Traceback' not in script.text
    last = script.checkpoint()
    assert last['epoch'] == 1 and all(value.isfinite().all() for value in last['state_dict'].values())


def test_lost_weights_are_not_saved(script, image_folder):
    def spoil(number, optimizer):
        optimizer.param_groups[0]['params'][0].data.fill_(torch.nan)

    script.train(image_folder, epochs=3, stop_epoch=1)
    before = script.checkpoint()
    with on_update(spoil):
        assert script.train(image_folder, epochs=3, resume='auto', max_nonfinite=100) == 1
    assert 'weights are not finite' in script.text
    same(before, script.checkpoint())


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted(script, tmp_path, workers):
    images = make_images(tmp_path / 'images' / 'train').parent
    for path in ('train/a/3.png', 'train/c/5.png'):
        content = (images / path).read_bytes()
        (images / path).write_bytes(content[:len(content) // 2])
    shutil.copytree(images / 'train', images / 'validation')
    with stopping(updates=5):
        assert script.train(images, epochs=3, workers=workers) == 143
    assert script.train(images, epochs=3, workers=workers, resume='auto') == 0, script.text
    assert [row['train_unreadable'] for row in script.summary()] == ['2', '2', '2']
    assert 'Epoch 2: 2 images could not be read' in script.text


def test_stop_request_is_recorded():
    with StopRequest() as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() and stop.signal_number == signal.SIGTERM
