"""Studies: planning, caching, metrics, report, and a small study from end to end."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

import study_plan as studies  # noqa: E402
import study_report  # noqa: E402
import study_run  # noqa: E402

STUDY = dict(
    datasets={'digits': dict(train=100, validation=100, test=100, epochs=1)},
    models={'resnet': dict(model_name='test_resnet', output_stride=8)},
    methods={'cross-entropy': {}, 'dense': dict(multimix='dense', num_mixes=20)},
    lrs=[0.1, 0.2],
    seeds=3,
    tuning_seeds=1,
)
METRICS = [name for name, *_ in studies.Study.columns]


def write(tmp_path, **changes) -> Path:
    path = tmp_path / 'small.yaml'
    path.write_text(yaml.safe_dump(STUDY | changes))
    return path


def fake_results(study, score) -> dict:
    """Results of all tuning runs, with validation accuracy score(group, lr, seed)."""
    return {
        studies.key_of(study.settings(group, lr, seed)): dict(
            {metric: 1.0 for metric in METRICS}, validation=score(group, lr, seed))
        for group in study.groups() for lr in study.group_lrs(group) for seed in range(study.tuning_seeds)}


@pytest.mark.parametrize('path', sorted(BENCHMARKS.glob('studies/*.yaml')), ids=lambda path: path.stem)
def test_studies_of_the_repository_are_valid(path):
    study = studies.load_study(path)
    assert study.seeds >= study.tuning_seeds and study.missing({})
    assert set(study.baselines) <= set(study.methods)


def test_settings_contain_the_defaults_of_a_method():
    plain = study_run.resolve_method({})
    dense = study_run.resolve_method(dict(multimix='dense', alpha=1.0))
    assert plain == study_run.PLAIN_OPTIONS
    assert dense['attention'] == 'gap' and dense['alpha'] == 1.0 and dense['balance'] is True  # the task's attention
    assert study_run.resolve_method(dict(multimix=False))['multimix'] == 'off'
    with pytest.raises(ValueError, match='tuple_lenght'):
        study_run.resolve_method(dict(multimix='dense', tuple_lenght=3))


def test_specific_settings_take_precedence(tmp_path):
    study = studies.load_study(write(
        tmp_path, training=dict(epochs=7, batch_size=20),
        models={'vit': dict(model_name='test_vit', opt='adamw', lrs=[0.001])},
        methods={'cross-entropy': {}, 'long': dict(epochs=9, lrs=[0.3])}))
    plain, long = study.groups()
    assert study.group_lrs(plain) == [0.001] and study.group_lrs(long) == [0.3]
    settings = study.settings(plain, 0.001, 0)
    assert settings['training'] == study_run.TRAINING_DEFAULTS | dict(epochs=1, batch_size=20, opt='adamw')
    assert settings['model'] == dict(model_name='test_vit')
    assert settings['dataset'] == dict(name='digits', train=100, validation=100, test=100, label_noise=0.0)
    assert study.settings(long, 0.3, 0)['training']['epochs'] == 9
    assert study.settings(plain, 0.001, 0) == settings  # the study has not changed


def test_key_depends_on_the_content_only():
    assert studies.key_of(dict(a=1, b=dict(c=2, d=3))) == studies.key_of(dict(b=dict(d=3, c=2), a=1))
    assert studies.key_of(dict(a=1)) != studies.key_of(dict(a=2))


def test_validation_accuracy_selects_the_learning_rate(tmp_path):
    study = studies.load_study(write(tmp_path))
    group = next(study.groups())
    missing = study.missing({})
    assert len(missing) == 4 and {s['seed'] for s in missing} == {0}
    results = fake_results(study, lambda group, lr, seed: 90 + 10 * lr)
    for key in results:  # the ranking on the test split is reversed
        results[key]['accuracy'] = -results[key]['validation']
    assert study.best_lr(group, results) == 0.2
    missing = study.missing(results)
    assert [(s['lr'], s['seed']) for s in missing] == [(0.2, 1)] * 2 + [(0.2, 2)] * 2
    table = study.table(results)
    assert table[group]['lr'] == '0.2*' and list(table[group]['runs']) == [0]
    del results[studies.key_of(study.settings(group, 0.1, 0))]
    assert study.best_lr(group, results) is None and group not in study.table(results)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(learning_rates=[1]), 'required keys are datasets, lrs, methods, models'),
    (dict(tuning_seeds=4), r'tuning_seeds must be in \[1, 3\], got 4'),
    (dict(methods={'dense': dict(multmix='dense')}), 'multmix'),
    (dict(datasets={'figures': dict(train=3)}), 'must be one of digits, glyphs'),
    (dict(datasets={'digits': dict(train=3, size=3)}), 'must be one of digits, glyphs'),
    (dict(training=dict(epocs=1)), 'unknown training epocs'),
    (dict(baselines=['cross-entropie']), 'unknown baselines cross-entropie'),
    (dict(models={'resnet': dict(model_name='test_resnetx')}), 'test_resnetx'),
    (dict(models={'resnet': dict(model_name='test_resnet', output_strid=8)}), 'output_strid'),
    (dict(methods={'dense': dict(multimix='dens')}), 'dens'),
    (dict(methods={'dense': dict(multimix='dense', alpha=-1)}), 'alpha must be'),
])
def test_bad_studies_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        studies.load_study(write(tmp_path, **change))


def test_file_without_a_study_is_refused(tmp_path):
    (tmp_path / 'small.yaml').write_text('hello')
    with pytest.raises(ValueError, match='is not a study'):
        studies.load_study(tmp_path / 'small.yaml')


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, BENCHMARKS / 'study.py', *map(str, args)], capture_output=True, text=True)


def test_errors_have_no_traceback(tmp_path):
    result = command(write(tmp_path), '--methods', 'sparse')
    assert result.returncode == 1 and 'unknown methods sparse' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_missing_package_is_reported_before_the_first_run(tmp_path):
    program = (
        'import runpy, sys; sys.modules["captum"] = None; sys.argv.pop(0); sys.path.insert(0, sys.argv.pop(0)); '
        'runpy.run_path(sys.argv[0], run_name="__main__")')
    result = subprocess.run(
        [sys.executable, '-c', program, BENCHMARKS, BENCHMARKS / 'study.py', write(tmp_path), '--results',
         tmp_path / 'results'], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == (
        "A study needs the package captum, which is not installed: pip install 'timm-multimix[eval]'")


def test_shift_moves_by_at_most_its_reach():
    images = torch.zeros(200, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = study_run.shift(images, 2)
    place = moved.flatten(1).argmax(1)
    offsets = torch.stack([place // 9, place % 9]) - 4
    assert moved.shape == images.shape and (moved.flatten(1).sum(1) == 1).all()
    assert offsets.abs().max() == 2 and len(offsets.unique(dim=1).T) == 25


def test_splits_are_disjoint_and_noise_is_in_training_only():
    options = dict(name='digits', train=300, validation=100, test=None)
    clean = study_run.load_splits(options | dict(label_noise=0.0))
    noisy = study_run.load_splits(options | dict(label_noise=0.3))
    rows = torch.cat([split.images.flatten(1) for split in clean.values()])
    assert len(rows) == 1797 and clean['test'].images.shape == (1397, 1, 32, 32)
    assert (clean['train'].labels != noisy['train'].labels).sum() == 90
    assert (clean['validation'].labels == noisy['validation'].labels).all()
    assert (clean['test'].labels == noisy['test'].labels).all()


def test_metrics_of_a_known_model():
    """For a linear model FGSM changes the logit by the step times the sum of the absolute weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0])
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]))
        model[1].bias.zero_()
    reach = 2 * study_run.FGSM_STEP * weight.abs().sum()  # the range [-1, 1] is twice as large as [0, 1]
    images = torch.stack([weight * scale / 30 for scale in (0.5 * reach, 2 * reach)]).view(2, 1, 2, 2)
    data = study_run.Split(images, torch.tensor([1, 1]))
    metrics = study_run.evaluate(model, data, data)
    assert metrics['accuracy'] == metrics['validation'] == 100
    assert metrics['fgsm'] == 50
    for key, factor in (('nll', 1), ('nll_at_t', metrics['temperature'])):
        assert metrics[key] == pytest.approx(F.cross_entropy(model(images) / factor, data.labels).item(), rel=1e-5)
    assert metrics['nll'] != metrics['nll_at_t']


