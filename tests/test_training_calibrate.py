"""--calibrate: the held-out images, and the checkpoint that is written at the end of a run."""
import argparse
import os
import pickle
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset as create_timm_dataset
from timm.models import register_model

from timm_multimix.build.datasets import build_datasets
from timm_multimix.build.saved_weights import weights_entry
from timm_multimix.calibration.run import calibration_share, hold_out
from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.common.errors import UsageError
from timm_multimix.data.demo import DigitsDataset
from timm_multimix.data.image_files import ImageFiles
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers']


def digits(calibrate, seed=42, **options):
    args = argparse.Namespace(**{
        **dict(calibrate=calibrate, seed=seed, train_split='train', val_split='validation'), **options})
    return hold_out(args, DigitsDataset('train'), DigitsDataset('validation'), 3)


@pytest.fixture
def watched(monkeypatch):
    """Record the names of the images used for training and for calibration."""
    seen = dict(train=set(), calibration=set())
    get = ImageFiles.__getitem__

    def watching(dataset, index):
        name = dataset.filename(index, absolute=True)
        if f'{os.sep}validation{os.sep}' not in name:
            seen['train' if 'Random' in repr(dataset.transform) else 'calibration'].add(name)
        return get(dataset, index)

    monkeypatch.setattr(ImageFiles, '__getitem__', watching)
    return seen


def logits_of(path, images, name='test_resnet', key='state_dict'):
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)[key]
    model = timm.create_model(name, num_classes=3).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images)


