"""Test `timm-multimix evaluate` in this process, with tiny models and images."""
import argparse
import json
import os
import re
import shutil
import statistics
import sys
import warnings
from dataclasses import replace
from datetime import datetime
from html import escape
from html.parser import HTMLParser

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.common.errors import UsageError, printable
from timm_multimix.evaluation import main as cli
from timm_multimix.evaluation.comparison import abbreviate
from timm_multimix.evaluation.images import Images, Source, parse_source, predict
from timm_multimix.evaluation.metrics import classification_metrics, reliability
from timm_multimix.evaluation.models import load_candidate, load_candidates
from timm_multimix.evaluation.report import render_html, render_table
from timm_multimix.evaluation.suite import Result, evaluate_models

pytest_plugins = ['training_helpers']


@pytest.fixture(scope='module')
def runs(tmp_path_factory, image_folder):
    """Train two runs: one with cross-entropy, one with dense MultiMix and EMA weights."""
    from timm_multimix.training import main
    folder = tmp_path_factory.mktemp('runs')
    common = [
        '--data-dir', str(image_folder), '--img-size', '32', '-b', '8', '--warmup-epochs', '0', '--lr', '0.01', '--opt',
        'sgd', '--workers', '0', '--output', str(folder), '--multimix-n', '20', '--epochs', '2', '--crop-pct', '1.0']
    assert main([*common, '--model', 'test_resnet', '--experiment', 'plain']) == 0
    assert main([
        *common, '--model', 'test_vit', '--experiment', 'dense', '--multimix', 'dense', '--model-ema',
        '--model-ema-decay', '0.5', '--mean', '0.4', '--std', '0.3']) == 0
    return folder


def images_of(source, candidate, batch_size=8, **options):
    return Images(source, candidate, argparse.Namespace(batch_size=batch_size, workers=0, seed=0), **options)


