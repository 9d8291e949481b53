"""Datasets that can run code are accepted on the command line only. Splits and targets are checked."""
import shlex
import sys
import tarfile
from types import ModuleType

import pytest
import timm
import torch
import yaml
from training_helpers import make_images

from timm_multimix.common.errors import UsageError
from timm_multimix.data.dataset_types import check_split, code_danger
from timm_multimix.data.demo import create_dataset
from timm_multimix.evaluation import main as evaluate
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers']

PIPE = 'pipe:touch stolen #'


@pytest.fixture(autouse=True)
def _installed_packages(tmp_path_factory, monkeypatch):
    """Make the packages of datasets importable, so that options are checked as if they were installed."""
    folder = tmp_path_factory.mktemp('packages')
    for name in ('webdataset', 'tensorflow', 'tensorflow_datasets'):
        (folder / f'{name}.py').touch()
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Return a function that parses a config file and a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def parse(config, *argv):
        (tmp_path / 'config.yaml').write_text(yaml.safe_dump(config))
        return parse_args(['--config', 'config.yaml', *argv])
    return parse


DANGEROUS = {
    'command': dict(dataset='wds/x', data_dir=PIPE),
    'upper case': dict(dataset='WDS/x', data_dir=PIPE),
    'address': dict(dataset='wds/x', data_dir='http://example.org/x'),
    'object store': dict(dataset='wds/x', data_dir='s3://bucket'),
    'unknown scheme': dict(dataset='wds/x', data_dir='ais://x'),
    'no folder': dict(dataset='wds/x', data_dir='nowhere'),
    'positional folder': dict(dataset='wds/x', data=PIPE),
    'training split': dict(dataset='wds/x', data_dir='.', train_split=f'{PIPE}.tar|10'),
    'validation split': dict(dataset='wds/x', data_dir='.', val_split='a-{0..3}.tar::pipe:x'),
    'calibration split': dict(dataset='wds/x', data_dir='.', calibrate=PIPE),
    'community dataset': dict(dataset='tfds/namespace:x'),
}


@pytest.mark.parametrize('config', DANGEROUS.values(), ids=DANGEROUS)
def test_a_file_cannot_choose_a_dataset_that_runs_code(parse, config):
    with pytest.raises(UsageError, match=r'not opened.*the file sets.*on the command line'):
        parse(config)
    argv = [part for name, value in config.items() if name != 'data'
            for part in (f'--{name.replace("_", "-")}', value)] + ([config['data']] if 'data' in config else [])
    args = parse({}, *argv)
    assert args.dataset == config['dataset']
    for name in config:  # a part of it is enough
        if config[name] not in ('.', 'nowhere', 'wds/x', 'WDS/x') or name == 'dataset':
            rest = [part for other, value in config.items() if other not in (name, 'data')
                    for part in (f'--{other.replace("_", "-")}', value)]
            rest += [config['data']] if 'data' in config and name != 'data' else []
            with pytest.raises(UsageError, match='the file sets'):
                parse({name: config[name]}, *rest)


def test_a_folder_named_like_an_address_is_an_address(parse, tmp_path):
    (tmp_path / PIPE).mkdir()
    with pytest.raises(UsageError, match='the file sets'):
        parse(dict(dataset='wds/x', data_dir=PIPE))


@pytest.mark.parametrize('config', [
    dict(dataset='wds/x', data_dir='.', train_split='x-{0000..0009}.tar|100'),
    dict(dataset='torch/cifar10', data_dir='.'),
    dict(dataset='demo/letters'), dict(data_dir='.'), dict(dataset='tfds/imagenet2012:5.1')])
def test_other_datasets_are_accepted_from_a_file(parse, config):
    assert vars(parse(config)).items() >= config.items()


def _datasets(monkeypatch, load_dataset):
    module = ModuleType('datasets')
    module.load_dataset = load_dataset
    module.__spec__ = type(sys.__spec__)('datasets', None)
    monkeypatch.setitem(sys.modules, 'datasets', module)