def test_best_weights_are_calibrated_on_the_held_out_images(script, image_folder, watched):
    """The expected temperature is computed from the held-out files, with the transforms of validation."""
    assert script.train(image_folder, '--calibrate', '0.5', epochs=4, lr=0.1, multimix='dense') == 0, script.text
    folder = script.run_folder()
    assert '12 of 24 training images are held out' in script.text
    assert len(watched['calibration']) == 12 and len(watched['train']) == 12
    assert not watched['calibration'] & watched['train']
    checkpoint, best = script.checkpoint('model_calibrated.pth.tar'), script.checkpoint('model_best.pth.tar')
    temperature = checkpoint['temperature']
    assert f'temperature {temperature:.4g}' in script.text and abs(temperature - 1) > 1e-3
    assert {'epoch', 'arch', 'args', 'version', 'metric'} <= set(checkpoint)
    assert checkpoint['epoch'] == best['epoch'] and checkpoint['metric'] == best['metric']
    assert checkpoint['eval_weights'] == 'student' and 'optimizer' not in checkpoint
    assert list(checkpoint['state_dict']) == list(best['state_dict'])
    images = torch.randn(30, 3, 32, 32)
    before = logits_of(folder / 'model_best.pth.tar', images)
    after = logits_of(folder / 'model_calibrated.pth.tar', images)
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.argmax(1), before.argmax(1))
    timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_calibrated.pth.tar'))
    assert not list(folder.glob('*.tmp'))

    dataset = create_timm_dataset('', root=str(image_folder), split='train')
    order = torch.randperm(24, generator=torch.Generator().manual_seed(42)).tolist()
    dataset.transform = timm.data.create_transform((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.95)
    images, target = zip(*(dataset[index] for index in order[:12]), strict=True)
    logits = logits_of(folder / 'model_best.pth.tar', torch.stack(images))
    assert temperature == pytest.approx(fit_temperature(logits, torch.tensor(target)), rel=1e-3)
    assert script('--config', folder / 'args.yaml', '--validate', folder / 'model_calibrated.pth.tar') == 0


@pytest.mark.parametrize('split, is_refused', [
    ('train[90%:]', False), ('train[:90%]', True), ('train', True), ('test', False)])
def test_splits_that_share_images_are_refused(hub_images, split, is_refused):
    """All splits of a table have the same root. They are compared by their names and slices."""
    hub_images(lambda index: index % 3)
    args = parse_args(['--dataset', 'hfds/x', '--train-split', 'train[:90%]', '--calibrate', split])
    train, evaluation = build_datasets(args, 3)
    with pytest.raises(UsageError, match='these are the images of') if is_refused else nullcontext():
        assert hold_out(args, train, evaluation, 3)[1].reader.split == split


def test_folder_under_another_name_is_refused(script, image_folder, tmp_path):
    for name, target in dict(train='train', validation='validation', held='train').items():
        (tmp_path / name).symlink_to(image_folder / target)
    assert script.train(tmp_path, '--calibrate', 'held') == 2
    assert 'these are the images of --train-split train' in script.lines[-1]


def test_averaged_weights_are_calibrated(script, image_folder):
    script.train(image_folder, '--calibrate', '0.25', '--model-ema', '--model-ema-decay', '0.5', epochs=2)
    best = script.checkpoint('model_best.pth.tar')
    key = weights_entry(best)
    assert key == 'state_dict_ema'
    calibrated = script.checkpoint('model_calibrated.pth.tar')
    body = [name for name in best['state_dict'] if not name.startswith('fc.')]
    assert all(torch.equal(calibrated['state_dict'][name], best[key][name]) for name in body)
    assert any(not torch.equal(best['state_dict'][name], best[key][name]) for name in body)
    assert 'state_dict_ema' not in calibrated
    torch.testing.assert_close(
        calibrated['state_dict']['fc.weight'] * calibrated['temperature'], best[key]['fc.weight'], rtol=1e-5, atol=0)


def test_resume_holds_out_the_same_images(script, image_folder, watched):
    options = dict(epochs=4, resume='auto', seed=7)
    script.train(image_folder, '--calibrate', '0.25', **options, stop_epoch=2)
    first = {name: set(paths) for name, paths in watched.items()}
    before = script.checkpoint('model_calibrated.pth.tar')
    assert script.train(image_folder, '--calibrate', '0.25', **options) == 0, script.text
    assert watched == first
    assert script.checkpoint('model_calibrated.pth.tar')['epoch'] >= before['epoch']


def test_a_run_continues_only_with_the_same_images_held_out(script, image_folder):
    options = dict(epochs=3, seed=7, resume='auto')
    script.train(image_folder, '--calibrate', '0.25', **options, stop_epoch=1)
    path = script.run_folder() / 'model_calibrated.pth.tar'
    for changed in (dict(calibrate='0.5'), dict(calibrate='0.25', seed=8)):
        assert script.train(image_folder, **{**options, **changed}) == 2 and path.exists()
        assert 'may have seen the images that would be held out' in script.lines[-1]
    script.train(image_folder, **options, stop_epoch=2)
    assert not path.exists()  # its weights may not be the best any more


def test_share_is_drawn_by_the_seed():
    train, held_out = digits('0.1')
    assert len(held_out) == 144 and len(train) == 1442 - 144
    assert sorted(train.indices + held_out.indices) == list(range(1442))
    assert digits('0.1')[1].indices == held_out.indices != digits('0.1', seed=1)[1].indices
    assert digits(None)[1] is None and isinstance(digits(None)[0], DigitsDataset)


def test_parts_have_transforms_of_their_own():
    train, held_out = digits('0.1')
    train.transform = lambda image: 'augmented'
    held_out.transform = np.asarray
    assert train[0][0] == 'augmented' and held_out[0][0].shape == (32, 32, 3)
    assert train.dataset.transform is train.transform is not held_out.transform
    images = {id_: pickle.loads(pickle.dumps(held_out.dataset[id_]))[0].tobytes() for id_ in held_out.indices}
    assert [images[id_] for id_ in held_out.indices] == [image.tobytes() for image, _ in held_out]


@pytest.mark.parametrize('text, share', [
    ('0.1', 0.1), ('.5', 0.5), ('1e-2', 0.01), ('extra', None), ('train[90%:]', None)])
def test_shares_and_splits(text, share):
    assert calibration_share(text) == share


@pytest.mark.parametrize('text', ['0', '1', '10', '-0.1', 'nan'])
def test_numbers_that_are_no_shares(text):
    with pytest.raises(UsageError, match='between 0 and 1'):
        calibration_share(text)


@pytest.mark.parametrize('argv, message', [
    (['--calibrate', '2'], 'between 0 and 1'),
    (['--calibrate', '0.01'], 'too small'),
    (['--calibrate', 'validation'], 'these are the images of --val-split'),
    (['--calibrate', 'val'], 'these are the images of --val-split'),
    (['--calibrate', 'train'], 'these are the images of --train-split'),
    (['--calibrate', '0.1', '--task', 'multilabel', '--num-classes', '3'], '--task classification'),
    (['--calibrate', '0.1', '--torchscript'], '--torchscript'),
])
def test_refused_before_training(script, image_folder, argv, message):
    assert script.train(image_folder, *argv) == 2
    assert message in script.lines[-1] and script.written() == []


@pytest.mark.parametrize('split', ['validation', 'test', 'train'])
def test_embedded_splits_by_their_synonyms(split):
    with pytest.raises(UsageError, match='these are the images of'):
        digits(split, **{name: None for name in (
            'class_map', 'dataset_download', 'input_key', 'target_key', 'dataset_trust_remote_code')},
               dataset='demo/digits', data_dir=None, task='classification', target_format='indices', batch_size=8,
               input_img_mode=None)


@register_model
def bounded_resnet(pretrained=False, **options):
    """A model whose logits are not proportional to its last layer."""
    model = timm.create_model('test_resnet', **options)
    model.register_forward_hook(lambda module, args, logits: logits.tanh())
    return model


def test_a_head_that_cannot_be_scaled_is_refused_before_training(script, image_folder):
    assert script.train(image_folder, '--calibrate', model='bounded_resnet') == 2
    assert '--calibrate 0.1: The logits of ResNet are not proportional' in script.lines[-1]
    assert script.written() == []


def test_a_run_without_a_temperature_ends_well(script, image_folder, tmp_path):
    """The images for calibration have wrong labels."""
    for name in ('train', 'validation'):
        (tmp_path / name).symlink_to(image_folder / name)
    for label, content in zip('abc', 'bca', strict=True):
        shutil.copytree(image_folder / 'validation' / content, tmp_path / 'held' / label)
    assert script.train(tmp_path, '--calibrate', 'held', epochs=4, lr=0.1) == 0, script.text
    assert 'Not calibrated: The temperature cannot be fitted' in script.text
    assert not (script.run_folder() / 'model_calibrated.pth.tar').exists()