class Evaluate:
    """Run the command."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.out = self.err = ''

    def __call__(self, *argv) -> int:
        self.capsys.readouterr()
        status = cli.main(['--output', str(self.folder / 'out'), *map(str, argv)])
        self.out, self.err = self.capsys.readouterr()
        return status

    def results(self) -> dict:
        return json.loads((self.folder / 'out' / 'results.json').read_text())

    def html(self) -> str:
        return (self.folder / 'out' / 'report.html').read_text()


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch, restored_logging):
    monkeypatch.chdir(tmp_path)
    return Evaluate(tmp_path, capsys)


def test_compares_two_runs_in_all_parts(evaluate, runs, image_folder):
    assert evaluate(
        runs / 'plain', runs / 'dense', '--eps', '2', '16/255', '--pgd-steps', '2', '--ood', 'uniform', 'demo/letters',
        image_folder / 'train@train', '--max-images', '40', '-b', '8') == 0, evaluate.err
    lines = evaluate.out.splitlines()
    assert lines[0].split() == ['plain', 'dense']
    assert [line for line in lines if line and line.isupper() and line.isascii() and '  ' not in line] == [
        'MODEL', 'ACCURACY', 'CALIBRATION', 'SELECTIVE CLASSIFICATION', 'ROBUSTNESS TO ATTACKS',
        'ROBUSTNESS TO CORRUPTIONS', 'OUT-OF-DISTRIBUTION DETECTION', 'EMBEDDINGS', 'MIXED IMAGES']
    assert lines[-1] == '* best value of the row; ↑ higher is better, ↓ lower is better'
    assert 'top-5' not in evaluate.out  # three classes
    table = {re.split(r'  +', line)[0]: re.split(r'  +', line)[1:] for line in lines[1:]}
    for label in ('top-1 % ↑', 'NLL ↓', 'NLL at temperature ↓', 'ECE % ↓', 'ECE % at temperature ↓', 'Brier ↓',
                  'adaptive ECE % ↓', 'class-wise ECE % at temperature ↓', 'AURC % ↓', 'coverage at 5 % risk, % ↑',
                  'mean over corruptions, top-1 % ↑', 'gaussian blur, top-1 % ↑',
                  'FGSM 2/255, top-1 % ↑', 'PGD 16/255, top-1 % ↑', 'uniform, energy: AUROC % ↑',
                  'demo/letters (validation), max softmax: FPR at 95 % TPR % ↓', 'alignment ↓', 'uniformity ↓',
                  'class compactness ↓', 'mean entropy', 'manifold intrusions, mixed images % ↓'):
        assert len(table[label]) == 2, label
    results = evaluate.results()
    assert list(results['models']) == ['plain', 'dense']
    for name, values in results['models'].items():
        assert values['num_images'] == 12
        assert float(table['NLL ↓'][name == 'dense'].rstrip('*')) == pytest.approx(values['metrics']['nll'], abs=1e-4)
        assert 'other half' in values['tempered']['fitted_on'] and len(values['tempered']['temperatures']) == 2
        attacks = values['attacks']
        assert attacks['epsilon_of_255'] == pytest.approx([0, 2, 16])
        assert attacks['fgsm'][0] == attacks['pgd'][0] == pytest.approx(values['metrics']['top1'])
        assert values['ood']['uniform']['num_images'] == 12
        assert values['ood']['demo/letters (validation)']['num_images'] == 40
        assert values['ood'][f'{image_folder}/train (train)']['num_images'] == 24
        mixes = values['between']
        assert mixes['num_mixes'] == 9 * mixes['num_pairs'] == 108 and len(mixes['confidence']) == 11
        assert mixes['misses_percent'] == pytest.approx(100 * mixes['misses'] / mixes['num_mixes'])
        for quantity in ('confidence', 'entropy'):  # without the images themselves
            assert mixes[f'mean_{quantity}'] == pytest.approx(statistics.mean(mixes[quantity][1:-1]))
    assert 'model_best' in results['models']['plain']['weights']
    assert results['models']['dense']['weights'] == 'model_best.pth.tar, state_dict_ema'
    assert table['weights'][1].strip() == 'model_best.pth.tar, state_dict_ema'
    assert results['models']['plain']['origin'] == str(runs / 'plain' / 'model_best.pth.tar')
    assert results['versions']['timm'] == timm.__version__ and datetime.fromisoformat(results['date']).tzinfo
    _check_page(evaluate.html())


class _Page(HTMLParser):
    """Parse the headings and pictures of a page, and the addresses of files that it would load."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.topics, self.pictures, self.outside, self.open = [], [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append('topic' if ('class', 'topic') in attrs else tag)
        for name, value in attrs:
            if name in ('src', 'href') and not value.startswith('data:image/png;base64,'):
                self.outside.append(value)
            self.pictures += name == 'src'

    def handle_data(self, data):
        if self.open and self.open[-1] in ('h2', 'topic'):
            (self.headings if self.open[-1] == 'h2' else self.topics).append(data)
            self.open.append('')


def _check_page(html):
    """Check that a page has all figures and loads no other files."""
    page = _Page(html)
    assert page.headings == [
        'Reliability', 'Robustness to attacks', 'Robustness to corruptions',
        'Out-of-distribution detection: max softmax', 'Out-of-distribution detection: energy', 'Embeddings',
        'Mixed images', 'Attention']
    assert page.pictures == 8 and page.outside == []
    assert page.topics == [
        'Model', 'Accuracy', 'Calibration', 'Selective classification', 'Robustness to attacks',
        'Robustness to corruptions', 'Out-of-distribution detection', 'Embeddings', 'Mixed images']
    assert 'max-width: 70rem' not in html and 'other kinds' not in html


def test_one_model_and_no_extra_parts(evaluate, runs):
    assert evaluate(runs / 'plain', '--parts') == 0
    values = evaluate.results()['models']['plain']
    assert not {'attacks', 'corruptions', 'ood', 'embeddings', 'between'} & set(values)
    assert '*' not in evaluate.out and _Page(evaluate.html()).headings == ['Reliability']


