"""End-to-end tests of the training script on tiny images: options, log lines and files."""
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import distillation
from timm.utils import random_seed

from timm_multimix.training.interrupt import StopRequest

pytest_plugins = ['training_helpers']

SCRIPT = Path(__file__).parent.parent / 'train_timm.py'


@pytest.mark.parametrize('mode', ['off', 'pooled', 'dense'])
def test_trains_and_writes_what_timm_writes(script, image_folder, mode):
    assert script.train(image_folder, multimix=mode, epochs=3, seed=1) == 0, script.text
    folder = script.run_folder()
    assert {path.name for path in folder.iterdir()} == {
        '.lock', 'args.yaml', 'config.json', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar',
        *(f'checkpoint-{epoch}.pth.tar' for epoch in range(3))}
    rows = script.summary()
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    parts = {'off': [], 'pooled': ['train_pooled'], 'dense': ['train_dense', 'train_pooled']}[mode]
    columns = ['train_loss', *parts, 'train_top1', 'train_unreadable', 'eval_loss', 'eval_top1', 'eval_top5']
    assert list(rows[0]) == ['epoch', *columns, 'lr']
    assert all(float(row[name]) >= 0 for row in rows for name in ('train_top1', *parts))
    assert float(rows[-1]['train_top1']) > 60
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['multimix'] == mode and args['experiment'] == 'run'
    checkpoint = script.checkpoint()
    assert {'epoch', 'arch', 'optimizer', 'state_dict', 'metric', 'version', 'args'} <= set(checkpoint)
    timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'last.pth.tar'))


def test_command_of_the_best_checkpoint_validates_it(script, image_folder):
    script.train(image_folder, multimix='dense', epochs=2)
    best = max(float(row['eval_top1']) for row in script.summary())
    assert f'Best top1: {best:.4g}' in script.text
    arguments = script.lines[-1].partition(' train ')[2].split()
    assert arguments[-2] == '--validate' and Path(arguments[-1]).is_file()
    before = script.written()
    assert script(*arguments) == 0, script.text
    assert f'top1 {best:.4g}' in script.lines[-1]
    assert script.written() == before


def test_log_lines(script, image_folder):
    script.train(image_folder, multimix='dense', log_interval=1)
    lines = [line for line in script.lines if line.startswith('Train: 0 [')]
    assert len(lines) == 3
    for word in ('Loss:', 'dense:', 'pooled:', 'Acc@1:', '/s', 'LR: 1.000e-02'):
        assert word in lines[0]
    if not torch.cuda.is_available():
        assert 'No CUDA device: training on the CPU.' in script.lines
        # The recipe of the run does not choose the CPU of this machine.
        assert yaml.safe_load((script.run_folder() / 'args.yaml').read_text())['device'] == 'cuda'
        assert script('--config', script.run_folder() / 'args.yaml', '--dry-run', '--experiment', 'again') == 0


def test_embedded_digits_without_any_data(script):
    assert script(
        '--model', 'test_resnet', '--multimix', 'dense', '--img-size', '32', '--epochs', '1', '--experiment', 'run',
        '-b', '128', '--multimix-n', '50') == 0
    assert script.lines[0].startswith('No --data-dir and no --dataset: training on demo/digits')
    assert ' epochs' not in script.lines[0] and 'lr=0.001' in script.lines[0]
    assert script.checkpoint()['state_dict']['fc.weight'].shape[0] == 10


def test_resume_in_place_continues_the_run(script, image_folder):
    """A run that is stopped after two epochs and continued has one summary and one checkpoint history."""
    options = dict(multimix='dense', epochs=4, resume='auto', checkpoint_hist=2, opt='adamw', lr=1e-3)
    script.train(image_folder, **options, stop_epoch=2)
    assert len(script.summary()) == 2 and script.checkpoint()['epoch'] == 1
    script.train(image_folder, **options)
    assert 'with epoch 2.' in script.text
    rows = script.summary()
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3'] and script.checkpoint()['epoch'] == 3
    assert len(list(script.run_folder().glob('checkpoint-*'))) == 2
    best = max(range(4), key=lambda epoch: (float(rows[epoch]['eval_top1']), -epoch))
    assert script.checkpoint('model_best.pth.tar')['epoch'] == best
    script.train(image_folder, **options)  # nothing is left to do
    assert len(script.summary()) == 4


def test_runs_of_the_same_second_have_folders_of_their_own(script, image_folder):
    """The folder of another run exists for each of the next seconds."""
    for seconds in range(300):
        name = (datetime.now() + timedelta(seconds=seconds)).strftime('%Y%m%d-%H%M%S-test_resnet-32')
        script.run_folder(name).mkdir(parents=True)
    assert script.train(image_folder, experiment='') == 0, script.text
    [path] = script.folder.rglob('summary.csv')
    assert path.parent.name.endswith('-test_resnet-32-1') and path.parent.name in script.lines[-1]


