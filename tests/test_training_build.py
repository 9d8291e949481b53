"""Options are passed to timm: arguments of create_model, create_loader and the optimizer and scheduler factories."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from training_helpers import on_batch

pytest_plugins = ['training_helpers']

MODEL = dict(drop=0.1, drop_path=0.2, gp='avg', initial_checkpoint='', num_classes=3)
TRAIN_LOADER = {  # option, value, argument of create_loader
    'reprob': (0.3, 're_prob'), 'remode': ('const', 're_mode'), 'recount': (2, 're_count'),
    'train-crop-mode': ('rkrc', 'train_crop_mode'), 'hflip': (0.1, 'hflip'), 'vflip': (0.2, 'vflip'),
    'color-jitter': (0.3, 'color_jitter'), 'color-jitter-prob': (0.4, 'color_jitter_prob'),
    'grayscale-prob': (0.5, 'grayscale_prob'), 'gaussian-blur-prob': (0.6, 'gaussian_blur_prob'),
    'aa': ('rand-m3', 'auto_augment'), 'train-interpolation': ('bicubic', 'interpolation'),
    'worker-seeding': ('part', 'worker_seeding'), 'workers': (0, 'num_workers'), 'batch-size': (6, 'batch_size'),
}
LISTS = {'scale': ([0.5, 0.9], 'scale'), 'ratio': ([0.8, 1.2], 'ratio'), 'mean': ([0.1, 0.2, 0.3], 'mean'),
         'std': ([0.2, 0.3, 0.4], 'std')}
OPTIMIZER = {'opt': ('adamw', 'opt'), 'opt-eps': (1e-6, 'eps'), 'weight-decay': (0.3, 'weight_decay'),
             'lr': (0.007, 'lr'), 'momentum': (0.8, 'momentum'), 'layer-decay': (0.7, 'layer_decay')}
SCHEDULE = {
    'sched': ('cosine', 'sched'), 'min-lr': (1e-5, 'min_lr'), 'warmup-lr': (1e-4, 'warmup_lr'),
    'warmup-epochs': (2, 'warmup_epochs'), 'cooldown-epochs': (3, 'cooldown_epochs'), 'decay-rate': (0.2, 'decay_rate'),
    'lr-cycle-mul': (2.0, 'cycle_mul'), 'lr-cycle-limit': (1, 'cycle_limit'), 'lr-k-decay': (0.9, 'k_decay'),
    'lr-cycle-decay': (0.3, 'cycle_decay'), 'patience-epochs': (7, 'patience_epochs'), 'epochs': (4, 'num_epochs'),
    'lr-noise-pct': (0.5, 'noise_pct'), 'lr-noise-std': (0.6, 'noise_std'), 'decay-epochs': (11.0, 'decay_epochs'),
}


# The script, which writes the keyword arguments of calls to timm's factory functions to calls.json.
SPY = """
import json, sys
import timm.data, timm.models, timm.optim, timm.scheduler
calls = {}
def spy(module, name):
    function = getattr(module, name)
    def call(*args, **options):
        calls.setdefault(name, []).append(options)
        return function(*args, **options)
    setattr(module, name, call)
