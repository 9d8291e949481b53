"""Symbolic links that others planted in a run folder: no file outside it is read or changed through them."""
import json
import os

import pytest
from training_helpers import make_images

from timm_multimix.common.files import create, duplicate, replacing
from timm_multimix.hub.command import main as hub_command

pytest_plugins = ['training_helpers']

NAMES = (
    'args.yaml', 'config.json', 'summary.csv', 'tmp.pth.tar', 'recovery_tmp.pth.tar', 'last.pth.tar',
    'checkpoint-0.pth.tar', 'model_best.pth.tar', 'milestone-1.pth.tar', 'recovery-0-0.pth.tar', 'recovery-0-1.pth.tar',
    'model_calibrated.pth.tar', 'train-batch-0.jpg')
TEMPORARY = tuple(f'{name}.tmp' for name in NAMES)


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    root = tmp_path_factory.mktemp('few')
    make_images(root / 'train', count=4)
    make_images(root / 'validation', count=1)
    return root


def plant(folder, target, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(target, folder / name)


@pytest.mark.parametrize('exists', [True, False], ids=['to a file', 'to no file'])
def test_links_are_replaced(script, few_images, tmp_path, exists):
    secret = tmp_path / 'secret'
    if exists:
        secret.write_text('{"precious": 1}')
    folder = script.run_folder()
    # Names of checkpoints stand for a run that is there already.
    plant(folder, secret, [name for name in NAMES + TEMPORARY if not name.endswith('.pth.tar') or 'tmp' in name])
    assert script.train(few_images, '--save-images', epochs=1, recovery_interval=1, log_interval=1, save_epochs=1,
                        calibrate=0.25, checkpoint_hist=2) == 0, script.text
    assert not secret.exists() or secret.read_text() == '{"precious": 1}'
    assert not [path.name for path in folder.iterdir() if path.is_symlink()]
    written = {path.name for path in folder.iterdir()}
    assert {'args.yaml', 'config.json', 'summary.csv', 'last.pth.tar', 'train-batch-0.jpg'} <= written
    assert 'precious' not in (folder / 'summary.csv').read_text() and len(script.summary()) == 1


def test_lock_that_is_a_link_is_refused(script, few_images, tmp_path):
    secret = tmp_path / 'secret'
    for content in ('precious', None):
        secret.unlink(missing_ok=True)
        if content:
            secret.write_text(content)
        (script.run_folder() / '.lock').unlink(missing_ok=True)
        plant(script.run_folder(), secret, ['.lock'])
        assert script.train(few_images) == 2
        assert '.lock is a link to another file. Remove it.' in script.lines[-1]
        assert secret.read_text() == content if content else not secret.exists()


def test_lock_with_a_second_name_is_refused(script, few_images, tmp_path):
    secret = tmp_path / 'secret'
    secret.write_text('precious')
    script.run_folder().mkdir(parents=True)
    os.link(secret, script.run_folder() / '.lock')
    assert script.train(few_images) == 2
    assert '.lock is a link to another file. Remove it.' in script.lines[-1]
    assert secret.read_text() == 'precious'


@pytest.mark.parametrize('link', ['path', 'temporary'])
def test_helpers_do_not_follow_links(tmp_path, link):
    secret, source = tmp_path / 'secret', tmp_path / 'source'

    def planted(name):
        secret.write_text('precious')
        path = tmp_path / name
        os.symlink(secret, path if link == 'path' else f'{path}.tmp')
        return path

    with create(str(planted('created'))) as file:
        file.write(b'new')
    with replacing(str(planted('replaced'))) as temporary:
        assert not os.path.lexists(temporary)  # nothing is copied through the link
        with open(temporary, 'w') as file:
            file.write('new')
    source.write_text('new')
    duplicate(str(source), str(planted('duplicated')))
    assert secret.read_text() == 'precious'
    for name in ('created', 'replaced', 'duplicated'):
        assert (tmp_path / name).read_text() == 'new' and not (tmp_path / name).is_symlink()


def test_exports_do_not_follow_links(script, few_images, tmp_path):
    assert script.train(few_images) == 0
    secret = tmp_path / 'secret'
    secret.write_text('{"precious": 1}')
    (script.run_folder() / 'config.json').unlink()
    os.symlink(secret, script.run_folder() / 'config.json')
    assert hub_command(['export', str(script.run_folder()), str(tmp_path / 'model')]) == 0
    assert json.loads((tmp_path / 'model' / 'config.json').read_text())['architecture'] == 'test_resnet'

    (tmp_path / 'elsewhere').mkdir()
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'link')
    assert hub_command(['export', str(script.run_folder()), str(tmp_path / 'link')]) == 2
    assert 'already exists' in script.capsys.readouterr().err and not list((tmp_path / 'elsewhere').iterdir())