def test_agrees_with_the_validation_of_the_run(evaluate, runs):
    """The images, the normalization and the weights are the same, also for a run with its own mean and std."""
    import csv
    assert evaluate(runs / 'plain', runs / 'dense', '--parts') == 0
    for name, values in evaluate.results()['models'].items():
        with open(runs / name / 'summary.csv', newline='') as file:
            rows = list(csv.DictReader(file))
        best = max(rows, key=lambda row: (float(row['eval_top1']), -int(row['epoch'])))
        assert values['metrics']['nll'] == pytest.approx(float(best['eval_loss']), rel=1e-4)
        assert values['metrics']['top1'] == pytest.approx(float(best['eval_top1']))


def test_results_do_not_depend_on_the_batch_size(evaluate, runs):
    results = []
    for batch_size in (5, 100):
        assert evaluate(
            runs / 'plain', '--parts', 'ood', 'corruptions', 'embeddings', 'between', '-b', batch_size) == 0
        results.append(evaluate.results()['models']['plain'])
    for section in ('metrics', 'tempered'):
        assert results[0][section]['nll'] == pytest.approx(results[1][section]['nll'], rel=1e-4)
    for section, name in (('embeddings', 'alignment'), ('between', 'mean_entropy')):
        assert results[0][section][name] == pytest.approx(results[1][section][name], rel=1e-3)
    assert results[0]['ood']['uniform']['energy'] == pytest.approx(results[1]['ood']['uniform']['energy'], abs=1)
    values = results[0]['corruptions']
    assert values == results[1]['corruptions'] and values['severities'] == [1, 2, 3, 4, 5]
    assert values['clean_top1'] == pytest.approx(results[0]['metrics']['top1'])
    curves = [accuracy for curve in values['top1'].values() for accuracy in curve]
    assert len(values['top1']) == 6 and values['mean_top1'] == pytest.approx(statistics.mean(curves))


def test_temperature_from_a_named_split(evaluate, runs, image_folder):
    assert evaluate(runs / 'plain', '--parts', '--calibration-split', 'train') == 0
    tempered = evaluate.results()['models']['plain']['tempered']
    assert tempered['fitted_on'].endswith('(train)') and '(train)' in evaluate.html()
    assert 'plain may have been trained on these images' in evaluate.err
    [temperature] = tempered['temperatures']
    candidate = load_candidate(str(runs / 'plain'))
    logits, target = {}, {}
    for split in ('train', 'validation'):
        images = images_of(Source('', str(image_folder), split), candidate)
        logits[split], target[split] = predict(candidate, images, split)
    assert temperature == pytest.approx(fit_temperature(logits['train'], target['train']), rel=1e-3)
    expected = classification_metrics(logits['validation'] / temperature, target['validation'])
    assert tempered['nll'] == pytest.approx(expected['nll'], rel=1e-4)
    assert tempered['nll'] != pytest.approx(classification_metrics(logits['validation'], target['validation'])['nll'])


def test_the_best_of_each_row_is_starred():
    first, second = (
        Result(name, dict(weights='w', num_images=7, tempered={}, metrics=dict(
            top1=top1, top5=99.0, nll=nll, ece=3.0, brier=nll)))
        for name, top1, nll in (('a', 90.0, 0.4), ('b', 95.0, 0.5)))
    lines = render_table([first, second]).splitlines()
    assert [line.split() for line in lines[:-1] if line] == [
        ['a', 'b'], ['MODEL'], ['weights', 'w', 'w'], ['images', '7', '7'],
        ['ACCURACY'], ['top-1', '%', '↑', '90.00', '95.00*'], ['top-5', '%', '↑', '99.00', '99.00'],
        ['CALIBRATION'], ['NLL', '↓', '0.4000*', '0.5000'], ['Brier', '↓', '0.4000*', '0.5000'],
        ['ECE', '%', '↓', '3.00', '3.00']]
    assert lines[-1].startswith('* best value of the row')
    assert '*' not in render_table([first])
    del second.values['metrics']['nll']
    assert ['NLL', '↓', '0.4000*', '-'] in [line.split() for line in render_table([first, second]).splitlines()]


