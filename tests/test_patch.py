"""timm's own script with MultiMix added. One of the same build stands in for it; the real one runs if it is named."""
import csv
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from timm_multimix import patch

pytest_plugins = ['training_helpers']

# What the patch relies on in timm's train.py, and nothing else of it.
STAND_IN = textwrap.dedent('''
    """A training script."""
    import argparse
    import json

    import torch
    import yaml
    from PIL import Image
    from timm import create_model
    from timm.data import create_loader
    from timm.task import ClassificationTask

    parser = argparse.ArgumentParser()
    parser.add_argument('--config', default='')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--torchscript', action='store_true')
    parser.add_argument('--jsd-loss', action='store_true')
    parser.add_argument('--kd-model-name')
    parser.add_argument('--aug-splits', type=int, default=0)
    parser.add_argument('--eval-metric', default='top1')
    parser.add_argument('--epochs', type=int, default=1)


    class Images(torch.utils.data.Dataset):
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return self.transform(Image.new('RGB', (32, 32), (index % 3 * 90, 10, 200))), index % 3


    def _parse_args():
        args = parser.parse_args()
        if args.config:
            parser.set_defaults(**yaml.safe_load(open(args.config)))
            args = parser.parse_args()
        return args, yaml.safe_dump(vars(args))


    def main():
        args, text = _parse_args()
        torch.manual_seed(0)
        task = ClassificationTask(model=create_model('test_resnet', num_classes=3), device=torch.device('cpu'))
        assert isinstance(task, ClassificationTask)
        loader, loader_eval = (
            create_loader(Images(args.batch_size), (3, 32, 32), args.batch_size, is_training=is_training,
                          num_workers=0, device=torch.device('cpu')) for is_training in (True, False))
        for epoch in range(args.epochs):
            print(json.dumps(train_one_epoch(epoch, task.get_trainable_module(), loader, task=task)))
            task.update_ema(step=epoch + 1)
        model = task.get_eval_model().eval()
        assert all(model(images).shape[1] == 3 for images, _ in loader_eval)


    def train_one_epoch(epoch, model, loader, task=None):
        model.train()
        torch.manual_seed(epoch)
        result = task(*next(iter(loader)))
        return {name: value.item() for name, value in result.items() if value.ndim == 0}


    if __name__ == '__main__':
        main()
''')


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / 'train_stand_in.py'
    path.write_text(STAND_IN)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    yield str(path)
    sys.modules.pop('train_stand_in', None)


def _results(capsys):
    import json
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_multimix_comes_and_goes_in_the_script(stand_in, capsys):
    argv = [stand_in, '--multimix', 'dense', '--multimix-n', '10', '--epochs', '3', '--multimix-start-epoch', '1',
            '--multimix-off-epoch', '2']
    assert patch.main(argv) == 0
    assert [set(result) for result in _results(capsys)] == [{'loss'}, {'loss', 'dense', 'pooled'}, {'loss'}]


@pytest.mark.parametrize('views', ['1', '2'])
def test_teacher_comes_into_the_script(stand_in, capsys, views):
    def losses(*options):
        assert patch.main([stand_in, '--multimix', 'dense', '--multimix-n', '10', '--epochs', '2', *options]) == 0
        return [result['loss'] for result in _results(capsys)]
    with_teacher = losses('--multimix-teacher', 'ema', '--multimix-views', views)
    assert len(with_teacher) == 2 and with_teacher != losses()


def test_without_multimix_the_script_is_itself(stand_in, capsys):
    assert patch.main([stand_in, '--epochs', '2']) == 0
    patched = capsys.readouterr().out
    sys.argv = [stand_in, '--epochs', '2']
    runpy.run_path(stand_in, run_name='__main__')
    assert patched == capsys.readouterr().out
    module = sys.modules['train_stand_in']
    assert module.ClassificationTask.__module__.startswith('timm.task')


def test_options_in_the_scripts_config(stand_in, tmp_path, capsys):
    path = tmp_path / 'config.yaml'
    for value, parts in (('pooled', {'loss', 'pooled'}), ('off', {'loss'})):
        path.write_text(f'multimix: {value}\nmultimix_n: 10')
        assert patch.main([stand_in, '--config', str(path)]) == 0
        assert set(_results(capsys)[0]) == parts