def test_hugging_face_datasets_with_scripts(parse, monkeypatch):
    _datasets(monkeypatch, lambda path, trust_remote_code=None: None)  # before version 4
    with pytest.raises(UsageError, match='script'):
        parse(dict(dataset='hfds/user/x'))
    assert parse({}, '--dataset', 'hfds/user/x').dataset == 'hfds/user/x'
    _datasets(monkeypatch, lambda path: None)
    assert parse(dict(dataset='hfds/user/x')).dataset == 'hfds/user/x'
    for name in ('hfds/user/x', 'hfids/user/x'):
        with pytest.raises(UsageError, match='script'):
            parse(dict(dataset=name), '--dataset-trust-remote-code')


def test_continuing_a_run_names_its_dataset_on_the_command_line(script, tmp_path):
    from argparse import Namespace

    from timm_multimix.training.fit import train_command
    args = parse_args(['--dataset', 'wds/x', '--data-dir', 'http://example.org/x y', '--val-split', 'b-0.tar'])
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**vars(args), 'dataset_trust_remote_code': None}))
    words = shlex.split(train_command(Namespace(**vars(args), distributed=False), str(tmp_path)))
    again = parse_args(words[words.index('--config'):])
    assert (again.dataset, again.data_dir, again.val_split) == (args.dataset, args.data_dir, args.val_split)


@pytest.mark.parametrize('dataset, data_dir, val_split', [
    ('wds/x', PIPE, 'validation'), ('wds/x', '.', f'{PIPE}.tar|1'), ('hfds/user/x', None, 'validation'),
    ('wds/x', 'http://example.org', 'validation'), ('tfds/a:b', None, 'test'), ('other/x', None, 'validation')])
@pytest.mark.parametrize('beside', [False, True])
def test_a_checkpoint_cannot_choose_a_dataset_that_runs_code(
        script, image_folder, capsys, dataset, data_dir, val_split, beside):
    values = dict(model='test_resnet', num_classes=3, dataset=dataset, data_dir=data_dir, val_split=val_split)
    weights = timm.create_model('test_resnet', num_classes=3).state_dict()
    torch.save(dict(state_dict=weights, **({} if beside else dict(args=values))), 'model.pth.tar')
    if beside:
        (script.folder / 'args.yaml').write_text(yaml.safe_dump(values))
    assert evaluate.main(['model.pth.tar', '--parts', '--output', 'out']) == 2
    err = capsys.readouterr().err
    assert 'give --dataset and --data-dir' in err.splitlines()[-1] and 'Traceback' not in err
    assert not (script.folder / 'stolen').exists()
    if data_dir == '.':  # once
        assert evaluate.main(['model.pth.tar', '--parts', '--output', 'out', '--data-dir', str(image_folder)]) == 0


def test_what_runs_code():
    assert not code_danger('', 'anything') and not code_danger('torch/mnist') and not code_danger('demo/digits')
    assert code_danger('wds/x') and code_danger('wds/x', 'file:x') and code_danger('hfds/x', trust_remote_code=True)


WRONG_SPLITS = {
    'training': (dict(train_split='trainn'), '--train-split trainn'),
    'validation': (dict(val_split='vall'), '--val-split vall'),
    'test': (dict(val_split='test'), '--val-split test'),
    'slice': (dict(train_split='train[:90%]'), 'slices'),
    'calibration': (dict(calibrate='held'), "'held'"),
    'embedded': (dict(data_dir='', dataset='demo/digits', val_split='vall'), 'validation'),
    'of torchvision': (dict(data_dir='data', dataset='torch/cifar10', train_split='trainn'), '--train-split trainn'),
    'folder of torchvision': (dict(dataset='torch/image_folder', train_split='trainn'), '--train-split trainn'),
}


@pytest.mark.parametrize('options, word', WRONG_SPLITS.values(), ids=WRONG_SPLITS)
def test_splits_that_do_not_exist_are_refused(script, image_folder, options, word):
    argv = [part for name, value in options.items() if value
            for part in (f'--{name.replace("_", "-")}', value)]
    folder = [] if 'data_dir' in options else ['--data-dir', image_folder]
    assert script(*folder, '--model', 'test_resnet', '--img-size', '32', *argv) == 2
    assert script.lines[-1].startswith('ERROR') and word in script.lines[-1], script.text
    assert script.written() == []


