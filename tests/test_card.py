"""Model cards: content, metadata that the Hub accepts, and removal of private data."""
import argparse
import getpass
import json
import os
import re
import socket
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard

from timm_multimix.data.class_names import dataset_classes, ordered_names
from timm_multimix.hub import Evaluation, HubError, dataset_type, model_card, save_config
from timm_multimix.hub import export as run_export
from timm_multimix.hub.card import CARD_FIELDS, check_fields, is_ours
from timm_multimix.hub.summary import draw_curve, read_summary
from timm_multimix.options import build_training_parser
from timm_multimix.training.config import parse_args

CONFIG = dict(architecture='resnet18', num_classes=3, label_names=['a|b', 'c', 'd'], pretrained_cfg=dict(
    input_size=[3, 64, 64], interpolation='bicubic', crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3))
SECRETS = dict(
    home='/home/alice/private', windows='C:\\Users\\alice\\runs', relative='../alice/secret.pt',
    host='gpu-17.example.org', user='alice-cooper', token='hf_abcdefghijklmnop',
    wandb='0123456789abcdef0123456789abcdef01234567',
    url='https://alice:password@example.org/data')


def test_card_says_how_to_use_the_model():
    card = model_card(
        'user/model', CONFIG, revision='v1', summary='What it is.', multimix=dict(multimix='dense'),
        recipe=dict(lr=0.1, multimix='off'), left_out=['opt_kwargs'], has_curve=True,
        evaluation=Evaluation('cifar10', 'CIFAR-10', 'test', dict(top1=91.25, top5=99.0, loss=0.5, map=50.0)),
        fields=dict(license='mit', datasets=['uoft-cs/cifar10'], base_model='timm/resnet18.a1_in1k', language=['en'],
                    tags=['more'], description='A description.'))
    text = str(card)
    assert metadata_errors(text) == []
    code = text.split('```python\n')[1].split('```')[0]
    assert "timm.create_model('hf-hub:user/model@v1', pretrained=True)" in code
    compile(code, 'card', 'exec')
    for part in ('# model\n', 'What it is.', 'A description.', '91.25 %', '(training_curve.png)', 'a\\|b, c, d',
                 '`dense`', 'opt_kwargs', "multimix: 'off'", '@inproceedings{venkataramanan2023multimix', '2206.14868'):
        assert part in text, part
    data = ModelCard(text).data  # read back
    assert (data.license, data.library_name, data.pipeline_tag) == ('mit', 'timm', 'image-classification')
    assert data.tags == ['timm', 'image-classification', 'multimix', 'more']
    assert data.base_model == 'timm/resnet18.a1_in1k' and data.datasets == ['uoft-cs/cifar10']
    results = {result.metric_name: (result.metric_type, result.metric_value) for result in data.eval_results}
    assert results == {'Top-1 accuracy': ('accuracy', 0.9125), 'Top-5 accuracy': ('accuracy', 0.99),
                       'Loss': ('loss', 0.5), 'Mean average precision': ('mean_average_precision', 0.5)}
    assert is_ours(text) and not is_ours(text.replace('Written by', 'Once by'))


HOSTILE = [
    '<script>alert(1)</script>', '<!-- ', '-->', 'a\nb', 'a\r\n\r\n# Heading', '# a', '- a', '> a', '1. a',
    '[a](http://b)', '![a](http://b/c.png)', '*a*', '**a**', '_a_', 'a_b_c', '`a`', '``a', '~~a~~', '$a$', '$$', '|',
    'a|b', '\\|', '\\', '&lt;', '&', 'a\tb', '\x00', '\x1b[31m', '\u202eabc', '\u2028', '\x85', '\ud800', '---', '```',
    'http://a.b', 'www.a.b', '{{ a }}', '', ' ', 'caf\u00e9 \u65e5 \U0001f469\u200d\U0001f52c']


