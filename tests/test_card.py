"""Model cards: content, metadata that the Hub accepts, and removal of private data."""
import argparse
import json
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard

from timm_multimix.common.errors import UsageError
from timm_multimix.data.class_names import dataset_classes, ordered_names
from timm_multimix.hub import HubError
from timm_multimix.hub import export as run_export
from timm_multimix.hub.card import CARD_FIELDS, check_fields, eval_results, is_ours, model_card
from timm_multimix.hub.models import save_config
from timm_multimix.hub.recipe import Recipe
from timm_multimix.hub.summary import draw_curve, read_summary
from timm_multimix.options import build_training_parser
from timm_multimix.training.config import parse_args

CONFIG = dict(architecture='resnet18', num_classes=3, label_names=['a|b', 'c', 'd'], pretrained_cfg=dict(
    input_size=[3, 64, 64], interpolation='bicubic', crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3))
TOKEN = 'hf_abcdefghijklmnopqrst'
# Values that reveal where a run was trained.
SECRETS = (
    '/home/alice/private', 'C:\\Users\\alice\\runs', '\\\\server\\alice', '../alice/secret.pt', 'alice/weights',
    '~/alice', 'secret.pt', 'gpu-17.example.org', 'alice@gpu-17', 'alice-pc:8080', '10.20.30.40', 'fe80::1',
    'pipe:alice', 'https://alice:password@example.org/data', 's3://alice/data', 'file:/alice', 'local-dir:/alice',
    'hfds//alice/x', 'hfds/../alice', 'hf-hub:/alice', 'resnet18.alice.example')


def test_card_says_how_to_use_the_model():
    card = model_card(
        'user/model', CONFIG, revision='v1', summary='What it is.', has_curve=True,
        recipe=Recipe(dict(lr=0.1, multimix='dense', dist_bn='off'), ('opt_kwargs',)),
        results=eval_results(dict(top1=91.25, top5=99.0, loss=0.5, map=50.0), 'cifar10', 'CIFAR-10', 'test'),
        fields=dict(license='mit', datasets=['uoft-cs/cifar10'], base_model='timm/resnet18.a1_in1k', language=['en'],
                    tags=['more'], description='A description.'))
    text = str(card)
    assert metadata_errors(text) == []
    code = text.split('```python\n')[1].split('```')[0]
    assert "timm.create_model('hf-hub:user/model@v1', pretrained=True)" in code
    compile(code, 'card', 'exec')
    for part in ('# model\n', 'What it is.', 'A description.', '91.25 %', '(training_curve.png)', 'a\\|b, c, d',
                 'multimix: dense', 'opt_kwargs', "dist_bn: 'off'", '@inproceedings{venkataramanan2023multimix',
                 '2206.14868'):
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
    """Names of classes, datasets and metrics cannot leave their cell or line."""
    text, plain = (str(model_card(
        'user/model', {**CONFIG, 'label_names': [value, 'last']}, summary='What it is.',
        results=eval_results({'top1': 50.0, value: 1.0}, 'imagefolder', value, 'validation')))
        for value in (name, 'x'))
    text.encode()  # no lone surrogates
    assert not any(unicodedata.category(character) in ('Cc', 'Cs') for character in text.replace('\n', ''))
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
        'Top-1 accuracy': 0.815}
    assert (tmp_path / 'card' / 'training_curve.png').stat().st_size > 5000
    calibrated = write_run(tmp_path / 'calibrated', temperature=1.5, metrics=dict(state_dict=dict(top1=81.5, loss=0.8)))
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


def recipe_in(card: str) -> dict:
    return yaml.safe_load(card.split('```yaml\n')[1].split('```')[0])


def test_recipe_repeats_the_training(tmp_path, no_picture):
    given = ['--model', 'test_resnet', '--multimix', 'dense', '--multimix-alpha', '0.5', '1', '--lr', '0.3', '--mixup',
             '0.2', '--opt', 'lookahead_adamw', '--opt-kwargs', 'foreach=False', '--data-dir', str(tmp_path),
             '--img-size', '32', '--sched', 'wsd', '--aa', 'rand-m9-mstd0.5-inc1', '--lr-decay-fn', '1-sqrt', '--gp',
             'max', '--loss', 'bce', '--loss-pos-weight', '1.5,2,3', '--channels-last', '--calibrate',
             '--multimix-teacher', 'ema', '--torchcompile-mode', 'max-autotune', '--dist-bn', '']
    args = vars(parse_args(given))
    card = card_of(write_run(tmp_path / 'run', args=args), tmp_path / 'card')
    assert 'are omitted' not in card and not {'data_dir', 'device'} & recipe_in(card).keys()
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe_in(card)))
    assert vars(parse_args(['--config', str(tmp_path / 'recipe.yaml'), '--data-dir', str(tmp_path)])) == args