def test_metrics_of_a_diverged_model_are_those_of_chance():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    data = study_run.Split(torch.rand(10, 1, 2, 2), torch.tensor([0, 1] * 5))
    metrics = study_run.evaluate(model, data, data)
    assert metrics['accuracy'] == 50 and metrics['temperature'] == float('inf')
    assert metrics['nll_at_t'] == pytest.approx(math.log(2))


def test_report_compares_with_the_best_baseline_on_validation(tmp_path):
    study = studies.load_study(write(
        tmp_path, methods={'a': {}, 'b': dict(smoothing=0.1), 'dense': dict(multimix='dense')}, lrs=[0.1]))
    study.baselines = ['a', 'b']
    accuracy = {'a': [97, 96, 98], 'b': [90, 91, 89], 'dense': [98, 98.5, 98.5]}
    validation = {'a': 80, 'b': 90, 'dense': 70}
    table = {
        group: dict(lr='0.1*', runs={seed: dict(
            dict.fromkeys(METRICS, 1.0), accuracy=value, validation=validation[group.method])
            for seed, value in enumerate(accuracy[group.method])}) for group in study.groups()}
    text = study_report.report(study, table)
    assert 'accuracy over b' in text and '| a | 0.1* | 3 | 97.00 ± 1.00' in text
    assert '+8.33 [' in text and '-83 %' in text  # error 1.67 against 10
    runs = [{seed: dict(accuracy=value) for seed, value in enumerate(accuracy[name])} for name in ('dense', 'a')]
    mean, low, high = study_report.paired_difference(*runs, 'accuracy')
    # Differences 1, 2.5, 0.5: mean 4/3, standard error 0.6009, Student's t with two degrees of freedom 4.3027.
    assert (mean, low, high) == pytest.approx((1.3333, -1.2522, 3.9189), abs=1e-3)
    assert study_report.mean_and_spread([1.0, math.inf], 2) == 'inf'
    ranks = study_report.ranking([study], [table], ['a', 'b', 'dense'], 'accuracy').splitlines()
    assert ranks[0] == 'Settings: small: digits, resnet'
    assert [line.split('|')[1:3] for line in ranks[-3:]] == [
        [' dense ', ' 1.00 '], [' a ', ' 2.00 '], [' b ', ' 3.00 ']]
    assert ranks[-1].split('|')[3].count('to a') == 1 and ranks[-2].split('|')[3].strip() == ''
    reverse = study_report.ranking([study], [table], ['a', 'dense'], 'nll').splitlines()
    assert all(line.split('|')[2].strip() == '1.00' for line in reverse[-2:])  # equal values share a rank
    study_report.plot(study, table, tmp_path / 'plot.svg')
    assert '<svg' in (tmp_path / 'plot.svg').read_text()