def test_complete_run_is_reported(script, image_folder):
    assert script.train(image_folder, '--model-ema', epochs=2) == 0
    assert script.train(image_folder, '--model-ema', epochs=2, resume='auto') == 0
    assert 'run is complete: 2 of 2 epochs. To train longer, increase --epochs' in script.text
    assert 'Continuing from output/train/run/last.pth.tar' in script.text
    assert 'Epochs' not in script.text and 'Loaded' not in script.text
    assert script.train(image_folder, '--model-ema', epochs=3, stop_epoch=2, resume='auto') == 0
    assert 'To train longer, increase --stop-epoch' in script.text


def test_resuming_with_another_objective_is_logged(script, image_folder):
    options = dict(multimix='dense', multimix_n=20, epochs=2)
    assert script.train(image_folder, '--multimix-alpha', '0.5', '2', stop_epoch=1, **options) == 0
    assert script.train(image_folder, resume='auto', **options | dict(multimix_n=30)) == 0
    assert '--multimix-n was 20 and is 30, --multimix-alpha was [0.5, 2.0] and is None' in script.text
    assert script.train(image_folder, resume='auto', **options | dict(multimix_n=30, epochs=3)) == 0
    assert 'another objective' not in script.text


def test_ignored_optimizer_options_are_logged(script, image_folder):
    assert script.train(image_folder, lr=0.1, epochs=4, stop_epoch=1) == 0
    assert script.train(image_folder, lr=0.2, epochs=4, stop_epoch=2, resume='auto') == 0
    assert 'the options in the checkpoint: --lr was 0.1 and is 0.2. To use the new' in script.text
    assert float(script.summary()[1]['lr']) < 0.1
    recorded = yaml.safe_load((script.run_folder() / 'args.yaml').read_text())
    assert script.checkpoint()['args']['lr'] == recorded['lr'] == 0.1  # the value in use
    assert script.train(image_folder, '--no-resume-opt', lr=0.3, epochs=4, stop_epoch=3, resume='auto') == 0
    assert 'the options in the checkpoint' not in script.text
    assert float(script.summary()[2]['lr']) > 0.1


def test_a_run_without_its_checkpoints_begins_again(script, image_folder):
    assert script.train(image_folder, resume='auto') == 0
    assert 'begins again' not in script.text
    for path in script.run_folder().glob('*.pth.tar'):
        path.unlink()
    assert script.train(image_folder, resume='auto') == 0
    assert 'No checkpoint in output/train/run: the run begins again.' in script.text and '.tmp' not in script.text
    assert len(script.summary()) == 1


def test_resume_from_a_file_into_a_new_folder(script, image_folder):
    script.train(image_folder, '--model-ema', epochs=1, experiment='first')
    script.train(image_folder, '--model-ema', epochs=2, resume=script.run_folder('first') / 'last.pth.tar')
    assert [row['epoch'] for row in script.summary()] == ['1']
    assert 'state_dict_ema' in script.checkpoint()


def test_milestones_and_validation_interval(script, image_folder):
    script.train(image_folder, epochs=5, val_interval=4, save_epochs=2)
    assert [row['epoch'] for row in script.summary()] == ['1', '3', '4']
    assert script.checkpoint('milestone-2.pth.tar')['epoch'] == 1


def test_multimix_epochs(script, image_folder):
    """The summary keeps its columns when MultiMix is switched on and off."""
    script.train(image_folder, multimix='dense', epochs=3, multimix_start_epoch=1, multimix_off_epoch=2)
    rows = script.summary()
    assert [bool(row['train_dense']) for row in rows] == [False, True, False]
    assert all(float(row['lr']) > 0 for row in rows)


def test_no_accuracy_on_soft_targets(script, image_folder):
    script.train(image_folder, multimix='dense', mixup=0.2)
    assert 'train_top1' not in script.summary()[0] and 'Acc@1' not in script.text