@pytest.mark.parametrize('option, value', [
    ('eval_weights', 'ema'), ('dataset', 'hfds/alice/cats'), ('dataset', 'torch/cifar10'),
    ('dataset', 'tfds/imagenet2012:5.*.*'),
    ('model', 'resnet18.a1_in1k'), ('model', 'hf-hub:alice/base@v1.0'), ('initial_checkpoint', 'hf-hub:alice/base'),
    ('val_split', 'test[:50%]'), ('calibrate', '0.25'), ('target_key', 'cat,dog'), ('kd_model_name', 'resnet50'),
    ('multimix_teacher', 'resnet50.a1_in1k'), ('aa', 'augmix-m5-w4-d2'), ('loss_pos_weight', 'neg_pos'),
    ('model_kwargs', dict(drop_rate=0.1, depths=[1, 2]))])
def test_public_names_are_in_the_recipe(tmp_path, monkeypatch, no_picture, option, value):
    """Names in registries, on the Hub and in datasets are public, also if a part of them is the user's name."""
    monkeypatch.setenv('USER', 'alice')
    monkeypatch.setenv('LOGNAME', 'alice')
    card = card_of(write_run(tmp_path / 'run', args={option: value}), tmp_path / 'card')
    assert recipe_in(card)[option] == value and 'are omitted' not in card and metadata_errors(card) == []


@pytest.mark.parametrize('dataset, kind', [
    ('', 'imagefolder'), ('demo/digits', 'digits'), ('torch/cifar10', 'cifar10'), ('hfds/user/images', 'user/images'),
    ('tfds/imagenet2012:5.1', 'imagenet2012'), ('wds/anything', 'webdataset'), ('folder', 'imagefolder'),
    ('hfds/a/b/c d', 'imagefolder'), ('mine/folder', 'imagefolder')])
def test_dataset_types_are_what_the_hub_takes(tmp_path, no_picture, dataset, kind):
    card = card_of(write_run(tmp_path / 'run', args=dict(dataset=dataset)), tmp_path / 'card')
    assert metadata_errors(card) == []
    data = ModelCard(card).data
    assert data.eval_results[0].dataset_type == kind
    assert data.datasets == (['user/images'] if dataset == 'hfds/user/images' else None)


def texts_of(secret: str) -> dict:
    """Return values with the secret for all options that accept text, also in lists and mappings."""
    parser, values = build_training_parser(), {}
    for name in vars(parser.parse_args([])):
        for value in (secret, [secret], {'key': secret}):
            try:
                parser.parse_values({name: value})
            except UsageError:  # a number, a flag, or a choice
                continue
            values[name] = value
    return values


@pytest.mark.parametrize('secret', SECRETS)
def test_paths_and_hosts_are_not_published(tmp_path, no_picture, secret):
    """The value is given to every option of the parser that accepts a text. The card only has the options' names."""
    values = texts_of(secret)
    assert len(values) > 30 and {'opt_kwargs', 'wandb_tags', 'multimix_teacher', 'data_dir'} <= values.keys()
    earlier = [dict(epoch=1, in_epoch=False, options=texts_of(f'{secret}/earlier'))]
    args = {**values, 'pretrained': True, 'pretrained_path': secret, 'earlier': earlier}
    text = card_of(write_run(tmp_path / 'run', args=args), tmp_path / 'card')
    assert secret not in text and 'alice' not in text and metadata_errors(text) == []
    assert recipe_in(text)['model'] == 'test_resnet' and 'omitted: aa, ' in text
    assert secret not in (tmp_path / 'card' / 'config.json').read_text()


@pytest.mark.parametrize('value', [dict(a='gelu'), {'/home/alice': 1}, dict(a=[1, 'b']), dict(a=dict(b='c'))])
def test_text_in_keyword_arguments_is_not_published(tmp_path, no_picture, value):
    card = card_of(write_run(tmp_path / 'run', args=dict(model_kwargs=value)), tmp_path / 'card')
    assert 'model_kwargs' not in recipe_in(card) and 'omitted: model_kwargs.' in card


def test_a_token_that_gets_into_a_card_stops_it(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'plainsecret')
    for args in (dict(card=dict(description=f'Use {TOKEN}')), dict(opt=TOKEN), dict(opt='plainsecret')):
        run = write_run(tmp_path / 'run', args=args)
        with pytest.raises(HubError, match='would contain an access token'):
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
