"""The script with a teacher: views, validation of both, the better one, resuming, combinations."""
import pytest
import timm
import torch
from distributed_helpers import run_script

pytest_plugins = ['training_helpers']

TEACHER = ('--multimix', 'dense', '--multimix-teacher', 'ema')


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_both_are_validated_and_saved(script, image_folder):
    assert script.train(image_folder, *TEACHER, epochs=2, multimix_teacher_decay=0.5) == 0, script.text
    rows = script.summary()
    assert {'eval_top1', 'eval_teacher_top1', 'eval_loss', 'eval_teacher_loss'} <= rows[0].keys()
    assert rows[1]['eval_loss'] != rows[1]['eval_teacher_loss']
    checkpoint = script.checkpoint()
    assert not same(checkpoint['state_dict'], checkpoint['state_dict_teacher'])
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(checkpoint['state_dict_teacher'])
    assert 'teacher_top1' in script.text and 'ship those' in script.text


@pytest.mark.parametrize('metric, entry', [
    ('loss', None), ('student_loss', 'state_dict'), ('teacher_loss', 'state_dict_teacher')])
def test_metric_is_of_the_weights_that_it_names_or_of_the_better(script, image_folder, metric, entry):
    assert script.train(image_folder, *TEACHER, eval_metric=metric, multimix_teacher_decay=0.5) == 0, script.text
    losses = {who: float(script.summary()[0][f'eval_{prefix}loss'])
              for who, prefix in (('state_dict', ''), ('state_dict_teacher', 'teacher_'))}
    entry = entry or min(losses, key=losses.get)
    checkpoint = script.checkpoint('model_best.pth.tar')
    assert checkpoint['metric_of'] == entry and checkpoint['metric'] == pytest.approx(losses[entry])
    best = script.run_folder() / 'model_best.pth.tar'
    assert script('--config', script.run_folder() / 'args.yaml', '--validate', best) == 0
    assert f'loss {losses[entry]:.4g}' in script.text
    if metric == 'loss':  # whichever was the better
        other, = losses.keys() - {entry}
        torch.save({**checkpoint, 'metric_of': other}, script.folder / 'other.pth.tar')
        assert script('--config', script.run_folder() / 'args.yaml', '--validate', 'other.pth.tar') == 0
        assert f'loss {losses[other]:.4g}' in script.text and losses[other] != losses[entry]


def test_one_average_serves_as_both(script, image_folder):
    assert script.train(
        image_folder, *TEACHER, '--model-ema', '--model-ema-warmup', model_ema_decay=0.9,
        multimix_teacher_decay=0.9, eval_metric='teacher_top1') == 0, script.text
    checkpoint = script.checkpoint()
    assert 'state_dict_teacher' not in checkpoint and checkpoint['metric_of'] == 'state_dict_ema'
    assert script.train(
        image_folder, *TEACHER, multimix_teacher_decay=0.9, experiment='apart') == 0, script.text
    apart = script.checkpoint(name='apart')
    assert same(apart['state_dict_teacher'], checkpoint['state_dict_ema'])
    assert same(apart['state_dict'], checkpoint['state_dict'])
    row, expected = script.summary()[0], script.summary('apart')[0]
    assert all(row[name] == expected[name] for name in ('eval_loss', 'eval_teacher_loss'))
    assert row['eval_loss'] != row['eval_teacher_loss']


def test_average_of_its_own_beside_the_teacher(script, image_folder):
    assert script.train(
        image_folder, *TEACHER, '--model-ema', model_ema_decay=0.5, eval_metric='student_top1') == 0, script.text
    checkpoint = script.checkpoint()
    assert {'state_dict', 'state_dict_ema', 'state_dict_teacher'} <= checkpoint.keys()
    assert checkpoint['metric_of'] == 'state_dict_ema'


