"""Class names are stored in checkpoints and compared whenever a model is used with data."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from training_helpers import make_images

from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.data.class_names import class_mapping, valid_classes
from timm_multimix.evaluation import main as evaluate
from timm_multimix.hub.command import main as hub
from timm_multimix.training import main

pytest_plugins = ['training_helpers']

COMMON = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '--warmup-epochs', '0', '--lr', '0.1', '--opt',
          'sgd', '--workers', '0', '--crop-pct', '1.0', '--val-interval', '4']


@pytest.fixture(scope='module')
def folder(tmp_path_factory, image_folder):
    """Create a run with the classes a, b and c, and datasets with some of these classes and with other classes."""
    root = tmp_path_factory.mktemp('classes')
    for name, kept in dict(subset='ac', other='abc').items():
        shutil.copytree(image_folder, root / name)
        for split in ('train', 'validation'):
            for path in (root / name / split).iterdir():
                if path.name not in kept:
                    shutil.rmtree(path)
    for split in ('train', 'validation'):  # the classes b, c and d, of which the last looks like a
        (root / 'other' / split / 'a').rename(root / 'other' / split / 'd')
    assert main([*COMMON, '--data-dir', str(image_folder), '--epochs', '4', '--output', str(root), '--experiment',
                 'run', '--calibrate', '0.25']) == 0
    for path in (root / 'run').glob('*.pth.tar'):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint['class_to_idx'] == dict(a=0, b=1, c=2), path
    (root / 'nameless').mkdir()
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        checkpoint = torch.load(root / 'run' / name, weights_only=True)
        del checkpoint['class_to_idx']
        torch.save(checkpoint, root / 'nameless' / name)
    return root


@pytest.fixture
def run(folder, tmp_path):
    """Copy the run, so that a test can continue it."""
    shutil.copytree(folder / 'run', tmp_path / 'work' / 'output' / 'train' / 'run')
    return tmp_path / 'work' / 'output' / 'train' / 'run'


def train(script, data, *argv, **options):
    return script.train(data, *argv, **{'lr': 0.1, 'crop_pct': 1.0, 'epochs': 5, **options})


def evaluated(folder, out: Path, *argv) -> tuple[int, dict]:
    status = evaluate.main([*map(str, argv), '--parts', '--output', str(out), '-j', '0'])
    results = json.loads((out / 'results.json').read_text()) if (out / 'results.json').exists() else {}
    return status, results


def test_resume_with_some_of_the_classes(script, run, folder):
    assert train(script, folder / 'subset', resume='auto') == 0, script.text
    assert "has 2 of the model's 3 classes, mapped by name" in script.text
    checkpoint = script.checkpoint()
    assert checkpoint['class_to_idx'] == dict(a=0, b=1, c=2) and checkpoint['state_dict']['fc.bias'].shape == (3,)
    assert float(script.summary()[-1]['eval_top1']) == 100
    assert json.loads((run / 'config.json').read_text())['label_names'] == ['a', 'b', 'c']


@pytest.mark.parametrize('option', ['auto', 'path', 'validate', 'initial_checkpoint'])
def test_unknown_classes_are_refused(script, run, folder, option):
    path = run / 'last.pth.tar'
    options = dict(resume='auto') if option == 'auto' else dict(
        experiment='new', **{'resume' if option == 'path' else option: path})
    before = path.read_bytes()
    assert train(script, folder / 'other', **options) == 2, script.text
    assert script.lines[-1].startswith('ERROR') and ' d,' in script.lines[-1] and 'a, b, c' in script.lines[-1]
    assert ('--pretrained-path' in script.lines[-1]) == (option == 'initial_checkpoint')
    assert path.read_bytes() == before and not (run.parent / 'new').exists()


def test_validate_on_some_of_the_classes(script, run, folder):
    assert train(script, folder / 'subset', validate=run / 'model_best.pth.tar') == 0, script.text
    assert 'top1 100' in script.lines[-1]


def test_other_order_is_mapped_by_name(script, run, folder, image_folder, tmp_path):
    (tmp_path / 'map.txt').write_text('c\nb\na\n')
    assert train(script, image_folder, validate=run / 'model_best.pth.tar', class_map=tmp_path / 'map.txt') == 0
    assert 'top1 100' in script.lines[-1]


@pytest.mark.parametrize('option', ['resume', 'validate', 'initial_checkpoint'])
def test_checkpoint_without_names(script, folder, image_folder, option):
    path = folder / 'nameless' / 'last.pth.tar'
    assert train(script, image_folder, '--dry-run', **{option: path}) == 0, script.text
    assert 'nameless/last.pth.tar contains no class names: only the number of classes is compared' in script.text
    assert train(script, folder / 'subset', **{option: path}, experiment='other') == 2
    assert '3' in script.lines[-1] and '2' in script.lines[-1]


def test_classifier_of_another_size_is_not_compared(script, folder, tmp_path):
    """timm reports weights that do not fit, and --pretrained-path starts with a new classifier."""
    make_images(tmp_path / 'two' / 'train', ['a', 'b'])
    for split in ('train',):
        (tmp_path / 'two' / split / 'a').rename(tmp_path / 'two' / split / 'x')
    weights = folder / 'run' / 'last.pth.tar'
    assert train(script, tmp_path / 'two', '--val-split', '', initial_checkpoint=weights) == 2
    assert 'size mismatch' in script.lines[-1]
    assert train(script, tmp_path / 'two', '--val-split', '', '--dry-run', '--pretrained', pretrained_path=weights) == 0


def test_validation_with_some_of_the_training_classes(script, folder, image_folder, tmp_path):
    shutil.copytree(image_folder / 'train', tmp_path / 'data' / 'train')
    shutil.copytree(folder / 'subset' / 'validation', tmp_path / 'data' / 'validation')
    assert train(script, tmp_path / 'data') == 0, script.text
    assert 'split validation has 2 of the model' in script.text and float(script.summary()[-1]['eval_top1']) == 100


def test_calibration_split_is_mapped_and_compared(script, folder, image_folder, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(image_folder, data)
    shutil.copytree(folder / 'subset' / 'validation', data / 'held')
    shutil.copytree(folder / 'other' / 'validation', data / 'wrong')
    assert train(script, data, calibrate='held', epochs=3) == 0, script.text
    best, calibrated = (script.checkpoint(f'model_{name}.pth.tar') for name in ('best', 'calibrated'))
    images = [
        path for name in 'ac' for path in sorted((data / 'held' / name).iterdir())]
    transform = timm.data.create_transform((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    model = timm.create_model('test_resnet', num_classes=3).eval()
    model.load_state_dict(best['state_dict'])
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path)) for path in images]))
    target = torch.tensor([0] * 4 + [2] * 4)
    assert calibrated['temperature'] == pytest.approx(fit_temperature(logits, target), rel=1e-2)
    assert train(script, data, calibrate='wrong', experiment='wrong') == 2
    assert 'split wrong has different classes' in script.lines[-1]


def test_evaluation_by_names(folder, image_folder, tmp_path, capsys):
    status, results = evaluated(folder, tmp_path / 'a', folder / 'run', '--data-dir', folder / 'subset')
    assert status == 0 and results['models']['run']['metrics']['top1'] == 100
    assert 'mapped by class name' in capsys.readouterr().err
    status, results = evaluated(folder, tmp_path / 'b', folder / 'run', '--data-dir', folder / 'other')
    assert status == 2 and results == {} and ': d.' in capsys.readouterr().err


def test_calibration_split_of_an_evaluation(folder, image_folder, tmp_path, capsys):
    data = tmp_path / 'data'
    shutil.copytree(image_folder, data)
    shutil.copytree(folder / 'subset' / 'train', data / 'held')
    shutil.copytree(folder / 'other' / 'train', data / 'wrong')
    status, results = evaluated(
        folder, tmp_path / 'a', folder / 'run', '--data-dir', data, '--calibration-split', 'held')
    assert status == 0 and results['models']['run']['tempered']['temperatures'][0] < 2
    assert evaluated(
        folder, tmp_path / 'b', folder / 'run', '--data-dir', data, '--calibration-split', 'wrong')[0] == 2
    assert ': d.' in capsys.readouterr().err


def test_evaluation_without_names(folder, image_folder, tmp_path, capsys):
    assert evaluated(folder, tmp_path / 'a', folder / 'nameless', '--data-dir', image_folder)[0] == 0
    assert 'contains no class names' in capsys.readouterr().err
    assert evaluated(folder, tmp_path / 'b', folder / 'nameless', '--data-dir', folder / 'subset')[0] == 2
    assert 'has 3 classes and' in capsys.readouterr().err


def test_exported_folder(script, folder, image_folder, tmp_path, capsys):
    assert hub(['export', str(folder / 'run'), str(tmp_path / 'model')]) == 0
    name = f'local-dir:{tmp_path / "model"}'
    status, results = evaluated(folder, tmp_path / 'a', name, '--data-dir', folder / 'subset')
    assert status == 0 and next(iter(results['models'].values()))['metrics']['top1'] == 100
    assert evaluated(folder, tmp_path / 'b', name, '--data-dir', folder / 'other')[0] == 2
    assert ': d.' in capsys.readouterr().err
    weights = tmp_path / 'model' / 'model.safetensors'
    for option in ('initial_checkpoint', 'resume'):
        assert train(script, folder / 'other', **{option: weights}) == 2
        assert 'different classes' in script.lines[-1]


def test_teacher_of_other_classes_is_refused(script, folder):
    options = dict(multimix='pooled', multimix_teacher='test_resnet', multimix_n=10)
    assert train(script, folder / 'other', multimix_teacher_path=folder / 'run' / 'last.pth.tar', **options) == 2
    assert 'the teacher has the classes a, b, c' in script.lines[-1]


def test_damaged_names(script, folder, image_folder, tmp_path):
    checkpoint = torch.load(folder / 'run' / 'last.pth.tar', weights_only=True)
    for value in (3, ['a', 'a', 'b'], dict(a='x'), {1: 2}, dict(a=-1)):
        torch.save({**checkpoint, 'class_to_idx': value}, tmp_path / 'damaged.pth.tar')
        assert train(script, image_folder, resume=tmp_path / 'damaged.pth.tar') == 2
        assert 'class_to_idx' in script.lines[-1]


def test_mapping():
    assert class_mapping(dict(x=0, y=1), dict(y=0, z=1, x=2)) == {0: 2, 1: 0}
    assert class_mapping(dict(x=0, y=0), dict(x=3, y=3)) == {0: 3}
    with pytest.raises(ValueError, match='lacks 2 of the classes: b, c'):
        class_mapping(dict(a=0, b=1, c=2), dict(a=0))
    with pytest.raises(ValueError, match='two names of class 0'):
        class_mapping(dict(x=0, y=0), dict(x=0, y=1))
    assert valid_classes(['b', 'a']) == dict(b=0, a=1)
