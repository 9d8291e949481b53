"""The wheel in a fresh environment: every command in an empty folder."""
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from hub_helpers import TOKEN
from hub_server import User, serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAIN = '--model test_resnet --img-size 32 --epochs 1 --multimix dense --multimix-n 50 -b 128 --experiment run'


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """Folder with the source archive and the wheel that is built from it."""
    pytest.importorskip('build')
    folder = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, ROOT], check=True)
    return folder


@pytest.fixture(scope='module')
def run(distributions, tmp_path_factory):
    """Function that runs a command line of the installed wheel in an empty folder."""
    home = tmp_path_factory.mktemp('installed')
    environment = home / 'environment'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', environment], check=True)
    wheel, = distributions.glob('*.whl')
    own = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run([
        sys.executable, '-m', 'pip', '--python', environment / 'bin' / 'python', 'install', '--no-deps', '--no-index',
        wheel], check=True, env=own)
    version = f'python{sys.version_info.major}.{sys.version_info.minor}'
    (environment / 'lib' / version / 'site-packages' / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
    (home / 'work').mkdir()

    def run(command: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
        outcome = subprocess.run(
            command, shell=True, cwd=home / 'work', capture_output=True, text=True,
            env={**own, 'PATH': f'{environment / "bin"}:/usr/bin:/bin', **variables})
        assert outcome.returncode == status, outcome.stderr
        return outcome

    run.folder = home / 'work'
    return run


def test_contents(distributions):
    archive, = distributions.glob('*.tar.gz')
    with tarfile.open(archive) as files:
        names = {name.partition('/')[2] for name in files.getnames()}
    assert {'LICENSE', 'CHANGELOG.md', 'CITATION.cff', 'train_timm.py', 'hfconfigs/digits_resnet18.yaml',
            'tests/conftest.py', 'tests/test_losses.py', 'timm_multimix/py.typed'} <= names
    assert not [name for name in names if name.endswith('.pyc')]


def test_every_command_in_an_empty_folder(run):
    location = run('python -c "import timm_multimix; print(timm_multimix.__file__)"').stdout
    assert '/environment/' in location
    assert 'digits_resnet18 ' in run('timm-multimix recipes list').stdout
    assert 'dataset: demo/digits' in run('timm-multimix train --config digits_resnet18 --dry-run').stdout
    assert list(run.folder.iterdir()) == []
    trained = run(f'timm-multimix train {TRAIN}').stderr
    assert 'training on demo/digits' in trained
    validate = trained.splitlines()[-1].strip()
    assert validate.startswith('timm-multimix train --config ') and 'top1' in run(validate).stderr
    assert 'with epoch 1' in run(f'timm-multimix train {TRAIN} --epochs 2 --resume auto').stderr
    assert 'temperature' in run('timm-multimix calibrate output/train/run').stderr
    evaluated = run('timm-multimix evaluate output/train/run --max-images 64 --parts --ood').stdout
    assert 'accuracy' in evaluated.lower()
    run('timm-multimix hub export output/train/run model')
    assert {'config.json', 'model.safetensors', 'README.md'} <= {path.name for path in (run.folder / 'model').iterdir()}
    assert 'usage: timm-multimix detect ' in run('timm-multimix detect --help').stdout
    assert 'Did you mean detect?' in run('timm-multimix detekt', 2).stderr


def test_push(run, tmp_path):
    with serve() as server:
        server.tokens = {TOKEN: User('user')}
        variables = dict(HF_ENDPOINT=server.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET='1')
        if not (run.folder / 'output').exists():
            run(f'timm-multimix train {TRAIN}')
        run('timm-multimix hub push output/train/run user/model', **variables)
        card = server.repos['user/model'].head().files['README.md'].content.decode()
    assert '`timm-multimix train --config recipe.yaml`' in card
