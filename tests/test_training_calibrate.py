"""--calibrate: what is held out, and the checkpoint that is written at the end of a run."""
import argparse
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset as create_timm_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset

from timm_multimix.build import loaders
from timm_multimix.build.saved_weights import weights_entry
from timm_multimix.calibration import run as calibration
from timm_multimix.calibration.run import calibration_share, hold_out
from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.common.errors import UsageError
from timm_multimix.data.demo import DigitsDataset, Part

pytest_plugins = ['training_helpers']


def digits(calibrate, seed=42, **options):
    """What is held out of the digits."""
    args = argparse.Namespace(**{
        **dict(calibrate=calibrate, seed=seed, train_split='train', val_split='validation'), **options})
    return hold_out(args, DigitsDataset('train'), DigitsDataset('validation'), 3)


@pytest.fixture
def watched(monkeypatch):
    """Images that were trained on, and that a temperature was fitted to, by the paths that they were read from."""
    seen = dict(train=set(), calibration=set())
    build_loaders, build_calibration_loader = loaders.build_loaders, loaders.build_calibration_loader

    def watch(dataset, name):
        original = dataset.__getitem__

        class Watched(type(dataset)):
            def __getitem__(self, index):
                seen[name].add(self.dataset.filename(self.indices[index]) if isinstance(self, Part) else (
                    self.filename(index)))
                return original(index)

        dataset.__class__ = Watched

    def building(args, datasets, *rest):
        watch(datasets[0], 'train')
        return build_loaders(args, datasets, *rest)

    def building_calibration(args, dataset, *rest):
        watch(dataset, 'calibration')
        return build_calibration_loader(args, dataset, *rest)

    monkeypatch.setattr('timm_multimix.training.run.build_loaders', building)
    monkeypatch.setattr('timm_multimix.training.run.build_calibration_loader', building_calibration)
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


@pytest.mark.parametrize('reader, split, is_refused', [
    (ReaderImageFolder, 'held', True),  # the same folder under another name
    (object, 'train[90%:]', False), (object, 'train[:90%]', True), (object, 'train', True), (object, 'test', False)])
def test_splits_that_share_images_are_refused(monkeypatch, reader, split, is_refused):
    """Readers of files have a root for each split; others keep all splits in one, and tell them by names and slices."""
    class Reader(reader):
        def __init__(self):
            self.root = '/data'

    class Stream(IterableDataset):
        reader = Reader()

        def __iter__(self):
            return iter(())

    args = argparse.Namespace(calibrate=split, train_split='train[:90%]', val_split='validation', seed=0)
    monkeypatch.setattr('timm_multimix.calibration.run.build_split', lambda *_: Stream())
    with pytest.raises(UsageError, match='these are the images of') if is_refused else nullcontext():
        assert isinstance(hold_out(args, Stream(), None, 3)[1], Stream)


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
    import shutil
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


def test_a_head_that_cannot_be_scaled_is_told_before_training(script, image_folder, monkeypatch):
    def refuse(model, images):
        assert images.shape == (2, 3, 32, 32)
        raise ValueError('The logits are not proportional.')

    monkeypatch.setattr(calibration, 'scalable_classifier', refuse)
    assert script.train(image_folder, '--calibrate') == 2
    assert '--calibrate 0.1: The logits are not proportional.' in script.lines[-1] and script.written() == []


def test_a_run_without_a_temperature_ends_well(script, image_folder, monkeypatch):
    def refuse(model, loader):
        raise ValueError('No temperature fits.')

    monkeypatch.setattr(calibration, 'calibrate', refuse)
    assert script.train(image_folder, '--calibrate', '0.25') == 0
    assert 'Not calibrated: No temperature fits.' in script.text
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
