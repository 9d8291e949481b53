"""Run folders of version 0.1, in tests/data: the present code resumes, validates and evaluates them."""
import json
import shutil
from pathlib import Path

import pytest

from timm_multimix.evaluation.main import main as evaluate
from timm_multimix.hub.export import export

pytest_plugins = ['training_helpers']

RUNS = Path(__file__).parent / 'data' / 'checkpoints_0.1'
CHECKPOINTS = sorted(path.relative_to(RUNS) for path in RUNS.glob('*/*.pth.tar'))
NUM_EPOCHS = dict(ema=3, teacher=3, calibrated=12, recovery=2)


def test_all_kinds_of_checkpoints_are_there():
    assert {path.parent.name for path in CHECKPOINTS} == set(NUM_EPOCHS)
    assert {path.name for path in CHECKPOINTS} == {
        f'{name}.pth.tar' for name in ('last', 'model_best', 'model_calibrated', 'recovery-1-1')}


@pytest.mark.parametrize('name', NUM_EPOCHS)
def test_run_continues(script, image_folder, name):
    shutil.copytree(RUNS / name, script.run_folder(name))
    before = script.checkpoint(name=name)
    argv = ['--config', RUNS / name / 'args.yaml', '--data-dir', image_folder]
    assert script(*argv, '--stop-epoch', NUM_EPOCHS[name], '--resume', 'auto') == 0, script.text
    newest = 'recovery-1-1' if name == 'recovery' else 'last'
    assert f'Continuing from output/train/{name}/{newest}.pth.tar' in script.text
    for words in ('random state', 'uninterrupted run', 'begins again', 'is lost'):
        assert words not in script.text
    assert [int(row['epoch']) for row in script.summary(name)] == [*range(NUM_EPOCHS[name])]
    after = script.checkpoint(name=name)
    assert after['epoch'] == NUM_EPOCHS[name] - 1
    assert {entry for entry in after if entry.startswith('state_dict')} == {
        entry for entry in before if entry.startswith('state_dict')}


@pytest.mark.parametrize('path', CHECKPOINTS, ids=str)
def test_checkpoint_is_validated(script, image_folder, path):
    config = RUNS / path.parent / 'args.yaml'
    assert script('--config', config, '--data-dir', image_folder, '--validate', RUNS / path) == 0, script.text
    assert f'{path}: loss ' in script.lines[-1]


def test_checkpoints_are_evaluated(tmp_path, image_folder, capsys):
    argv = [*(RUNS / path for path in CHECKPOINTS), '--data-dir', image_folder, '--device', 'cpu', '--workers', 0,
            '--output', tmp_path / 'report', '--parts']
    assert evaluate([str(part) for part in argv]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / 'report' / 'results.json').read_text())
    assert len(results['models']) == len(CHECKPOINTS)


@pytest.mark.parametrize('name', NUM_EPOCHS)
def test_run_is_exported(tmp_path, name):
    export(str(RUNS / name), str(tmp_path), 'user/name')
    assert (tmp_path / 'model.safetensors').stat().st_size > 50_000