@pytest.mark.parametrize('name', HOSTILE, ids=range(len(HOSTILE)))
def test_names_from_elsewhere_are_shown_as_they_are(name):
    """Class names, splits, datasets and settings stay in their cell, line or code span."""
    text = str(model_card(
        'user/model', {**CONFIG, 'label_names': [name, 'last']}, multimix=dict(setting=name), recipe=dict(aa=name),
        summary='What it is.', evaluation=Evaluation('imagefolder', name, name, {'top1': 50.0, name: 1.0})))
    text.encode()  # no lone surrogates
    assert not any(unicodedata.category(character) in ('Cc', 'Cs') for character in text.replace('\n', ''))
    plain = str(model_card(
        'user/model', {**CONFIG, 'label_names': ['first', 'last']}, multimix=dict(setting='x'), recipe=dict(aa='x'),
        summary='What it is.', evaluation=Evaluation('imagefolder', 'x', 'x', {'top1': 50.0, 'y': 1.0})))
    body, plain_body = (part.split('---\n', 2)[2] for part in (text, plain))
    # Headings and tables are the same, with the same number of cells.
    outside_code = [re.sub(r'(?ms)^(````*)(?:yaml|python|bibtex)$.*?^\1$', '', part) for part in (body, plain_body)]
    outside_spans = [re.sub(r'(`+)(?!`).*?(?<!`)\1(?!`)', '', part) for part in outside_code]
    structure = [[line for line in part.splitlines() if line.startswith(('|', '#', '-', '>', '```'))]
                 for part in outside_spans]
    assert len(structure[0]) == len(structure[1])
    for character in '<>':
        assert outside_spans[0].count(character) == outside_spans[1].count(character)
    cell = next(line for line in body.splitlines() if line.startswith('| class names'))
    assert cell.endswith(', last |') and len(re.findall(r'(?<!\\)(?:\\\\)*\|', cell)) == 3
    assert not re.search(r'(?<!\\)\]\(|http:/|www\.', cell)
    assert metadata_errors(text) == []
    data = ModelCard(text).data
    assert data.model_name == 'model' and data.library_name == 'timm'
    if name == 'a_b_c':
        assert '| class names | a_b_c, last |' in body


@pytest.mark.parametrize('field', ['license', 'dataset_name', 'base_model', 'tags', 'datasets', 'language'])
@pytest.mark.parametrize('text', ['a\nb', 'a\n---\nb', '\x1b[0m', ' a', 'a\u2028b', '\u202ea'])
def test_fields_of_metadata_are_single_lines(field, text):
    with pytest.raises(ValueError, match=rf'card: {field} must be one line'):
        check_fields({field: [text] if CARD_FIELDS[field] is list else text})
    check_fields(dict(description='a\n\n- b'))


def test_card_without_a_run():
    text = str(model_card('user/model', CONFIG))
    assert metadata_errors(text) == [] and 'multimix' not in ModelCard(text).data.tags
    assert 'model-index' not in text and '## Recipe' not in text and '## Results' not in text


@pytest.mark.parametrize('broken', [
    'license: my-own', 'tags: timm', 'datasets: [a b]', 'base_model: /home/alice', 'language: [english]',
    'pipeline_tag: classify', 'a: [', '- a', 'model-index: [{name: x, results: [{task: {type: t}, dataset: {name: n, '
    'type: a b}, metrics: [{type: t, value: 1}]}]}]', 'model-index: [{name: x, results: []}]',
    'model-index: [{name: x, results: [{task: {type: t}, dataset: {name: n, type: a}, metrics: [{type: t}]}]}]'])
def test_the_checks_of_metadata_can_fail(broken):
    assert metadata_errors(f'---\n{broken}\n---\n')


@pytest.mark.parametrize('fields, message', [
    (dict(licence='mit'), 'no field'), (dict(tags='a'), 'a list of strings'), (dict(datasets=[1]), 'list of strings'),
    (dict(license=1), 'a string'), ('mit', 'lines')])
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        check_fields(fields)
    check_fields({name: ['x'] if kind is list else 'x' for name, kind in CARD_FIELDS.items()})


@pytest.mark.parametrize('name, expected', [
    ('', 'imagefolder'), ('demo/digits', 'digits'), ('torch/cifar10', 'cifar10'), ('hfds/user/images', 'user/images'),
    ('tfds/imagenet2012:5.1', 'imagenet2012'), ('wds/anything', 'webdataset'), ('folder', 'imagefolder'),
    ('hfds/a/b/c d', 'a_b_c_d'), ('mine/folder', 'imagefolder')])