@pytest.mark.parametrize('baseline, ours', [
    ({0: 90.0}, {1: 95.0, 2: 96.0}),  # no common seeds
    ({0: 100.0, 1: 100.0}, {0: 99.0, 1: 98.0}),  # the error of the baseline is 0
])
def test_report_omits_undefined_values(tmp_path, baseline, ours):
    study = studies.load_study(write(tmp_path))
    table = {
        group: dict(lr='0.1', runs={seed: dict(
            dict.fromkeys(METRICS, math.inf), accuracy=value, validation=value)
            for seed, value in (ours if group.method == 'dense' else baseline).items()}) for group in study.groups()}
    cells = study_report.report(study, table).splitlines()[-1].split('|')
    assert cells[1] == ' dense ' and cells[-2].strip() == ''
    assert study_report.report(study, table, 'temperature').splitlines()[-1].split('|')[-3].strip() == ''


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path):
    path, folder = write(tmp_path, seeds=2, lrs=[0.1]), tmp_path / 'results'
    first = command(path, '--results', folder, '--workers', 1, '--methods', 'dense')
    file = folder / 'small.jsonl'
    assert '| dense | 0.1 | 2 |' in first.stdout and len(file.read_text().splitlines()) == 2
    # A truncated line does not affect the next one.
    lines = file.read_text().splitlines()
    file.write_text(f'{lines[0]}\n{lines[1][:100]}')
    study = studies.load_study(path)
    results = studies.load_results(folder)
    assert len(results) == 1 and len(study.missing(results)) == 3
    studies.run_missing(study, results, folder, workers=1, niceness=0)
    assert studies.load_results(folder) == results and not study.missing(results)
    assert results[json.loads(lines[1])['key']] == json.loads(lines[1])['metrics']
    text = study_report.report(study, study.table(results))
    assert '| cross-entropy | 0.1 | 2 |' in text and '[95 %]' in text
    compared = command(path, '--results', folder, '--report-only', '--baseline', 'dense', '--compare', 'nll').stdout
    assert 'nll over dense [95 %]' in compared
    rows = {group.method: row['runs'] for group, row in study.table(results).items()}
    mean, *_ = study_report.paired_difference(rows['cross-entropy'], rows['dense'], 'nll')
    assert f'| {mean:+.3f} [' in compared
    assert 'must be one of' in command(path, '--results', folder, '--report-only', '--baseline', 'sparse').stderr