spy(timm.data, 'create_loader'), spy(timm.models, 'create_model')
spy(timm.optim, 'create_optimizer_v2'), spy(timm.scheduler, 'create_scheduler_v2')
from timm_multimix.training import main
status = main()
json.dump(calls, open('calls.json', 'w'), default=str)
sys.exit(status)
"""


def test_options_are_passed_to_timm(image_folder, tmp_path):
    scalars = {**TRAIN_LOADER, **OPTIMIZER, **SCHEDULE}
    argv = [part for name, (value, _) in scalars.items() for part in (f'--{name}', value)]
    argv += [part for name, (values, _) in LISTS.items() for part in (f'--{name}', *values)]
    argv += ['--drop', '0.1', '--drop-path', '0.2', '--gp', 'max', '--bn-momentum', '0.05', '--bn-eps', '1e-4']
    argv += ['--opt-betas', '0.8', '0.9', '--opt-kwargs', 'amsgrad=True', '--crop-pct', '0.7', '-vb', '5']
    argv += ['--interpolation', 'bilinear', '--pin-mem', '--stop-epoch', '1', '--sched-on-updates']
    argv += ['--model', 'test_efficientnet', '--img-size', '32', '--data-dir', image_folder, '--model-kwargs',
             'act_layer=relu']
    done = subprocess.run(
        [sys.executable, '-c', SPY, *map(str, argv)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    calls = json.loads((tmp_path / 'calls.json').read_text())
    created, = calls['create_model']
    assert {name: created[name] for name in (
        'drop_rate', 'drop_path_rate', 'global_pool', 'bn_momentum', 'bn_eps', 'num_classes', 'act_layer')} == dict(
        drop_rate=0.1, drop_path_rate=0.2, global_pool='max', bn_momentum=0.05, bn_eps=1e-4, num_classes=3,
        act_layer='relu')
    train, evaluation = calls['create_loader']
    for value, argument in {**TRAIN_LOADER, **LISTS}.values():
        assert train[argument] == value, argument
    assert train['pin_memory'] and train['is_training'] and train['input_size'] == [3, 32, 32]
    assert (evaluation['batch_size'], evaluation['crop_pct'], evaluation['interpolation']) == (5, 0.7, 'bilinear')
    optimizer, = calls['create_optimizer_v2']
    assert {argument: optimizer[argument] for _, argument in OPTIMIZER.values()} == {
        argument: value for value, argument in OPTIMIZER.values()}
    assert optimizer['betas'] == [0.8, 0.9] and optimizer['amsgrad']
    *_, schedule = calls['create_scheduler_v2']  # the first one checks the options
    for value, argument in SCHEDULE.values():
        assert schedule[argument] == value, argument
    assert schedule['step_on_epochs'] is False and schedule['updates_per_epoch'] == 4


@pytest.mark.parametrize('options,lr', [
    ([], 0.1 * 16 / 256), (['--opt', 'adamw'], 0.1 * (16 / 256) ** 0.5), (['--grad-accum-steps', '2'], 0.1 * 32 / 256),
    (['--lr-base', '0.5', '--lr-base-size', '64', '--lr-base-scale', 'sqrt'], 0.5 * 0.5),
])
def test_learning_rate_scales_with_the_batch_size(script, image_folder, options, lr):
    assert script('--data-dir', image_folder, '--model', 'test_resnet', '--img-size', '32', '-b', '16', '-j', '0',
                  '--dry-run', *options) == 0, script.text
    assert f'Learning rate {lr:.4g}: ' in script.text


def test_schedule_per_update_or_per_epoch(script, image_folder):
    script.train(image_folder, epochs=2, lr=0.01)
    assert [float(row['lr']) for row in script.summary()] == pytest.approx([0.01, 0.005])
    script.train(image_folder, '--sched-on-updates', epochs=2, lr=0.01, experiment='updates')
    assert [float(row['lr']) for row in script.summary('updates')] == pytest.approx([0.005, 0.0], abs=1e-9)


def test_resumed_schedule_matches_the_uninterrupted_one(script, image_folder):
    script.train(image_folder, epochs=4)
    expected = [row['lr'] for row in script.summary()]
    script.train(image_folder, epochs=4, stop_epoch=2, experiment='halves')
    script.train(image_folder, epochs=4, resume='auto', experiment='halves')
    assert [row['lr'] for row in script.summary('halves')] == expected
    script.train(image_folder, epochs=4, start_epoch=3, resume='auto', experiment='halves')
    # The rows of summary.csv from --start-epoch on are written again.
    assert [row['lr'] for row in script.summary('halves')] == expected
    assert sum(line.startswith('Epoch ') and 'training' in line for line in script.lines) == 1


def test_resumed_average_continues(script, image_folder):
    options = dict(epochs=2, model_ema_decay=0.9999999)
    script.train(image_folder, '--model-ema', stop_epoch=1, **options)
    before = script.checkpoint()['state_dict_ema']
    script.train(image_folder, '--model-ema', resume='auto', **options)
    after = script.checkpoint()
    torch.testing.assert_close(after['state_dict_ema']['fc.weight'], before['fc.weight'])
    assert not torch.allclose(after['state_dict']['fc.weight'], before['fc.weight'])


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher']])
def test_mixup_ends_and_smooths(script, image_folder, flags):
    targets = []
    with on_batch(lambda number, input, target: targets.append(target)):
        script.train(
            image_folder, *flags, mixup=1.0, mixup_mode='elem', mixup_off_epoch=1, smoothing=0.3, epochs=2,
            multimix='dense')
    mixed, plain = torch.cat(targets[:3]), torch.cat(targets[3:])
    assert ((mixed > 0.11) & (mixed < 0.79)).any()
    torch.testing.assert_close(plain.sort(dim=1).values, torch.tensor([0.1, 0.1, 0.8]).expand_as(plain))


def test_views_of_a_validation_image_are_averaged(script, image_folder, tmp_path):
    """With two equal views of every image, the metrics are the same as with one view."""
    shutil.copytree(image_folder, tmp_path / 'doubled')
    for path in (tmp_path / 'doubled' / 'validation').rglob('*.png'):
        shutil.copy(path, path.with_name(f'{path.stem}.copy.png'))  # the next one in the order of names
    script.train(image_folder, seed=3)
    expected = script.summary()[0]
    assert script.train(tmp_path / 'doubled', seed=3, tta=2, experiment='doubled') == 0, script.text
    for name in ('eval_loss', 'eval_top1'):
        assert float(script.summary('doubled')[0][name]) == pytest.approx(float(expected[name]), rel=1e-4)


def test_auto_augment_policies_work_at_every_magnitude():
    """timm's posterize keeps 0 bits at full magnitude, which some versions of Pillow reject."""
    augment = rand_augment_transform('rand-m10-n8-inc1', {})
    for _ in range(30):
        augment(Image.new('RGB', (8, 8), (200, 100, 50)))