def test_dataset_types_are_what_the_hub_takes(name, expected):
    assert dataset_type(name) == expected
    assert metadata_errors(str(model_card('u/m', CONFIG, evaluation=Evaluation(
        dataset_type(name), 'x', 'test', dict(top1=1.0))))) == []


# Cards of runs.

def write_run(folder: Path, checkpoint: dict | None = None, args: dict | None = None, **entries) -> Path:
    """Write a run folder without training."""
    folder.mkdir(exist_ok=True)
    settled = {**vars(build_training_parser().parse_args([])), 'card': {}, 'model': 'test_resnet', 'num_classes': 3,
               'img_size': 32, 'multimix': 'dense', 'eval_metric': 'top1', **(args or {})}
    model = timm.create_model('test_resnet', num_classes=3)
    state = dict(state_dict=model.state_dict(), args=settled, arch=settled['model'], epoch=1, metric=81.5, **entries)
    torch.save({**state, **(checkpoint or {})}, folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(settled))
    (folder / 'summary.csv').write_text(
        'epoch,train_loss,train_top1,eval_loss,eval_top1,lr\n0,1.5,40,1.2,60.0,0.1\n1,1.1,,0.8,81.5,0.1\n2,1,70,0.9,80,0')
    save_config(model, folder / 'config.json', label_names=['a', 'b', 'c'])
    return folder


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(run_export, 'draw_curve', lambda rows, path: False)


def card_of(folder: Path, target: Path, **options) -> str:
    target.mkdir(exist_ok=True)
    run_export.export(str(folder), str(target), 'user/model', card_only=True, **options)
    return (target / 'README.md').read_text()


def test_card_tells_the_metrics_of_the_weights_that_are_pushed(tmp_path):
    data = ModelCard(card_of(write_run(tmp_path / 'run'), tmp_path / 'card')).data
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        'Loss': 0.8, 'Top-1 accuracy': 0.815}
    assert (tmp_path / 'card' / 'training_curve.png').stat().st_size > 5000
    # The summary contains metrics of other weights. Calibration changes the loss.
    other = write_run(tmp_path / 'other', dict(metric=83.0))
    data = ModelCard(card_of(other, tmp_path / 'card')).data
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {'Top-1 accuracy': 0.83}
    calibrated = write_run(tmp_path / 'calibrated', temperature=1.5)
    assert [result.metric_name for result in ModelCard(card_of(calibrated, tmp_path / 'card')).data.eval_results] == [
        'Top-1 accuracy']
    unvalidated = write_run(tmp_path / 'unvalidated', args=dict(val_split=''))
    assert not ModelCard(card_of(unvalidated, tmp_path / 'card')).data.eval_results


def results_of(card: str) -> dict:
    return {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results or ()}