def test_evaluated_split_that_does_not_exist(script, image_folder, capsys):
    torch.save(dict(
        state_dict=timm.create_model('test_resnet', num_classes=3).state_dict(),
        args=dict(model='test_resnet', num_classes=3, data_dir=str(image_folder), dataset='')), 'model.pth.tar')
    for argv in (['--split', 'vall'], ['--calibration-split', 'held'], ['--ood', f'{image_folder}@vall']):
        assert evaluate.main(['model.pth.tar', *argv, '--output', 'out', '-j', '0']) == 2
        assert 'there is no split' in capsys.readouterr().err.splitlines()[-1]


def test_synonyms_and_folders_without_splits(tmp_path):
    make_images(tmp_path / 'flat')
    make_images(tmp_path / 'named' / 'val')
    for root, split in (('flat', 'train'), ('flat', 'validation'), ('named', 'validation'), ('named', 'valid')):
        assert len(create_dataset('', root=str(tmp_path / root), split=split)) == 24
    for split in ('training', 'val', 'test'):
        with pytest.raises(ValueError, match='a, b, c'):
            check_split('', str(tmp_path / 'flat'), split)


def test_validation_on_the_training_split_is_named(script, image_folder):
    assert script.train(image_folder, '--dry-run', val_split='train') == 0
    line = next(line for line in script.lines if 'uses the training images' in line)
    assert '--val-split train' in line and ' has no ' not in line


def test_training_on_the_validation_images_is_refused(script, tmp_path):
    make_images(tmp_path / 'data' / 'validation')
    assert script.train(tmp_path / 'data') == 2
    assert 'has no folder train' in script.lines[-1] and script.written() == []


@pytest.mark.parametrize('argv', [[], ['--dataset', 'torch/image_folder'], ['demo']])
def test_multi_label_task_on_classes_is_refused(script, image_folder, argv):
    argv = ['--dataset', 'demo/digits'] if argv == ['demo'] else ['--data-dir', image_folder, *argv]
    assert script(*argv, '--task', 'multilabel', '--num-classes', '10', '--model', 'test_resnet', '--workers', '0') == 2
    assert 'must be a 1-D sequence of class indices' in script.lines[-1] and 'Traceback' not in script.text
    assert script.written() == []


@pytest.mark.parametrize('model, size, count', [
    ('test_resnet', 32, 1), ('test_resnet', 64, 4), ('test_resnet', 128, 16), ('test_vit', 32, 4)])
def test_number_of_positions(script, image_folder, model, size, count):
    options = dict(model=model, multimix='dense', img_size=size, val_split='')
    if size == 64:  # also before MultiMix begins
        options.update(multimix_start_epoch=1, epochs=2)
    assert script.train(image_folder, '--dry-run', **options) == 0
    assert f'at {size} x {size} pixels: {count}.' in script.text
    assert ('a single position' in script.text) == (count == 1)
    assert script.train(image_folder, '--dry-run', multimix='pooled') == 0 and 'positions' not in script.text


def test_an_archive_has_no_splits(script, tmp_path):
    root = make_images(tmp_path / 'images', count=4)
    archive = tmp_path / 'images.tar'
    with tarfile.open(archive, 'w') as file:
        file.add(root, arcname='.')
    assert script.train(archive, '--train-split', 'foo') == 2 and 'a single file without splits' in script.lines[-1]
    assert script.train(archive, '--dry-run') == 0, script.text
    assert 'images.tar has no validation split, so validation uses the training images' in script.text


def test_multi_hot_targets_of_a_folder_are_refused(script, image_folder):
    argv = ['--task', 'multilabel', '--num-classes', '3', '--target-format', 'multihot']
    assert script.train(image_folder, *argv) == 2 and 'an image folder has one class for each image' in script.lines[-1]