def test_images_are_resized_as_the_model_was_trained_with(runs, image_folder):
    candidate = load_candidate(str(runs / 'plain'))
    first, second = (
        next(iter(images_of(Source('', str(image_folder), 'validation'), replace(candidate, data_config={
            **candidate.data_config, 'input_size': (3, 48, 48), 'interpolation': interpolation}), 2)))[0]
        for interpolation in ('bicubic', 'nearest'))
    assert first.shape == second.shape == (2, 3, 48, 48) and not torch.equal(first, second)


def test_dataset_of_other_classes_is_refused(evaluate, runs, image_folder, tmp_path):
    for folder in sorted((image_folder / 'validation').iterdir())[:2]:
        shutil.copytree(folder, tmp_path / 'two' / 'validation' / f'another {folder.name}')
    assert evaluate(runs / 'plain', '--data-dir', tmp_path / 'two') == 2
    assert 'has 3 classes and' in evaluate.err


def test_sample_limits_what_takes_many_passes(evaluate, runs):
    assert evaluate(runs / 'plain', '--parts', 'embeddings', 'between', '--sample', '5') == 0
    values = evaluate.results()['models']['plain']
    assert values['num_images'] == 12
    assert values['embeddings']['num_images'] == values['between']['num_pairs'] == 5


@pytest.mark.parametrize('given, expected', [
    ([], (2.5 * 4 / 2, 'log-odds')), (['--pgd-step', '3', '--attack-loss', 'cross-entropy'], (3, 'cross-entropy'))])
def test_options_of_attacks(evaluate, runs, given, expected):
    assert evaluate(runs / 'plain', '--parts', 'attacks', '--eps', '4', '--pgd-steps', '2', *given) == 0
    values = evaluate.results()['models']['plain']['attacks']
    assert values['pgd_steps'] == 2 and values['pgd_step_size_of_255'] == [pytest.approx(expected[0])]
    assert values['loss'] == expected[1] and f'gradient of the {expected[1]} loss' in evaluate.html()


def test_weights_that_a_checkpoint_names_and_calibrated_ones(runs, tmp_path):
    shutil.copytree(runs / 'dense', tmp_path / 'dense')
    path = tmp_path / 'dense' / 'model_best.pth.tar'
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    weights = {}
    for name in (None, 'student', 'ema'):
        torch.save({**checkpoint, 'eval_weights': name}, path)
        candidate = load_candidate(str(tmp_path / 'dense'))
        weights[name] = candidate.model.state_dict()['head.weight']
    assert torch.equal(weights['student'], checkpoint['state_dict']['head.weight'])
    assert torch.equal(weights['ema'], checkpoint['state_dict_ema']['head.weight'])
    assert torch.equal(weights[None], weights['ema'])
    began = dict(pretrained=True, initial_checkpoint='gone.pth')  # replaced by the weights of the checkpoint
    calibrated = {**checkpoint['state_dict'], 'head.weight': checkpoint['state_dict']['head.weight'] * 3}
    torch.save(
        dict(arch='test_vit', args={**checkpoint['args'], **began}, state_dict=calibrated),
        path.with_name('model_calibrated.pth.tar'))
    candidate = load_candidate(str(tmp_path / 'dense'))
    assert candidate.weights == 'model_calibrated.pth.tar'
    assert torch.equal(candidate.model.state_dict()['head.weight'], calibrated['head.weight'])
    assert candidate.data_config['mean'] == (0.4, 0.4, 0.4) and candidate.data_config['input_size'] == (3, 32, 32)