def test_card_tells_whose_weights_and_metrics_these_are(tmp_path, no_picture):
    """Several sets of weights were validated, and one was calibrated."""
    model = timm.create_model('test_resnet', num_classes=3).state_dict()
    run = write_run(tmp_path / 'run', dict(
        metric=14.08, metric_of='state_dict_teacher', state_dict_ema=model, state_dict_teacher=model, metrics=dict(
            state_dict=dict(top1=80.56, loss=0.5), state_dict_teacher=dict(top1=14.08, loss=2.0))),
        args=dict(multimix_teacher='ema', eval_metric='teacher_top1', dataset='demo/digits'))
    card = card_of(run, tmp_path / 'card')
    assert results_of(card) == {'Top-1 accuracy': 0.1408, 'Loss': 2.0} and '14.08 %' in card and '80.56' not in card
    assert "contains the teacher's weights after epoch 1" in card and 'calibrated' not in card
    assert ModelCard(card).data.eval_results[0].dataset_name == 'handwritten digits'
    card = card_of(run, tmp_path / 'card', weights='student')
    assert results_of(card) == {'Top-1 accuracy': 0.8056, 'Loss': 0.5} and 'contains the trained weights' in card
    card = card_of(run, tmp_path / 'card', weights='ema')  # not validated
    assert results_of(card) == {} and '14.08' not in card and 'contains the average of the weights' in card

    write_run(tmp_path / 'made', dict(
        metric=14.08, metric_of='state_dict', weights_of='state_dict_teacher', temperature=0.9,
        metrics=dict(state_dict=dict(top1=14.08))), args=dict(multimix_teacher='ema', eval_metric='teacher_top1'))
    (tmp_path / 'made' / 'model_best.pth.tar').rename(run / 'model_calibrated.pth.tar')
    for weights in ('best', 'teacher'):
        card = card_of(run, tmp_path / 'card', weights=weights)
        assert results_of(card) == {'Top-1 accuracy': 0.1408} and 'teacher_top1' not in card.split('## Recipe')[0]
        assert "contains the teacher's weights after epoch 1" in card
        assert 'calibrated: a temperature of 0.9 is folded into its classifier' in card
    card = card_of(run, tmp_path / 'card', weights='student')  # not calibrated
    assert results_of(card) == {'Top-1 accuracy': 0.8056, 'Loss': 0.5} and 'calibrated' not in card


@pytest.mark.parametrize('args, expected', [
    (dict(pretrained=True, model='resnet18.a1_in1k'), 'timm/resnet18.a1_in1k'),
    (dict(pretrained=True, model='resnet18'), 'timm/resnet18.a1_in1k'),
    (dict(model='resnet18'), None),
    (dict(pretrained=True, pretrained_path='/home/alice/w.pt'), None),
    (dict(pretrained=True, model='hf-hub:user/base@v2'), 'user/base'),
    (dict(initial_checkpoint='hf-hub:user/base@v2'), 'user/base'),
    (dict(pretrained=True, initial_checkpoint='/home/alice/w.pt'), None),
    (dict(pretrained=True, model='local-dir:/home/alice/model'), None)])
def test_base_model(tmp_path, no_picture, args, expected):
    data = ModelCard(card_of(write_run(tmp_path / 'run', args=args), tmp_path / 'card')).data
    assert data.base_model == expected


def test_card_of_a_run_that_was_resumed_with_other_options(tmp_path, no_picture):
    """The card describes all parts, each with the options that differ from the last part."""
    earlier = [
        dict(epoch=2, in_epoch=False, options=dict(multimix='dense', multimix_n=10, loss_pos_weight='/home/alice/w')),
        dict(epoch=5, in_epoch=True, options=dict(multimix='pooled', mixup=0.2))]
    run = write_run(tmp_path / 'run', args=dict(multimix='off', multimix_n=20, earlier=earlier))
    card = card_of(run, tmp_path / 'card')
    last, first, second = (yaml.safe_load(part.split('```')[0]) for part in card.split('```yaml\n')[1:])
    assert 'multimix' not in last and last['multimix_n'] == 20
    assert first == dict(multimix='dense', multimix_n=10, mixup=0.2) and second == dict(multimix='pooled', mixup=0.2)
    assert 'Before epoch 2, the run used' in card and 'Until partway through epoch 5, the run used' in card
    assert 'It was trained without MultiMix. Before epoch 2, it was trained with dense [MultiMix]' in card
    assert '## Citation' in card and 'alice' not in card
    assert metadata_errors(card) == [] and 'multimix' in ModelCard(card).data.tags


def test_recipe_repeats_the_training(tmp_path):
    given = ['--model', 'test_resnet', '--multimix', 'dense', '--multimix-alpha', '0.5', '1', '--lr', '0.3', '--mixup',
             '0.2', '--opt-kwargs', 'foreach=False', '--data-dir', str(tmp_path), '--img-size', '32', '--sched', 'wsd']
    args = vars(parse_args(given))
    options, left_out = run_export.recipe(args)
    assert left_out == [] and 'data_dir' not in options and 'device' not in options
    (tmp_path / 'recipe.yaml').write_text(
        card_of(write_run(tmp_path / 'run', args=args), tmp_path / 'card').split('```yaml\n')[1].split('```')[0])
    again = vars(parse_args(['--config', str(tmp_path / 'recipe.yaml'), '--data-dir', str(tmp_path)]))
    assert again == args


