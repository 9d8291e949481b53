"""--report-to, with packages that record their calls."""
import json
import sys
from types import SimpleNamespace

import pytest

pytest_plugins = ['training_helpers']

RECORDER = """
import json

def _write(**event):
    with open(__name__ + '.jsonl', 'a') as file:
        file.write(json.dumps(event, default=str) + '\\n')

def init(**options):
    _write(init=options)

def log(row):
    _write(log=row)

def finish():
    _write(finish=True)
"""


class Writer:
    """Records events as TensorBoard does: events from purge_step on are discarded."""
    folders: dict

    def __init__(self, folder, purge_step):
        events = self.folders.setdefault(folder, [])
        events[:] = [event for event in events if event[2] < purge_step]
        self.events = events

    def add_scalar(self, *event):
        self.events.append(event)

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folder of packages that record their calls."""
    for name in ('wandb', 'trackio', 'tensorboard'):
        (tmp_path / 'packages' / name).mkdir(parents=True)
        (tmp_path / 'packages' / name / '__init__.py').write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / 'packages'))
    monkeypatch.setattr(Writer, 'folders', {}, raising=False)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=Writer))
    yield
    for name in ('wandb', 'trackio', 'tensorboard'):
        sys.modules.pop(name, None)


def _events(script, name):
    return [json.loads(line) for line in (script.folder / f'{name}.jsonl').read_text().splitlines()]


def test_all_trackers(script, image_folder, packages):
    options = ('--report-to', 'wandb', 'trackio', 'tensorboard', '--experiment', 'run', '--wandb-project', 'project')
    assert script.train(image_folder, *options, epochs=2) == 0, script.text
    expected = [
        pytest.approx({name: float(value) for name, value in row.items()}) for row in script.summary()]
    for name in ('wandb', 'trackio'):
        first, *logged, last = _events(script, name)
        assert first['init']['name'] == 'run' and first['init']['config']['epochs'] == 2
        assert [event['log'] for event in logged] == expected and last == {'finish': True}
    assert _events(script, 'wandb')[0]['init']['project'] == 'project'
    (folder, events), = Writer.folders.items()
    assert folder.endswith('run') and len(expected) == 2
    assert [{name: value for name, value, step in events if step == epoch} for epoch in range(2)] == expected

    assert script.train(image_folder, '--report-to', 'tensorboard', '--experiment', 'run', resume='auto',
                        start_epoch=1, epochs=3) == 0, script.text
    assert len(Writer.folders) == 1
    assert [step for name, _, step in events if name == 'train_loss'] == [0, 1, 2]


def test_log_wandb_means_report_to_wandb(script, image_folder, packages):
    assert script.train(image_folder, '--log-wandb', '--report-to', 'wandb', epochs=1) == 0, script.text
    assert [next(iter(event)) for event in _events(script, 'wandb')] == ['init', 'log', 'finish']


def test_errors_of_a_tracker_are_reported_before_training(script, image_folder, packages, monkeypatch):
    class LoginError(Exception):
        pass

    def init(**options):
        raise LoginError('no API key')

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(__spec__=object(), init=init))
    assert script.train(image_folder, '--log-wandb', epochs=1) == 2
    assert script.lines[-1] == 'ERROR: --report-to wandb: no API key'
    assert not list(script.run_folder().glob('*.pth.tar'))


@pytest.mark.parametrize('name', ['wandb', 'tensorboard', 'trackio'])
def test_missing_package(script, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert script('--report-to', name) == 2
    assert script.lines == [
        f'ERROR: --report-to {name} needs the package {name}, which is not installed: pip install {name}']
