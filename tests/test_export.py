"""Test the export of runs to folders: channels, file modes, and the commands."""
import json
import os
import runpy
import stat
import sys

import pytest
import timm
import torch
from hub_helpers import logits
from PIL import Image

from timm_multimix.hub.command import main as hub_command

pytest_plugins = ['training_helpers', 'hub_helpers']


@pytest.fixture(scope='module')
def images_of_modes(tmp_path_factory):
    """Write image folders by PIL mode, with a few images each."""
    folders = {}
    for mode in ('L', 'RGB', 'RGBA'):
        root = folders[mode] = tmp_path_factory.mktemp(mode)
        for split in ('train', 'validation'):
            for value, name in enumerate('abc'):
                (root / split / name).mkdir(parents=True)
                Image.new(mode, (32, 32), (40 * value,) * len(mode) if len(mode) > 1 else 40 * value).save(
                    root / split / name / '0.png')
    return folders


@pytest.mark.parametrize('channels, mode, options', [
    (1, 'L', dict(mean=0.2, std=0.3)),
    (4, 'RGBA', dict(input_img_mode='RGBA')),
    (3, 'RGB', dict(model='test_vit', mean=0.2)),
])
def test_channels(server, script, images_of_modes, tmp_path, channels, mode, options):
    assert script.train(images_of_modes[mode], '--push-to-hub', hub_model_id='user/model', hub_strategy='end',
                        batch_size=3, in_chans=channels, **options) == 0, script.text
    assert 'using avg value' not in script.text
    config = json.loads((script.run_folder() / 'config.json').read_text())['pretrained_cfg']
    assert config['input_size'] == [channels, 32, 32]
    assert config['mean'] == pytest.approx([options.get('mean', 0.5)] * channels)
    assert config['std'] == pytest.approx([options.get('std', 0.5)] * channels)
    assert f'| input | {channels} x 32 x 32 |' in server.file('user/model', 'README.md').decode()

    (script.run_folder() / 'config.json').unlink()  # as in the folder of a run of timm's own script
    assert hub_command(['export', str(script.run_folder()), str(tmp_path / 'model')]) == 0
    exported = json.loads((tmp_path / 'model' / 'config.json').read_text())['pretrained_cfg']
    assert {name: exported[name] for name in ('input_size', 'mean', 'std')} == {
        name: config[name] for name in ('input_size', 'mean', 'std')}
    model = timm.create_model(options.get('model', 'test_resnet'), num_classes=3, in_chans=channels, img_size=32) \
        if options.get('model') else timm.create_model('test_resnet', num_classes=3, in_chans=channels)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict'])
    for name in (f'local-dir:{tmp_path / "model"}', 'hf-hub:user/model'):
        loaded = timm.create_model(name, pretrained=True)
        assert torch.equal(logits(loaded, 32, channels), logits(model, 32, channels))


@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_modes_of_files(server, script, images_of_modes, tmp_path, umask):
    """All files have the default mode of a new file."""
    previous = os.umask(umask)
    try:
        assert script.train(images_of_modes['RGB'], '--save-images', epochs=2, batch_size=3, save_epochs=1,
                            recovery_interval=1) == 0
        assert hub_command(['export', str(script.run_folder()), str(tmp_path / 'new' / 'model')]) == 0
    finally:
        os.umask(previous)
    exported = list((tmp_path / 'new' / 'model').iterdir())
    assert {path.name for path in exported} == {'model.safetensors', 'config.json', 'README.md', 'training_curve.png'}
    files = [*exported, *script.run_folder().iterdir()]
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files}
    folders = [tmp_path / 'new', tmp_path / 'new' / 'model', script.run_folder()]
    assert {oct(stat.S_IMODE(folder.stat().st_mode)) for folder in folders} == {oct(0o777 & ~umask)}


def test_model_that_timm_cannot_describe_is_reported(script, images_of_modes):
    assert script.train(images_of_modes['RGB'], '--torchscript', batch_size=3) == 0, script.text
    assert 'config.json was not written. This run cannot be exported or pushed: ' in script.text


def test_import_of_the_command_does_nothing():
    runpy.run_module('timm_multimix.hub.__main__', run_name='imported')


@pytest.mark.filterwarnings('ignore:.*found in sys.modules:RuntimeWarning')
@pytest.mark.parametrize('module', [
    'timm_multimix.training.main', 'timm_multimix.hub', 'timm_multimix.evaluate',
    'timm_multimix.evaluation.main'])
def test_modules_run_as_programs(script, monkeypatch, module):
    """Run `python -m MODULE`."""
    monkeypatch.setattr(sys, 'argv', [module, '--nonsense'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name='__main__')
    assert stop.value.code == 2 and 'ERROR' in script.capsys.readouterr().err