def test_nothing_private_is_told(tmp_path, monkeypatch, no_picture):
    """Each option with a text value is set to private data, and a card is written from these options."""
    monkeypatch.setattr(socket, 'gethostname', lambda: SECRETS['host'])
    monkeypatch.setattr(getpass, 'getuser', lambda: SECRETS['user'])
    monkeypatch.setenv('WANDB_API_KEY', SECRETS['wandb'])
    monkeypatch.setenv('HF_TOKEN', SECRETS['token'])
    secrets = list(SECRETS.values())
    fixed = ('model', 'eval_metric', 'config', 'timm_script', 'multimix', 'hub_weights')
    options = [option for name, (option, *_) in build_training_parser().options.items()
               if name not in fixed and 'choices' not in option.settings
               and (option.settings.get('type') is str or isinstance(option.settings.get('default'), dict))]
    assert len(options) > 40
    for shift, secret in enumerate(secrets):
        args = {}
        for index, option in enumerate(options):
            value = secrets[(index + shift) % len(secrets)]
            args[option.dest] = {'key': value} if isinstance(option.settings['default'], dict) else \
                [value] if option.settings.get('nargs') == '+' else f'prefix {value}' if index % 2 else value
        args['model'] = f'local-dir:{SECRETS["home"]}/model'
        run = write_run(tmp_path / f'run{shift}', args=args)
        text = card_of(run, tmp_path / 'card')
        for known in (*secrets, 'alice', 'gpu-17', str(tmp_path), os.path.expanduser('~') + '/'):
            assert known not in text, (secret, known)
        assert 'model: test_resnet' in text and metadata_errors(text) == []
        config = (tmp_path / 'card' / 'config.json').read_text()
        assert not any(known in config for known in secrets)


def test_a_token_that_gets_into_a_card_stops_it(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', SECRETS['token'])
    run = write_run(tmp_path / 'run', args=dict(card=dict(description=f'Use {SECRETS["token"]}')))
    with pytest.raises(HubError, match='private'):
        card_of(run, tmp_path / 'card')
    assert not (tmp_path / 'card' / 'README.md').exists()


def test_pretrained_file_is_not_in_the_config(tmp_path):
    model = timm.create_model('test_resnet', pretrained_cfg_overlay=dict(file='/home/alice/w.pt', source='file'))
    save_config(model, tmp_path / 'config.json')
    assert 'alice' not in (tmp_path / 'config.json').read_text()
    assert json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']['tag']
    save_config(model, tmp_path / 'config.json', from_scratch=True)
    assert not {'tag', 'license'} & set(json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg'])


def test_checkpoint_of_timms_own_script(tmp_path):
    run = write_run(tmp_path / 'run')
    args = yaml.safe_load((run / 'args.yaml').read_text())
    for stored in (argparse.Namespace(**args), None):
        write_run(run, dict(args=stored))
        assert '# model' in card_of(run, tmp_path / 'card')


def test_class_names():
    reader = SimpleNamespace(class_to_idx=dict(cat=1, dog=0))
    wrapper = SimpleNamespace(dataset=SimpleNamespace(reader=reader))
    assert ordered_names(dataset_classes(wrapper), 2) == ['dog', 'cat']
    assert ordered_names(dataset_classes(wrapper), 3) is None
    reader.class_to_idx['hound'] = 0
    assert ordered_names(dataset_classes(wrapper), 2) is None
    assert ordered_names(dataset_classes([]), 2) is None


def test_summary_that_is_half_written(tmp_path):
    assert read_summary(str(tmp_path)) == [] and not draw_curve([], str(tmp_path / 'x.png'))
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_top1\n0,1.0,50\n1,0.5\n2,')
    assert read_summary(str(tmp_path)) == [
        dict(epoch=0, train_loss=1.0, eval_top1=50.0), dict(epoch=1, train_loss=0.5), dict(epoch=2)]
    assert draw_curve(read_summary(str(tmp_path)), str(tmp_path / 'x.png'))
