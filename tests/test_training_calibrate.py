"""--calibrate: what is held out, and the checkpoint that is written at the end of a run."""
import argparse
import os
import pickle
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset
from timm.models import register_model

from timm_multimix.build.datasets import build_datasets
from timm_multimix.build.saved_weights import weights_entry
from timm_multimix.calibration import run as calibration
from timm_multimix.calibration.run import calibration_share, hold_out
from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.common.errors import UsageError
from timm_multimix.data.demo import DigitsDataset
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers']


def digits(calibrate, seed=42, **options):
    """What is held out of the digits."""
    args = argparse.Namespace(**{
        **dict(calibrate=calibrate, seed=seed, train_split='train', val_split='validation'), **options})
    return hold_out(args, DigitsDataset('train'), DigitsDataset('validation'), 3)


@pytest.fixture
def watched(monkeypatch):
    """Names of the images that were trained on, and of the images that a temperature was fitted to."""
    seen = dict(train=set(), calibration=set())
    get = ImageDataset.__getitem__

    def watching(dataset, index):
        name = dataset.filename(index, absolute=True)
        if f'{os.sep}validation{os.sep}' not in name:
            seen['train' if 'Random' in repr(dataset.transform) else 'calibration'].add(name)
        return get(dataset, index)

    monkeypatch.setattr(ImageDataset, '__getitem__', watching)
    return seen


def logits_of(path, images, name='test_resnet', key='state_dict'):
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)[key]
    model = timm.create_model(name, num_classes=3).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images)


def test_writes_the_best_weights_at_a_temperature(script, image_folder, watched):
    assert script.train(image_folder, '--calibrate', '0.25', epochs=3, multimix='dense') == 0, script.text
    folder = script.run_folder()
    assert '6 of 24 training images are held out' in script.text
    assert '6 images are few to fit a temperature on' in script.text
    assert len(watched['calibration']) == 6 and len(watched['train']) == 18
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


def test_temperature_is_that_of_the_held_out_images(script, image_folder):
    """Computed anew from the files that were held out, with the transforms of validation."""
    script.train(image_folder, '--calibrate', '0.5', epochs=4, lr=0.1)  # it shall learn something
    dataset = create_timm_dataset('', root=str(image_folder), split='train')
    order = torch.randperm(24, generator=torch.Generator().manual_seed(42)).tolist()[12:]
    order = sorted(set(range(24)) - set(order))
    dataset.transform = timm.data.create_transform((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.95)
    images, target = zip(*(dataset[index] for index in order), strict=True)
    logits = logits_of(script.run_folder() / 'model_best.pth.tar', torch.stack(images))
    expected = fit_temperature(logits, torch.tensor(target))
    assert script.checkpoint('model_calibrated.pth.tar')['temperature'] == pytest.approx(expected, rel=1e-3)


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


def test_split_of_its_own(script, image_folder, watched, tmp_path):
    root = tmp_path / 'images'
    shutil.copytree(image_folder, root)
    shutil.copytree(root / 'validation', root / 'extra')
    assert script.train(root, '--calibrate', 'extra') == 0, script.text
    assert len(watched['train']) == 24 and len(watched['calibration']) == 12
    assert (script.run_folder() / 'model_calibrated.pth.tar').is_file()


def test_off_by_default_and_without_effect_on_validate(script, image_folder):
    script.train(image_folder)
    assert not (script.run_folder() / 'model_calibrated.pth.tar').exists()
    script.train(image_folder, '--calibrate', '0.25', experiment='other')
    best = script.run_folder('other') / 'model_best.pth.tar'
    assert script('--config', script.run_folder('other') / 'args.yaml', '--validate', best) == 0
    calibrated = best.with_name('model_calibrated.pth.tar')
    assert script('--config', script.run_folder('other') / 'args.yaml', '--validate', calibrated) == 0, script.text


def test_resume_holds_out_the_same_images(script, image_folder, watched):
    options = dict(epochs=4, resume='auto', seed=7)
    script.train(image_folder, '--calibrate', '0.25', **options, stop_epoch=2)
    first = {name: set(paths) for name, paths in watched.items()}
    before = script.checkpoint('model_calibrated.pth.tar')
    assert script.train(image_folder, '--calibrate', '0.25', **options) == 0, script.text
    assert watched == first
    assert script.checkpoint('model_calibrated.pth.tar')['epoch'] >= before['epoch']


@pytest.mark.parametrize('options', [dict(calibrate='0.5'), dict(calibrate='0.25', seed=8)])
def test_resume_with_other_images_held_out_is_refused(script, image_folder, options):
    script.train(image_folder, '--calibrate', '0.25', seed=7, epochs=2, stop_epoch=1)
    assert script.train(image_folder, **{'seed': 7, **options}, epochs=2, resume='auto') == 2
    assert 'may have seen the images that would be held out' in script.lines[-1]


def test_a_run_that_goes_on_forgets_what_was_calibrated(script, image_folder):
    """Of weights that are not its best any more, perhaps; one that ends calibrates anew."""
    script.train(image_folder, '--calibrate', '0.25', epochs=3, stop_epoch=1, resume='auto')
    path = script.run_folder() / 'model_calibrated.pth.tar'
    assert path.exists()
    script.train(image_folder, epochs=3, stop_epoch=2, resume='auto')
    assert not path.exists()


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


def test_a_head_that_cannot_be_scaled_is_told_before_training(script, image_folder):
    assert script.train(image_folder, '--calibrate', model='bounded_resnet') == 2
    assert '--calibrate 0.1: The logits of ResNet are not proportional' in script.lines[-1]
    assert script.written() == []


def test_a_run_without_a_temperature_ends_well(script, image_folder, tmp_path):
    """The images to calibrate on have wrong labels."""
    for name in ('train', 'validation'):
        (tmp_path / name).symlink_to(image_folder / name)
    for label, content in zip('abc', 'bca', strict=True):
        shutil.copytree(image_folder / 'validation' / content, tmp_path / 'held' / label)
    assert script.train(tmp_path, '--calibrate', 'held', epochs=4, lr=0.1) == 0, script.text
    assert 'Not calibrated: The temperature cannot be fitted' in script.text
    assert not (script.run_folder() / 'model_calibrated.pth.tar').exists()


def test_calibration_helps_an_overconfident_run(script, image_folder):
    """Half of the labels are wrong: the model must not be sure."""
    script.train(image_folder, '--calibrate', '0.5', epochs=4, lr=0.1)  # it shall learn something
    best = script.checkpoint('model_best.pth.tar')
    best['state_dict']['fc.weight'] *= 50
    best['state_dict']['fc.bias'] *= 50
    folder = script.run_folder()
    torch.save(best, folder / 'model_best.pth.tar')
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(3, (8,))) for _ in range(4)]
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(best['state_dict'])
    with torch.no_grad():
        right = [model.eval()(images).argmax(1) for images, _ in batches]
    batches = [(images, torch.where(torch.rand(8) < 0.7, label, target))
               for (images, target), label in zip(batches, right, strict=True)]
    assert calibration.write_calibrated(str(folder), model, batches, lambda: torch.autocast('cpu', enabled=False))
    images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    losses = [
        F.cross_entropy(logits_of(folder / name, images), target)
        for name in ('model_best.pth.tar', 'model_calibrated.pth.tar')]
    assert losses[1] < losses[0] and script.checkpoint('model_calibrated.pth.tar')['temperature'] > 3
