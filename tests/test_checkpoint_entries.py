"""Invalid files are reported in one line: entries of checkpoints, weights and summaries."""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from timm_multimix.build.checkpoint import read_checkpoint
from timm_multimix.common.errors import UsageError
from timm_multimix.evaluation.main import main as evaluate
from timm_multimix.hub.command import main as hub
from timm_multimix.training.checkpoints import newest_checkpoint

pytest_plugins = ['training_helpers']

RUN = Path(__file__).parent / 'data' / 'checkpoints_0.1' / 'teacher'

# Paths into a checkpoint, and invalid values. ... removes the entry.
WRONG = [
    ('epoch', 'one'), ('epoch', 1.5), ('epoch', -7), ('arch', 3), ('args', [1, 2]), ('args/model', 7),
    ('args/opt', None), ('args/opt_kwargs', 'x'), ('args/lr', 'fast'), ('args/opt_betas', {}), ('version', 'two'),
    ('state_dict', []), ('state_dict', {'conv1.weight': 3}), ('state_dict', {3: torch.ones(2)}),
    ('state_dict_ema', None), ('state_dict_teacher', [torch.ones(2)]), ('task_state', 7),
    ('task_state', {'teacher': 3}), ('optimizer', {}), ('optimizer/state', []), ('optimizer/param_groups', [3]),
    ('saver', {}), ('saver', 'x'), ('progress', {'epoch': 1}), ('progress/in_epoch', 'x'),
    ('progress/consumed', -3), ('progress/processes', [3]), ('progress/shape', {'workers': 'x'}),
    ('progress/processes/0/random', {}), ('progress/processes/0/random/torch', b'x'),
    ('progress/processes/0/random/python', (1, 2)),
    ('progress/processes/0/random/numpy', ('MT19937', b'x', 1, 0, 0.0)),
    ('progress/processes/0/loader/now', {}),
    ('progress/processes/0/loader/workers', [3]), ('progress/processes/0/statistics', {'a': 3}),
    ('progress/average', 'x'), ('progress/scheduler', 'x'), ('metric', 'x'), ('metric_of', 'args'),
    ('eval_weights', 'state_dict'), ('metrics', {'state_dict': 3}), ('class_to_idx', {'a': 'b'}),
]


def spoil(target: Path, place: str, value) -> Path:
    state = torch.load(RUN / 'last.pth.tar', weights_only=True)
    *way, last = [int(part) if part.isdigit() else part for part in place.split('/')]
    inner = state
    for part in way:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, target)
    return target


@pytest.fixture
def resume(script, image_folder):
    def run(*argv):
        return script('--config', RUN / 'args.yaml', '--data-dir', image_folder, '--stop-epoch', 3, *argv)
    return run


@pytest.mark.parametrize('place, value', WRONG, ids=lambda value: str(value)[:30])
def test_wrong_entry_ends_in_one_line(script, resume, tmp_path, place, value):
    path = spoil(tmp_path / 'x.pth.tar', place, value)
    try:
        read_checkpoint(str(path))  # as all commands do
    except UsageError as error:
        assert 'x.pth.tar is not a training checkpoint: its' in str(error)
        return
    assert resume('--resume', path, '--experiment', 'other') == 2, script.text
    assert script.lines[-1].startswith('ERROR') and 'x.pth.tar' in script.lines[-1], script.text
    assert 'Traceback' not in script.text and script.written() == []


@pytest.mark.parametrize('place, value', [
    ('epoch', 'one'), ('args/lr', 'fast'), ('saver', {}), ('progress/consumed', 'x'), ('metric_of', 'args'),
    ('metrics', 3), ('state_dict', {'conv1.weight': 3}), ('args/val_split', 3), ('args/card', {'tags': 3}),
    ('args/num_classes', 'x'), ('args/mean', 'x'), ('args', {3: 4, 'model': 'test_resnet'}), ('temperature', 'x'),
    ('weights_of', 'epoch')])
def test_wrong_entry_in_other_commands(script, image_folder, tmp_path, capsys, place, value):
    folder = tmp_path / 'teacher'
    shutil.copytree(RUN, folder)
    (folder / 'model_best.pth.tar').unlink()
    path = spoil(folder / 'last.pth.tar', place, value)
    common = ['--config', RUN / 'args.yaml', '--data-dir', image_folder]
    if not place.startswith('args/') or place == 'args/lr':
        assert script(*common, '--validate', path) == 2, script.text
        assert script.lines[-1].startswith('ERROR') and 'Traceback' not in script.text
        assert script(*common, '--output', tmp_path, '--resume', 'auto') == 2, script.text
        assert script.lines[-1].startswith('ERROR') and 'none of the 1 checkpoints' in script.lines[-1]
        assert 'last.pth.tar is not a training checkpoint' in script.text
    for command in (
            [evaluate, path, '--data-dir', image_folder, '--device', 'cpu', '--output', tmp_path / 'out', '--parts'],
            [hub, 'export', folder, tmp_path / 'model']):
        status = command[0]([str(part) for part in command[1:]])
        text = capsys.readouterr().err
        assert status in (0, 2) and 'Traceback' not in text, text
        assert status == 2 or place == 'args/card' or 'val_split' in place, text


def test_other_checkpoints_are_selected_instead(tmp_path, caplog):
    shutil.copytree(RUN, tmp_path / 'run')
    spoil(tmp_path / 'run' / 'last.pth.tar', 'saver', {})
    assert newest_checkpoint(str(tmp_path / 'run')) == str(tmp_path / 'run' / 'model_best.pth.tar')
    assert 'its entry saver is invalid' in caplog.text