@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize(
    ('number', 'whole_group'), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_interrupted_process_ends_cleanly(tmp_path, image_folder, number, whole_group):
    """The workers may also get the signal, as from a terminal or a scheduler."""
    command = [
        sys.executable, str(SCRIPT), '--data-dir', str(image_folder), '--model', 'test_resnet', '--img-size', '32',
        '-b', '8', '--epochs', '100000', '-j', '1', '--experiment', 'run', '--log-interval', '1']
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stderr:
        if line.startswith('Train: 1'):
            break
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    rest = process.communicate(timeout=600)[1]
    assert process.returncode == 128 + number and 'Traceback' not in rest, rest
    assert '--resume auto' in rest.splitlines()[-1] and rest.count('Stopping after this step') == 1
    assert list((tmp_path / 'output' / 'train' / 'run').glob('recovery-*'))


COMPOSITIONS = {
    'mixup': dict(mixup=0.2, cutmix=1.0),
    'mixup on the device': ('--no-prefetcher', dict(mixup=0.2)),
    'no prefetcher': ('--no-prefetcher', {}),
    'smoothing': dict(smoothing=0.2),
    'bce': dict(loss='bce'),
    'bce with mixup, thresholds and sums': ('--bce-loss', '--bce-sum', dict(mixup=0.2, bce_target_thresh=0.2)),
    'ema': ('--model-ema', '--model-ema-warmup', {}),
    'amp': ('--amp', '--channels-last', dict(amp_dtype='bfloat16')),
    'bfloat16 model': dict(model_dtype='bfloat16', opt='adamw'),
    'accumulation and clipping': dict(grad_accum_steps=2, clip_grad=1.0),
    'agc': dict(clip_grad=0.1, clip_mode='agc'),
    'updates': ('--sched-on-updates', dict(sched='wsd', epochs=2)),
    'scheduled sizes': (
        '--train-img-sizes', 32, 64, '--train-batch-sizes', 8, 4, dict(variable_batch_loss_scale='linear')),
    'augmentation splits': ('--split-bn', dict(aug_splits=2, aa='rand-m3')),
    'clean loss': dict(multimix_clean_weight=0.5),
    'class attention': dict(multimix_attention='cam'),
    'literal gradient': ('--no-multimix-balance', dict(multimix_tuple_length=2)),
    'compiled': dict(torchcompile='eager'),
    'convnext': dict(model='test_convnext'),
    'vit': dict(model='test_vit', layer_decay=0.75, opt='adamw', drop_path=0.1),
    'layer decay with lookahead': dict(opt='lookahead_adamw', lr=1e-3),
    'checkpointing': ('--grad-checkpointing', {}),
}


@pytest.mark.parametrize('options', COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_composes_with(script, image_folder, options):
    *flags, options = options if isinstance(options, tuple) else (options,)
    assert script.train(image_folder, *flags, multimix='dense', **options) == 0, script.text
    row = script.summary()[-1]
    assert 0 < float(row['train_loss']) < 20 and 'train_dense' in row


def test_training_is_the_same_for_the_same_seed(script, image_folder):
    losses = []
    for seed in (1, 1, 2):
        script.train(image_folder, multimix='dense', seed=seed, experiment=f'run{len(losses)}')
        losses.append(script.summary(f'run{len(losses)}')[0]['train_loss'])
    assert losses[0] == losses[1] != losses[2]


def test_no_value_is_fetched_between_log_lines(script, image_folder, monkeypatch):
    """No value is copied from the device between log lines, because that would synchronize a GPU in every step."""
    fetched = []

    def counting(fetch):
        return lambda self: fetched.append(1) or fetch(self)

    for name in ('item', 'tolist'):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    assert script.train(image_folder, batch_size=2, log_interval=1000, val_split='') == 0
    # 16 for the reports of the first and last update and of the epoch, the order of the images and the checkpoint.
    # One more in each of the 12 updates would be 28.
    assert len(fetched) < 24, len(fetched)


def _two_labels(index: int) -> list[int]:
    return [index % 3, (index + 1) % 3]


MULTI_LABEL = ('--dataset', 'hfds/x', '--data-dir', '', '--task', 'multilabel')


@pytest.mark.parametrize('mode,flags', [
    ('dense', []), ('pooled', ['--mixup', '0.2', '--smoothing', '0.1']), ('off', ['--loss', 'asl']),
    ('off', ['--loss', 'twoway']), ('off', ['--loss-pos-weight', '1,2,3']), ('dense', ['--bce-target-thresh', '0.4']),
])
def test_multi_label_training(script, hub_images, mode, flags):
    hub_images(_two_labels)
    assert script.train('', *MULTI_LABEL, *flags, multimix=mode, num_classes=3) == 0, script.text
    row = script.summary()[0]
    assert 0 <= float(row['eval_map']) <= 100 and 'train_top1' not in row
    assert ('train_pooled' in row) == (mode != 'off')


def test_class_statistics(script, hub_images):
    hub_images(_two_labels)
    path = script.folder / 'stats.json'
    path.write_text('{"pos_counts": [10, 11, 11], "num_samples": 16}')
    options = dict(num_classes=3, class_stats=path)
    assert script.train('', *MULTI_LABEL, loss='db', **options) == 0, script.text
    options['experiment'] = 'weighted'
    argv = [*MULTI_LABEL, '--loss-weight-power', '0.5', '--loss-pos-weight', 'neg_pos']
    assert script.train('', *argv, **options) == 0, script.text
    assert script.train('', *MULTI_LABEL, loss_class_weight='1,2', num_classes=3, experiment='c') == 2
    assert '2 entries but the model has 3 classes' in script.lines[-1]


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation(script, image_folder, monkeypatch, kind):
    create = distillation.create_model
    monkeypatch.setattr(
        distillation, 'create_model', lambda *args, pretrained, **options: create(*args, **options))
    flags = ['--kd-model-name', 'test_resnet', '--kd-distill-type', kind, '--task-loss-weight', '0.3']
    assert script.train(image_folder, *flags, '--model-ema') == 0, script.text
    assert len([name for name in script.summary()[0] if name.startswith('train_')]) > 2  # the terms of the loss
    timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(script.run_folder() / 'last.pth.tar'))


@pytest.mark.parametrize('flags', [
    [], ['--mixup', '0.2', '--mixup-off-epoch', '1'], ['--no-prefetcher'],
    ['--multimix', 'dense', '--mixup', '0.2', '--multimix-teacher', 'ema'],
    ['--multimix', 'dense', '--multimix-attention', 'cam', '--multimix-tuple-length', '2', '--no-prefetcher'],
])
def test_naflex(script, image_folder, flags):
    flags = [
        *flags,
        '--naflex-loader', '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '9',
        '--model-kwargs', 'embed_dim=16', 'depth=1', 'num_heads=2', 'patch_size=8']
    status = script.train(image_folder, *flags, model='naflexvit_base_patch16_gap', epochs=2, batch_size=4)
    assert status == 0, script.text
    assert len(script.summary()) == 2


def test_killed_worker_does_not_block_the_log():
    """A worker that is killed while it writes a line holds the lock of tqdm."""
    code = '''if True:
        import logging, os, signal
        from tqdm import tqdm
        from timm_multimix.common.console import setup_logging
        setup_logging()
        tqdm.get_lock()  # a progress bar creates it before the workers start
        read, write = os.pipe()
        worker = os.fork()
        if worker == 0:
            tqdm.get_lock().acquire()
            os.write(write, b"1")
            signal.pause()
        os.read(read, 1)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        logging.error("the last line")'''
    done = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.endswith('the last line\n')


def test_lines_of_workers_do_not_run_into_each_other():
    code = """if True:
        import logging, os
        from timm_multimix.common.console import setup_logging
        setup_logging()
        for _ in range(2):
            os.fork()
        for _ in range(500):
            logging.error('x' * 100)"""
    done = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, timeout=120,
                          env=dict(os.environ, PYTHONUNBUFFERED='1'))
    assert set(done.stderr.splitlines()) == {f'ERROR: {"x" * 100}'}