def test_a_checkpoint_of_plain_timm_with_args_beside_it(runs, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    state = {**model.state_dict(), 'bn1.aux_bn.0.weight': torch.ones(1)}  # an entry of --split-bn
    torch.save(dict(state_dict=state), tmp_path / 'model.pth.tar')
    with pytest.raises(UsageError, match='does not name its model'):
        load_candidate(str(tmp_path / 'model.pth.tar'))
    (tmp_path / 'args.yaml').write_text('model: test_resnet\nnum_classes: 3\nimg_size: 48\n')
    candidate = load_candidate(str(tmp_path / 'model.pth.tar'))
    assert candidate.data_config['input_size'] == (3, 48, 48) and candidate.model.num_classes == 3
    images = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(candidate.data_config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    torch.testing.assert_close(candidate(images), model.eval()((images - mean) / std))


def test_names_are_short_and_differ(runs, tmp_path):
    for parent in ('one', 'two'):
        shutil.copytree(runs / 'plain', tmp_path / parent / 'run')
    specs = [str(tmp_path / parent / 'run') for parent in ('one', 'two')]
    assert [candidate.name for candidate in load_candidates(specs)] == ['one/run', 'two/run']
    with pytest.raises(UsageError, match='twice'):
        load_candidates([specs[0], specs[0] + os.sep])


@pytest.mark.parametrize('argv, message', [
    (['nothing'], 'Model nothing: timm has no such model'),
    (['resnet5O'], 'Did you mean resnet50'),
    (['{tmp}'], 'is not a run folder'),
    (['{tmp}/broken.pth.tar'], 'is not a training checkpoint'),
    (['{runs}/plain', '--dataset', 'demo/digits'], 'has 3 classes and demo/digits'),
    (['{runs}/plain', '--data-dir', '{tmp}/missing'], 'missing'),
    (['{runs}/plain', '--eps', '0.03'], 'Write it as a fraction'),
    (['{runs}/plain', '--parts', 'everything'], 'invalid choice'),
    (['{runs}/plain', '--calibration-split', 'validation'], 'the images that are evaluated'),
    (['{runs}/plain', '--batch-size', '0'], 'must be a whole number, 1 or more'),
    (['{runs}/plain', '--batch-size', 'abc'], "1 or more, got 'abc'"),
    (['{runs}/plain', '-j', '-1'], "0 or more, got '-1'"),
    (['{runs}/plain', '--seed', '-1'], "0 or more, got '-1'"),
    (['{runs}/plain', '--calibration-split', 'val'], 'the images that are evaluated'),
    (['{runs}/plain', '--data-dir', '{flat}', '--calibration-split', 'train'], 'the images that are evaluated'),
    (['{runs}/plain', '--parts', 'attacks', 'ood', '--ood', 'torch/image_folder'], 'Data torch/image_folder'),
    (['{runs}/plain', '--device', 'abacus'], '--device abacus'),
    (['{runs}/plain', '--ood', '{tmp}/missing', '--parts', 'ood'], 'missing'),
    (['{runs}/plain', '--ood', 'nope'], 'Data nope (validation): no such folder or dataset'),
    (['{runs}/plain', '--ood', 'demo/nope'], 'Choose from demo/digits'),
    (['{runs}/plain', '--ood', 'unifrom'], 'Did you mean uniform'),
    (['{runs}/plain', '--dataset', 'torhc/cifar10'], 'Did you mean torch?'),
    (['{runs}/plain', '--dataset', 'torch/cifar10', '--data-dir', '{tmp}'], 'You can use --dataset-download to'),
    (['{runs}/plain', '--parts', 'atacks'], 'Did you mean attacks?'),
    (['{runs}/plain', '--atack-loss', 'x'], 'Did you mean --attack-loss'),
    (['{runs}/plain', '--attack-loss', 'cross-entrpy'], 'Did you mean cross-entropy?'),
    (['resnet50.nothing_in1k', '--dataset', 'demo/digits'], 'timm has no pretrained weights of this model'),
    (['{runs}/plain', '--dataset', 'nope'], 'no such folder or dataset'),
    (['{runs}/plain', '--output', '{tmp}/broken.pth.tar/out'], 'is not a writable folder'),
    (['{tmp}/missing'], 'missing: no such folder or file'),
    ([], 'MODEL'),
])
def test_mistakes_end_in_one_line(evaluate, runs, image_folder, tmp_path, argv, message):
    (tmp_path / 'broken.pth.tar').write_bytes(b'PK nonsense')
    paths = dict(tmp=tmp_path, runs=runs, flat=image_folder / 'validation')
    assert evaluate(*(part.format(**paths) for part in argv)) == 2
    assert message in evaluate.err.splitlines()[-1] and 'Traceback' not in evaluate.err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('package, parts', [('captum', ['attacks']), ('torchmetrics', [])])
def test_without_a_package(evaluate, runs, monkeypatch, package, parts):
    monkeypatch.setitem(sys.modules, package, None)
    assert evaluate(runs / 'plain', '--parts', *parts) == 2
    assert evaluate.err.splitlines() == [
        f"ERROR: Evaluation needs the package {package}, which is not installed: pip install 'timm-multimix[eval]'"]


@pytest.mark.parametrize('option', ['--dataset', '--ood'])
def test_without_the_package_of_a_dataset(evaluate, runs, monkeypatch, option):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert evaluate(runs / 'plain', option, 'hfds/user/name') == 2
    assert evaluate.err.splitlines()[-1].endswith(
        'hfds/user/name needs the package datasets, which is not installed: pip install datasets')


def change_weights(folder, change):
    """Apply a function to every weight of the best checkpoint of a run."""
    path = folder / 'model_best.pth.tar'
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    checkpoint['state_dict'] = {name: change(weight) for name, weight in checkpoint['state_dict'].items()}
    torch.save(checkpoint, path)


def test_calibrated_beside_others_is_warned_of(evaluate, runs, tmp_path):
    (tmp_path / 'calibrated').mkdir()
    shutil.copy(runs / 'plain' / 'model_best.pth.tar', tmp_path / 'calibrated' / 'model_calibrated.pth.tar')
    assert evaluate(runs / 'plain', tmp_path / 'calibrated', '--parts') == 0
    assert 'calibrated: calibrated, but the other models are not' in evaluate.err
    assert evaluate(tmp_path / 'calibrated', '--parts') == 0
    assert 'the other models are not' not in evaluate.err


def test_a_model_that_diverged_is_named_and_others_are_kept(evaluate, runs, tmp_path):
    shutil.copytree(runs / 'plain', tmp_path / 'diverged')
    change_weights(tmp_path / 'diverged', lambda w: w * torch.nan if w.is_floating_point() else w)
    assert evaluate(runs / 'plain', tmp_path / 'diverged', '--parts') == 2
    assert 'diverged: images: the outputs for 12 of 12 images are not finite' in evaluate.err
    assert list(evaluate.results()['models']) == ['plain']


def test_a_model_that_collapsed_has_all_embeddings_in_one_point(evaluate, runs, tmp_path):
    shutil.copytree(runs / 'plain', tmp_path / 'collapsed')
    change_weights(tmp_path / 'collapsed', torch.zeros_like)
    assert evaluate(tmp_path / 'collapsed', '--parts', 'embeddings') == 0
    assert evaluate.results()['models']['collapsed']['embeddings']['alignment'] == 0


def test_one_image(evaluate, runs):
    assert evaluate(runs / 'plain', '--parts', 'embeddings', 'between', '--max-images', '1') == 0
    values = evaluate.results()['models']['plain']
    assert values['num_images'] == 1 and values['embeddings']['uniformity'] is None
    assert 'two images or more' in values['tempered']['reason']


@pytest.mark.parametrize('options', [['--in-chans', '1'], ['--in-chans', '4', '--input-img-mode', 'RGBA']])
def test_other_channels_than_three(evaluate, image_folder, tmp_path, options):
    """The pixel statistics are adapted to the channels as in timm's loader, and the image mode is that of the run."""
    import csv

    from timm_multimix.training import main
    assert main([
        '--data-dir', str(image_folder), '--img-size', '32', '-b', '8', '--workers', '0', '--output', str(tmp_path),
        '--model', 'test_resnet', '--experiment', 'run', '--epochs', '1', '--crop-pct', '1.0', *options]) == 0
    assert evaluate(tmp_path / 'run', '--parts', '--ood', '-b', '8') == 0, evaluate.err
    with open(tmp_path / 'run' / 'summary.csv', newline='') as file:
        [row] = csv.DictReader(file)
    assert evaluate.results()['models']['run']['metrics']['nll'] == pytest.approx(float(row['eval_loss']), rel=1e-4)


class Unlabeled(Dataset):
    transform = None

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((3, 32, 32), index, dtype=torch.uint8), 'a name'


def test_images_of_other_kinds_need_no_classes(runs, monkeypatch):
    monkeypatch.setattr(Source, 'open', lambda self, img_mode: Unlabeled())
    source, candidate = Source('', 'folder', 'test'), load_candidate(str(runs / 'plain'))
    logits, target = predict(candidate, images_of(source, candidate, 2, labeled=False), 'others')
    assert logits.shape == (5, 3) and target.tolist() == [0] * 5
    with pytest.raises(UsageError, match='one class for each image is needed'):
        predict(candidate, images_of(source, candidate, 2), 'images')
    monkeypatch.setattr(Unlabeled, '__len__', lambda self: 0)
    with pytest.raises(UsageError, match='others: there are no images'):
        predict(candidate, images_of(source, candidate, 2, labeled=False), 'others')


class Memory(nn.Module):
    """Model that does not have enough memory for more than `limit` images."""
    num_classes = 3

    def __init__(self, limit, message="DefaultCPUAllocator: can't allocate memory"):
        super().__init__()
        self.limit, self.message, self.sizes, self.fc = limit, message, [], nn.Linear(3, 3)

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise RuntimeError(self.message)
        return self.fc(images.mean((2, 3)))


def test_halves_batches_that_memory_does_not_hold(runs, image_folder):
    def measured(model, batch_size):
        source = Source('', str(image_folder), 'validation')
        args = argparse.Namespace(
            batch_size=batch_size, workers=0, seed=0, source=source, calibration=None, max_images=None, outside=(),
            parts=())
        candidate = replace(load_candidate(str(runs / 'plain')), model=model)
        return next(evaluate_models([candidate], args, torch.device('cpu'))).values['metrics']

    model = Memory(3)
    assert measured(model, 12) == pytest.approx(measured(model, 3))
    assert model.sizes == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    with pytest.raises(UsageError, match='not enough memory for one image'):
        measured(Memory(0), 2)
    with pytest.raises(RuntimeError, match='something else'):
        measured(Memory(0, 'something else'), 2)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet'])
def test_embeddings_are_the_input_of_the_classifier(tmp_path, name):
    model = timm.create_model(name, num_classes=3)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth.tar')
    (tmp_path / 'args.yaml').write_text(f'model: {name}\nnum_classes: 3\n')
    candidate = load_candidate(str(tmp_path / 'model.pth.tar'))
    images = torch.rand(2, *candidate.data_config['input_size'])
    logits, embeddings = candidate.embed(images)
    torch.testing.assert_close(logits, candidate(images))
    torch.testing.assert_close(candidate.model.get_classifier()(embeddings), logits)


def test_images_are_those_of_the_dataset_in_0_to_1(runs, image_folder):
    candidate = load_candidate(str(runs / 'plain'))
    images = images_of(Source('', str(image_folder), 'train'), candidate, 10)
    batches = list(images)
    assert [len(target) for _, target in batches] == [10, 10, 4] and len(images) == 3
    pixels, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert pixels.shape == (24, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1
    torch.testing.assert_close(pixels * 255, (pixels * 255).round())
    red = pixels[target == 0].mean((0, 2, 3)) * 255
    assert red[0] == pytest.approx(200, abs=5) and red[1] == pytest.approx(30, abs=5)
    some, fewer = images.part(9), images.part(9).part(4)
    assert len(some.indices) == 9 and set(fewer.indices) < set(some.indices)
    torch.testing.assert_close(torch.cat([part for part, _ in some]), pixels[some.indices])


@pytest.mark.parametrize('text, expected', [
    ('demo/letters', ('demo/letters', None, 'validation')),
    ('torch/svhn@test', ('torch/svhn', None, 'test')),
    ('path/to/images', ('', 'path/to/images', 'validation')),
    ('images@val', ('', 'images', 'val')),
    ('torch/cifar10=data', ('torch/cifar10', 'data', 'validation')),
    ('torch/cifar10=data@train', ('torch/cifar10', 'data', 'train')),
    ('there@is=one', ('', 'there@is=one', 'validation')),
])
def test_sources_from_text(tmp_path, monkeypatch, text, expected):
    (tmp_path / 'there@is=one').mkdir()
    monkeypatch.chdir(tmp_path)
    source = parse_source(text, 'validation')
    assert (source.dataset, source.root, source.split) == expected


NAMES = {
    'special characters': ('$\\frac{$ a<b>&" %s {0} \\', '$\\frac{$ a<b>&" %s {0} \\'),
    'control characters': ('a\n\x1b[31m\tb\u202e', 'a\\n\\x1b[31m\\tb\\u202e'),
    'undecodable bytes': ('a\udcffb', 'a\\udcffb'),
    'leading underscore': ('_run', '_run'),
    'other scripts': ('模型 \N{GRINNING FACE}', '模型 \N{GRINNING FACE}'),
    'long': ('x' * 250, 'x' * 250),
}


def test_names_of_runs_and_folders_are_only_text(evaluate, runs, image_folder, tmp_path):
    """Names of models and of out-of-distribution images are escaped in figures, table, JSON and page."""
    models = [NAMES[kind][0] for kind in ('special characters', 'control characters')]
    folder = tmp_path / 'ood' / models[0]
    for name in models:
        shutil.copytree(runs / 'dense', tmp_path / name)
    shutil.copytree(image_folder / 'validation' / 'a', folder / 'a')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert evaluate(
            *(tmp_path / name for name in models), '--ood', folder,
            '--parts', 'ood', 'embeddings', 'attention') == 0, evaluate.err
    shown = [NAMES[kind][1] for kind in ('special characters', 'control characters')]
    assert list(evaluate.results()['models']) == shown
    for values in evaluate.results()['models'].values():
        assert list(values['ood']) == [f'{folder} (validation)']
    assert '<b>' not in evaluate.html() and not set('\x1b\t\u202e') & set(evaluate.html() + evaluate.out + evaluate.err)


def test_names_in_figures_table_and_page():
    """Names of models and sources are drawn without a warning, and escaped in the page."""
    scores = dict(energy=torch.rand(9), max_softmax=torch.rand(9))
    results = [Result(printable(name), dict(
        origin=f'folder/{name}', weights='w', num_images=9, metrics=dict(top1=50.0, nll=k),
        reliability=reliability(torch.randn(9, 3), torch.arange(9) % 3), tempered={},
        attacks=dict(num_images=9, loss='log-odds', epsilon_of_255=[0, 1], pgd_steps=1, fgsm=[1, 2], pgd=[1, 2]),
    ), dict(
        points=torch.rand(9, 2), classes=torch.arange(9) % 3, images=torch.rand(1, 3, 8, 8), maps=torch.rand(1, 2, 2),
        scores=dict(inside=scores, outside={NAMES['special characters'][0]: scores}),
    )) for k, (name, _) in enumerate(NAMES.values())]
    source = Source('', NAMES['control characters'][0], 'validation')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        page = render_html(results, str(source), 0)
    page.encode()
    assert _Page(page).pictures == 6 and '<b>' not in page and not set('\x1b\t\u202e') & set(page)
    header = render_table(results).splitlines()[0]
    for _, shown in NAMES.values():
        assert escape(shown) in page and escape(f'folder/{shown}') in page
        assert f' {abbreviate([shown], 32)[0]}' in header
    assert f'Images: {escape(str(source))}.' in page


def test_abbreviated_names_differ():
    names = ['run-' + 'x' * 100 + f'-{k}-' + 'x' * 100 for k in range(3)]
    short = abbreviate(names, 20)
    assert len(set(short)) == 3 and max(map(len, short)) <= 20
    assert abbreviate(['one', 'two'], 20) == ['one', 'two']