@pytest.mark.parametrize('state', [
    {'model': {'a': torch.ones(1)}}, {'state_dict': {'x._extra_state': {}}, 'model': 'resnet'},
    {'state_dict': {}, 'epoch': None, 'saver': None, 'progress': None, 'metric': None, 'args': None},
    {'state_dict': {}, 'epoch': 3, 'optimizer': {'state': {}, 'param_groups': []}, 'unknown': object}])
def test_checkpoints_of_others_are_read(tmp_path, state):
    state = {name: value for name, value in state.items() if value is not object}
    torch.save(state, tmp_path / 'x.pth.tar')
    assert read_checkpoint(str(tmp_path / 'x.pth.tar')).keys() == state.keys()


@pytest.mark.parametrize('content', [b'noise' * 10, b'\x08\0\0\0\0\0\0\0{"a":3}x'])
@pytest.mark.parametrize('argv', [
    ['--initial-checkpoint'], ['--resume'], ['--pretrained', '--pretrained-path'], ['--validate'],
    ['--multimix', 'dense', '--multimix-teacher', 'test_resnet', '--multimix-teacher-path']],
    ids=lambda argv: argv[-1])
def test_invalid_safetensors(script, image_folder, content, argv):
    path = script.folder / 'x.safetensors'
    path.write_bytes(content)
    assert script.train(image_folder, *argv, path) == 2, script.text
    assert script.lines[-1].startswith('ERROR') and 'Traceback' not in script.text
    assert 'x.safetensors' in script.lines[-1]
    assert script.written() == ['x.safetensors']


def test_safetensors_of_something_else(script, image_folder):
    path = script.folder / 'x.safetensors'
    save_file({'a': torch.ones(3)}, path)
    for option in ('resume', 'initial_checkpoint'):
        assert script.train(image_folder, **{option: path}) == 2, script.text
        assert 'x.safetensors' in script.lines[-1] and 'Traceback' not in script.text


SUMMARIES = {
    'UTF-16': 'epoch,train_loss\r\n0,1\r\n'.encode('utf-16'), 'Latin-1': 'epoch,comment\n0,schön\n'.encode('latin-1'),
    'noise': bytes(range(256)), 'a long field': b'epoch,x\n0,' + b'"' + b'x' * 200_000}


@pytest.mark.parametrize('name', SUMMARIES)
def test_summary_that_is_no_table(script, resume, tmp_path, capsys, name):
    folder = tmp_path / 'teacher'
    shutil.copytree(RUN, folder)
    (folder / 'summary.csv').write_bytes(SUMMARIES[name])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert resume('--output', tmp_path, '--resume', 'auto') == 2, script.text
    assert 'summary.csv is not a CSV file in UTF-8' in script.lines[-1] and 'Traceback' not in script.text
    (folder / '.lock').unlink()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert hub(['card', str(folder)]) == 2
    assert 'summary.csv is not a CSV file in UTF-8' in capsys.readouterr().err


def test_summary_with_a_byte_order_mark_continues(script, resume, tmp_path):
    """Spreadsheet programs write it."""
    folder = tmp_path / 'teacher'
    shutil.copytree(RUN, folder)
    text = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text('\ufeff' + text + '7,half-writ')
    assert resume('--output', tmp_path, '--resume', 'auto') == 0, script.text
    lines = (folder / 'summary.csv').read_text().splitlines()
    assert [line.partition(',')[0].lstrip('\ufeff') for line in lines] == ['epoch', '0', '1', '2']
    assert lines[1:3] == text.splitlines()[1:3]


@pytest.mark.parametrize('error, status, words', [
    (RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed.'), 1, 'DataLoader worker (pid 1) is killed'),
    (KeyboardInterrupt(), 130, 'Stopped in epoch 0')])
def test_signal_while_a_checkpoint_is_written(script, image_folder, monkeypatch, error, status, words):
    """PyTorch raises the error of a dead worker in a signal handler. The writer then cannot finish the file."""
    save, calls = torch.save, []

    class Interrupting:
        """A file that raises an exception in the middle of a write."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            if self.writes == 20:
                raise error
            return self.file.write(data)

    def interrupted(state, file):
        calls.append(file)
        save(state, file if len(calls) > 1 else Interrupting(file))
    monkeypatch.setattr(torch, 'save', interrupted)
    assert script.train(image_folder) == status, script.text
    assert words in script.text and 'disk is full' not in script.text and 'Traceback' not in script.text


@pytest.mark.parametrize('option, flags', [
    ('--no-multimix-balance', ['--no-multimix-balance']), ('--multimix-shared-weights', ['--multimix-shared-weights']),
    ('--multimix-prob', ['--multimix-prob', '0.5']), ('--multimix-n', ['--multimix-n', '7'])])
def test_changed_options_of_multimix_are_reported(script, image_folder, option, flags):
    argv = ['--config', RUN.parent / 'recovery' / 'args.yaml', '--data-dir', image_folder, '--stop-epoch', 2]
    assert script(*argv, '--experiment', 'first', '--stop-epoch', 1) == 0, script.text
    assert script(*argv, '--experiment', 'first', '--resume', 'auto', *flags) == 0, script.text
    assert any('another objective' in line and f'{option} was ' in line for line in script.lines), script.text


def test_changed_balance_of_an_earlier_version_is_reported(script, resume):
    assert resume('--resume', RUN / 'last.pth.tar', '--experiment', 'other', '--no-multimix-balance') == 0, script.text
    assert '--no-multimix-balance was False and is True' in script.text
