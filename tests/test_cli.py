"""The command timm-multimix: help, exit statuses, recipes, --dry-run, calibrate, and commands in hints."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_helpers import make_images

from timm_multimix.cli import main

pytest_plugins = ['training_helpers']

COMMANDS = ('train', 'evaluate', 'detect', 'calibrate', 'hub', 'patch', 'recipes')
SCRIPT = Path(__file__).parent.parent / 'train_timm.py'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Folder on the PATH with python, and timm-multimix as pip installs it."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    (folder / 'timm-multimix').write_text(
        f'#!{sys.executable}\nimport sys\nfrom timm_multimix.cli import main\nsys.exit(main())\n')
    (folder / 'timm-multimix').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{Path(sys.executable).parent}:/usr/bin:/bin')
    monkeypatch.setenv('PYTHONPATH', str(SCRIPT.parent))
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)


def test_help_describes_every_command_and_imports_little(programs, tmp_path):
    code = ("import sys; from timm_multimix.cli import main\ntry: main(['--help'])\nfinally: "
            "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)")
    outcome = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert not {'torch', 'timm', 'numpy', 'huggingface_hub', 'yaml'} & set(outcome.stderr.split())
    lines = outcome.stdout.splitlines()
    for command in COMMANDS:
        assert any(line.startswith(f'  {command} ') for line in lines)
        assert any(f'timm_multimix {command} ' in line or f'timm-multimix {command} ' in line for line in lines)


@pytest.mark.parametrize(('argv', 'status', 'text'), [
    (['trian'], 2, 'Did you mean train?'),
    ([], 2, 'commands:'),
    (['hub', 'card', 'missing'], 2, 'no such folder'),
    (['train', '--lr', 'high'], 2, '--lr'),
    (['calibrate', 'missing'], 2, 'missing is not the folder of a finished run'),
    (['train', '--config', 'digit_resnet18'], 2, 'Did you mean digits_resnet18'),
    (['train', '--config', 'hfconfigs/digits_resnet18.yaml'], 2, 'Did you mean digits_resnet18'),
    (['recipes', 'show', 'digits_resnet81'], 2, 'Did you mean digits_resnet18'),
])
def test_exit_status_and_message(script, argv, status, text):
    assert main(argv) == status
    assert text in script.capsys.readouterr().err


def test_version(capsys):
    from timm_multimix import __version__
    with pytest.raises(SystemExit, match='0'):
        main(['--version'])
    assert capsys.readouterr().out == f'timm-multimix {__version__}\n'


def test_recipes(capsys):
    assert main(['recipes', 'list']) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(path.stem for path in (SCRIPT.parent / 'hfconfigs').glob('*.yaml'))
    assert main(['recipes', 'show', names[-1]]) == 0
    assert capsys.readouterr().out == (SCRIPT.parent / 'hfconfigs' / f'{names[-1]}.yaml').read_text()


def test_dry_run_of_a_recipe_prints_it_and_writes_nothing(script):
    options = ['--config', 'digits_resnet18', '--model', 'test_resnet', '--dry-run']
    assert main(['train', *options]) == 0
    output = script.capsys.readouterr()
    assert 'Number of positions of dense MultiMix at 64 x 64 pixels: 4.' in output.err
    assert script.written() == []
    recipe = yaml.safe_load(output.out)
    assert recipe['dataset'] == 'demo/digits' and recipe['model'] == 'test_resnet' and 'dry_run' not in recipe
    # A file takes precedence over a recipe of the same name, and the printed recipe is one.
    (script.folder / 'digits_resnet18').write_text(output.out)
    assert main(['train', '--config', 'digits_resnet18', '--epochs', '3', '--dry-run']) == 0
    assert yaml.safe_load(script.capsys.readouterr().out) == recipe | dict(epochs=3)


def test_dry_run_continues_no_run(script, image_folder):
    assert script.train(image_folder) == 0
    before = {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')}
    assert script.train(image_folder, '--dry-run', epochs=2, resume='auto') == 0
    assert 'with epoch 1' in script.text
    assert {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')} == before
    assert script.train(image_folder, '--dry-run') == 2  # the folder contains a run


def temperature(script) -> float:
    return torch.load(script.run_folder() / 'model_calibrated.pth.tar', weights_only=True)['temperature']


def test_calibrate_fits_on_what_the_run_held_out(script, image_folder):
    assert script.train(image_folder, '--calibrate', '0.5', epochs=2, lr=0.1) == 0
    path = script.run_folder() / 'model_calibrated.pth.tar'
    first = torch.load(path, weights_only=True)
    path.unlink()
    assert main(['calibrate', str(script.run_folder())]) == 0
    text = script.capsys.readouterr().err
    assert f'evaluate {script.run_folder()}' in text and '12 of 24 training images' in text
    again = torch.load(path, weights_only=True)
    assert again['temperature'] == pytest.approx(first['temperature'], rel=1e-4)
    assert list(again) == list(first) and again['eval_weights'] == first['eval_weights']
    best = torch.load(script.run_folder() / 'model_best.pth.tar', weights_only=True)
    del best['state_dict']['fc.bias']
    torch.save(best, script.run_folder() / 'model_best.pth.tar')
    assert main(['calibrate', str(script.run_folder())]) == 2
    assert script.capsys.readouterr().err.splitlines()[-1].startswith('ERROR: ')


def test_interrupt_while_modules_are_imported(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr('timm_multimix.cli.import_module', interrupted)
    assert main(['train']) == 130


def test_calibrate_on_other_images_but_not_on_those_of_training(script, image_folder, tmp_path):
    root = tmp_path / 'images'
    shutil.copytree(image_folder, root)
    assert script.train(root, epochs=2, lr=0.1) == 0
    folder, calibrated = str(script.run_folder()), script.run_folder() / 'model_calibrated.pth.tar'
    for data in (['--split', 'train'], ['--data-dir', str(root), '--split', 'train']):
        assert main(['calibrate', folder, *data]) == 2
        assert 'these are the images of --train-split' in script.capsys.readouterr().err and not calibrated.exists()
    assert main(['calibrate', folder, '--split', '0.5']) == 2  # this run held out nothing
    assert 'must be the name of a split' in script.capsys.readouterr().err
    assert main(['calibrate', folder]) == 0
    told = script.capsys.readouterr().err
    assert 'The split validation has selected the best checkpoint' in told and told.endswith('--split SPLIT\n')
    first = temperature(script)
    make_images(root / 'extra', count=5)
    assert main(['calibrate', folder, '--split', 'extra']) == 0
    assert '--split SPLIT' not in script.capsys.readouterr().err
    own = temperature(script)
    shutil.move(root / 'extra', tmp_path / 'others' / 'validation')
    shutil.rmtree(root)  # the training images are on another machine
    assert main(['calibrate', folder, '--data-dir', str(tmp_path / 'others')]) == 0
    assert 'selected' not in script.capsys.readouterr().err
    assert temperature(script) == own != first
    make_images(tmp_path / 'unknown' / 'validation', count=2)
    (tmp_path / 'unknown' / 'validation' / 'a').rename(tmp_path / 'unknown' / 'validation' / 'z')
    assert main(['calibrate', folder, '--data-dir', str(tmp_path / 'unknown')]) == 2
    assert 'different classes' in script.capsys.readouterr().err


@pytest.mark.parametrize(('start', 'shown'), [
    ('timm-multimix train', 'timm-multimix train'),
    pytest.param('python -m timm_multimix train', 'python -m timm_multimix train', marks=pytest.mark.slow),
    pytest.param(f'python {SCRIPT}', 'python {script}', marks=pytest.mark.slow),
    pytest.param('torchrun --nproc-per-node 2 -m timm_multimix train --device cpu',
                 'torchrun --nproc-per-node 2 -m timm_multimix train', marks=pytest.mark.slow),
])
def test_hints_use_the_command_that_was_started_and_work(programs, tmp_path, image_folder, start, shown):
    options = (f'--data-dir {image_folder} --model test_resnet --img-size 32 -b 8 --epochs 1 --workers 0 '
               '--experiment run --multimix dense --multimix-n 20')
    outcome = shell(f'{start} {options}', tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    hint = outcome.stderr.splitlines()[-1].strip()
    assert hint.startswith(shown.format(script=os.path.relpath(SCRIPT, tmp_path)) + ' --config ')
    again = shell(hint, tmp_path)
    assert again.returncode == 0 and 'top1' in again.stderr.splitlines()[-1], again.stderr


@pytest.mark.parametrize(('start', 'shown'), [
    ('timm-multimix recipes', 'timm-multimix recipes'),
    ('python -m timm_multimix recipes', 'python -m timm_multimix recipes'),
    pytest.param('timm-multimix hub', 'timm-multimix hub', marks=pytest.mark.slow),
    pytest.param('python -m timm_multimix.hub', 'python -m timm_multimix.hub', marks=pytest.mark.slow),
])
def test_usage_names_the_command_that_was_started(programs, tmp_path, start, shown):
    usage = shell(f'{start} --help', tmp_path).stdout
    assert ' '.join(usage.split()).startswith(f'usage: {shown} ')