def test_second_signal_stops_at_once():
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert stop.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_weights_are_those_of_a_plain_loop(script, image_folder):
    """Compare with a plain training loop: gradient accumulation with a remainder, clipping, schedule and EMA."""
    assert script.train(
        image_folder, '--model-ema', epochs=2, grad_accum_steps=2, clip_grad=0.05, clip_mode='value', momentum=0.5,
        smoothing=0.2, model_ema_decay=0.9, val_split='', warmup_epochs=1, warmup_lr=0.005, lr=0.02) == 0

    random_seed(42)
    model = timm.create_model('test_resnet', num_classes=3, drop_rate=0.0)
    dataset = create_dataset('', root=image_folder, split='train')
    loader = create_loader(
        dataset, (3, 32, 32), 8, is_training=True, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3], color_jitter=0.4,
        interpolation='random', mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0, device=torch.device('cpu'))
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.02, momentum=0.5, weight_decay=2e-5)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    average = None
    for lr in (0.005, 0.01):  # one epoch of warmup, then half of a cosine over two
        for group in optimizer.param_groups:
            group['lr'] = lr
        batches = list(loader)
        for share in (batches[:2], batches[2:]):
            optimizer.zero_grad()
            for images, target in share:
                (criterion(model(images), target) / len(share)).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            state = {name: value.clone() for name, value in model.state_dict().items()}
            average = average or state  # timm's average starts with the first update
            average = {
                name: average[name].lerp(value, 0.1) if value.is_floating_point() else value
                for name, value in state.items()}
    torch.testing.assert_close(script.checkpoint()['state_dict'], model.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(script.checkpoint()['state_dict_ema'], average, rtol=1e-4, atol=1e-5)