def test_train_timm_does_the_same(stand_in, script, capsys):
    assert script('--timm-script', stand_in, '--multimix', 'pooled', '--multimix-n', '10') == 0
    assert script('--timm-script', 'nowhere.py') == 2 and 'nowhere.py' in script.text


@pytest.mark.parametrize('argv,word', [
    (['--torchscript'], 'torchcompile'), (['--jsd-loss'], 'jsd'), (['--kd-model-name', 'x'], 'distillation'),
    (['--batch-size', '1'], '--batch-size'), (['--multimix-attention', 'token'], 'class token'),
    (['--multimix-clean-weight', '2'], '--multimix-clean-weight must be in'),
    (['--multimix-views', '2'], '--multimix-views 2 requires a teacher'),
    (['--multimix-teacher', 'ema', '--multimix-views', '2', '--aug-splits', '2'], '--aug-splits'),
    (['--multimix-teacher', 'ema', '--eval-metric', 'teacher_top1'], 'does not validate teachers'),
])
def test_mistakes_end_in_one_line(stand_in, capsys, argv, word):
    assert patch.main([stand_in, '--multimix', 'dense', *argv]) == 2
    error, = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith('ERROR') and word in error


@pytest.mark.parametrize('text,word', [
    ('parser = 1', 'no _parse_args'),
    (STAND_IN.replace('def train_one_epoch', 'def train_epoch'), 'no train_one_epoch'),
    ('def (', 'cannot be loaded: invalid syntax'),
    (STAND_IN.replace('import yaml', 'import yaml\nfrom timm import of_another_time'), 'with the installed timm'),
    (STAND_IN + "\nparser.add_argument('--multimix')", 'already'),
])
def test_other_scripts_are_refused(tmp_path, capsys, text, word, monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    path = tmp_path / 'other_script.py'
    path.write_text(text)
    assert patch.main([str(path), '--multimix', 'dense']) == 2
    assert word in capsys.readouterr().err


def test_usage(capsys):
    assert patch.main([]) == 2 and patch.main(['--help']) == 0
    assert 'path/to/train.py' in capsys.readouterr().err


@pytest.mark.skipif('TIMM_TRAIN_SCRIPT' not in os.environ, reason="set TIMM_TRAIN_SCRIPT to timm's train.py")
@pytest.mark.parametrize('flags', [
    [], ['--multimix', 'dense', '--multimix-n', '20', '--multimix-off-epoch', '1'],
    ['--multimix', 'dense', '--multimix-n', '20', '--multimix-teacher', 'ema', '--multimix-views', '2'],
    ['--multimix', 'dense', '--multimix-n', '20', '--multimix-prob', '0.5', '--mixup', '1.0', '--smoothing', '0.1'],
    ['--multimix', 'dense', '--multimix-n', '20', '--multimix-preset', 'paper', '--no-prefetcher'],
    ['--multimix', 'dense', '--multimix-prob', '0', '--mixup', '1.0', '--cutmix', '1.0'],
])
def test_timms_script_and_ours_agree(tmp_path, image_folder, flags):
    """The same losses, to the last bit, with MultiMix and without."""
    options = ['--data-dir', str(image_folder), '--num-classes', '3', '--model', 'test_resnet', '--img-size', '32',
               '-b', '8', '--epochs', '2', '--warmup-epochs', '0', '-j', '1', '--lr', '0.01', '--device', 'cpu']
    rows = {}
    for name, command in (('timm', ['-m', 'timm_multimix.patch', os.environ['TIMM_TRAIN_SCRIPT']]),
                          ('ours', [str(Path(__file__).parent.parent / 'train_timm.py')])):
        subprocess.run(
            [sys.executable, *command, *options, *flags, '--experiment', name], cwd=tmp_path, check=True,
            capture_output=True)
        with open(tmp_path / 'output' / 'train' / name / 'summary.csv', newline='') as file:
            rows[name] = [{key: row[key] for key in ('train_loss', 'eval_loss', 'lr')} for row in csv.DictReader(file)]
    assert rows['timm'] == rows['ours'] and len(rows['ours']) == 2