@pytest.mark.slow
def test_terminated_study_ends_its_processes(tmp_path):
    path, folder = write(tmp_path, seeds=1000, lrs=[0.1]), tmp_path / 'results'
    study = subprocess.Popen(
        [sys.executable, BENCHMARKS / 'study.py', path, '--results', folder, '--workers', '1'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in study.stderr:
        if 'accuracy' in line:  # a run has ended
            break
    study.terminate()
    output, errors = study.communicate(timeout=600)  # returns when all processes have ended
    assert study.returncode == 130 and 'Stopped' in errors and '| cross-entropy | 0.1 |' in output


DETECTION_STUDY = dict(
    datasets={'digits': dict(name='scene digits', train=50, validation=50, test=50, epochs=1)},
    models={'resnet': dict(model_name='test_resnet', output_stride=8)},
    methods={'random weights': {}, 'cross-entropy': {}, 'dense': dict(multimix='dense', num_mixes=20)},
    lrs=[0.1, 0.2],
    seeds=2,
    tuning_seeds=1,
    detection=dict(lrs=[1e-3, 2e-3], epochs=[1], train=8, validation=4, test=4),
)


@pytest.mark.slow
def test_a_study_of_detection_from_end_to_end(tmp_path):
    path, folder = tmp_path / 'small.yaml', tmp_path / 'results'
    path.write_text(yaml.safe_dump(DETECTION_STUDY))
    done = command(path, '--results', folder, '--workers', 1)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / 'small.jsonl').read_text().splitlines()]
    detectors = [one for one in records if 'detector' in one['settings']]
    # Two learning rates of two classifiers; a grid of two and another seed for three backbones.
    assert len(records) - len(detectors) == 4 and len(detectors) == 9
    assert len({one['key'] for one in records}) == 13
    assert '| dense |' in done.stdout and '**digits, resnet**' in done.stdout
    again = command(path, '--results', folder, '--workers', 1)
    assert again.stdout == done.stdout and len((folder / 'small.jsonl').read_text().splitlines()) == 13