@pytest.mark.parametrize('views', [1, 2])
def test_resumed_run_is_the_run_uninterrupted(script, image_folder, views):
    options = dict(epochs=3, multimix_views=views, multimix_teacher_decay=0.9, multimix_distill_ramp_epochs=2)
    assert script.train(image_folder, *TEACHER, **options) == 0, script.text
    assert script.train(image_folder, *TEACHER, experiment='parts', stop_epoch=2, **options) == 0, script.text
    assert script.train(image_folder, *TEACHER, experiment='parts', resume='auto', **options) == 0, script.text
    whole, parts = script.checkpoint(), script.checkpoint(name='parts')
    assert same(whole['state_dict'], parts['state_dict'])
    assert same(whole['state_dict_teacher'], parts['state_dict_teacher'])
    assert [row['eval_teacher_loss'] for row in script.summary()] == [
        row['eval_teacher_loss'] for row in script.summary('parts')]


@pytest.mark.parametrize('options', [
    ('--mixup', '0.5', '--cutmix', '0.5'),
    ('--mixup', '0.5', '--no-prefetcher'),
    ('--reprob', '0.5', '--grad-accum-steps', '2', '--channels-last'),
    ('--amp', '--amp-dtype', 'bfloat16', '--clip-grad', '1'),
    ('--train-img-sizes', '32', '64', '--train-batch-sizes', '8', '4'),
    ('--torchcompile', 'eager'),
    ('--bce-loss', '--multimix-distill-temperature', '2'),
    ('--save-images', '--log-interval', '1'),
])
def test_two_views_go_with(script, image_folder, options):
    assert script.train(image_folder, *TEACHER, *options, multimix_views=2) == 0, script.text
    assert float(script.summary()[0]['eval_teacher_loss']) > 0


def test_another_model_teaches(script, image_folder, tmp_path):
    teacher = timm.create_model('test_vit', num_classes=3, img_size=160)
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / 'teacher.pth.tar')
    options = dict(multimix_teacher='test_vit', multimix_teacher_path=tmp_path / 'teacher.pth.tar')
    assert script.train(image_folder, '--multimix', 'dense', img_size=160, **options) == 0, script.text
    assert 'state_dict_teacher' not in script.checkpoint() and 'eval_teacher_top1' not in script.summary()[0]
    other = timm.create_model('test_vit', num_classes=7)
    torch.save(dict(state_dict=other.state_dict()), tmp_path / 'teacher.pth.tar')
    script.train(image_folder, '--multimix', 'dense', experiment='other', img_size=160, **options)
    assert script.status == 2 and '--multimix-teacher test_vit' in script.text


@pytest.mark.parametrize('options, message', [
    (('--multimix-views', '2'), 'The second view is for a teacher'),
    ((*TEACHER, '--multimix-views', '2', '--aug-splits', '2', '--aa', 'augmix'), '--aug-splits are views already'),
    ((*TEACHER, '--multimix-teacher-decay', '1'), 'a share below 1'),
    ((*TEACHER, '--multimix-distill-weight', '-1'), 'distill_weight is a share'),
    (('--multimix-teacher', 'test_resnot'), '--multimix-teacher test_resnot: timm has no such model'),
    (('--multimix-teacher', 'test_vit', '--multimix-teacher-path', 'none.pth'), '--multimix-teacher-path none.pth'),
    (('--eval-metric', 'teacher_top1'), '--eval-metric must be one of'),
])
def test_refused_before_training(script, image_folder, options, message):
    assert script.train(image_folder, '--multimix', 'dense', *options) == 2
    assert message in script.text and script.written() == []


def test_options_of_a_teacher_without_one_are_told(script, image_folder):
    assert script.train(image_folder, '--multimix', 'dense', '--multimix-distill-weight', '0.3', epochs=1) == 0
    assert '--multimix-distill-weight: without effect, add --multimix-teacher ema' in script.text


def test_two_processes(tmp_path, image_folder):
    folder = tmp_path / 'work'
    folder.mkdir()
    options = dict(
        data_dir=image_folder, model='test_resnet', img_size=32, batch_size=4, epochs=1, warmup_epochs=0, lr=0.01,
        opt='sgd', workers=0, experiment='run', multimix_n=20, device='cpu', multimix_views=2,
        multimix_teacher_decay=0.9)
    argv = [part for name, value in options.items() for part in (f'--{name.replace("_", "-")}', value)]
    outcomes = run_script(folder, 2, *argv, *TEACHER, '--multimix-gather')
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert 'teacher_top1' in outcomes[0].text
