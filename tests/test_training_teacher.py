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
    assert 'teacher_top1' in script.text and "Measured with the teacher's weights" in script.text


def test_one_average_serves_as_both(script, image_folder):
    assert script.train(
        image_folder, *TEACHER, '--model-ema', '--model-ema-warmup', model_ema_decay=0.9,
        multimix_teacher_decay=0.9, eval_metric='teacher_top1') == 0, script.text
    checkpoint = script.checkpoint()
    assert 'state_dict_teacher' not in checkpoint and checkpoint['eval_weights'] == 'teacher'
    assert script.train(
        image_folder, *TEACHER, multimix_teacher_decay=0.9, experiment='apart') == 0, script.text
    apart = script.checkpoint(name='apart')
    assert same(apart['state_dict_teacher'], checkpoint['state_dict_ema'])
    assert same(apart['state_dict'], checkpoint['state_dict'])
    row, expected = script.summary()[0], script.summary('apart')[0]
    assert all(row[name] == expected[name] for name in ('eval_loss', 'eval_teacher_loss'))
    assert row['eval_loss'] != row['eval_teacher_loss']


COLUMNS = dict(student='eval_loss', ema='eval_ema_loss', teacher='eval_teacher_loss')


@pytest.mark.parametrize('argv, weights', [
    ((), 'teacher'), (('--model-ema',), 'ema'), (('--model-ema', '--eval-weights', 'student'), 'student'),
    (('--model-ema', '--eval-metric', 'teacher_loss'), 'teacher')])
def test_one_set_of_weights_selects_the_best_checkpoint(script, image_folder, argv, weights):
    """Its metrics are those of the checkpoint, whichever weights are better. The others are in the summary."""
    assert script.train(
        image_folder, *TEACHER, '--eval-metric', 'loss', *argv, model_ema_decay=0.97, multimix_teacher_decay=0.5,
        lr=0.1, epochs=2) == 0, script.text
    best = script.checkpoint('model_best.pth.tar')
    entries = {name: dict(student='state_dict').get(name, f'state_dict_{name}')
               for name in COLUMNS if name != 'ema' or '--model-ema' in argv}
    losses = [{name: float(row[COLUMNS[name]]) for name in entries} for row in script.summary()]
    assert len(set(losses[best['epoch']].values())) == len(entries) and set(entries.values()) <= best.keys()
    assert {name: best['metrics'][entry]['loss'] for name, entry in entries.items()} == pytest.approx(
        losses[best['epoch']])
    assert best['eval_weights'] == weights and 'metric_of' not in best
    assert best['metric'] == pytest.approx(min(row[weights] for row in losses))
    assert f'({entries[weights]}). Export these weights' in script.text
    path = script.run_folder() / 'model_best.pth.tar'
    for option, name in (((), weights), (('--eval-weights', 'student'), 'student')):
        assert script('--config', script.run_folder() / 'args.yaml', *option, '--validate', path) == 0, script.text
        assert f'loss {losses[best["epoch"]][name]:.4g}' in script.text


def test_without_a_teacher_the_average_selects_as_in_timm(script, image_folder):
    options = dict(model_ema_decay=0.97, lr=0.1, eval_metric='loss')
    assert script.train(image_folder, '--model-ema', **options) == 0, script.text
    checkpoint, row = script.checkpoint(), script.summary()[0]
    assert checkpoint['eval_weights'] == 'ema' and not any('ema_' in name for name in row)
    losses = {entry: metrics['loss'] for entry, metrics in checkpoint['metrics'].items()}
    assert losses == pytest.approx(
        dict(state_dict=float(row['eval_student_loss']), state_dict_ema=float(row['eval_loss'])))
    assert losses['state_dict'] < losses['state_dict_ema'] and '(state_dict_ema). Export' in script.text


def test_calibrated_checkpoint_names_its_weights(script, image_folder, tmp_path):
    learns = dict(epochs=4, lr=0.1)  # a model that learned nothing has no temperature
    assert script.train(
        image_folder, *TEACHER, '--calibrate', '0.25', multimix_teacher_decay=0.9, eval_metric='teacher_top1',
        **learns) == 0
    best, calibrated = script.checkpoint('model_best.pth.tar'), script.checkpoint('model_calibrated.pth.tar')
    assert "Calibrated the teacher's weights" in script.text
    assert torch.equal(calibrated['state_dict']['conv1.0.weight'], best['state_dict_teacher']['conv1.0.weight'])
    assert calibrated['eval_weights'] == 'teacher' and calibrated['metric'] == best['metric']
    teachers = best['metrics']['state_dict_teacher']
    assert calibrated['metrics'] == {'state_dict': {name: teachers[name] for name in ('top1', 'top5')}}
    assert script('--config', script.run_folder() / 'args.yaml', '--validate',
                  script.run_folder() / 'model_calibrated.pth.tar') == 0
    assert f'top1 {teachers["top1"]:.4g}' in script.text
    script.train(image_folder, *TEACHER, '--calibrate', '0.25', experiment='by-loss', eval_metric='teacher_loss',
                 **learns)
    assert 'metric' not in script.checkpoint('model_calibrated.pth.tar', 'by-loss')  # it is another one now


def test_resuming_without_the_teacher_is_logged(script, image_folder):
    def resume(*argv, **options):
        assert script.train(image_folder, *argv, resume='auto', val_interval=9, **options) == 0, script.text
        return script.text

    shared = dict(model_ema_decay=0.9, multimix_teacher_decay=0.9, eval_metric='teacher_top1')
    assert script.train(image_folder, *TEACHER, '--model-ema', **shared) == 0, script.text
    assert 'another objective' not in resume(*TEACHER, '--model-ema', epochs=2, **shared)
    text = resume(*TEACHER, '--model-ema', epochs=3, **{**shared, 'model_ema_decay': 0.99})
    assert '--model-ema-decay was 0.9 and is 0.99' in text
    text = resume('--multimix', 'dense', '--model-ema', epochs=4, model_ema_decay=0.99)
    assert '--multimix-teacher was ema and is none' in text
    rows = script.summary()  # every row has its values in its own columns
    assert [bool(row['eval_teacher_loss']) for row in rows] == [True, True, True, False]
    assert [bool(row['eval_ema_loss']) for row in rows] == [False, False, True, False]
    assert all(float(row['lr']) <= 0.01 and 0 <= float(row['eval_top1']) <= 100 and None not in row for row in rows)


@pytest.mark.parametrize('options', [
    ('--mixup', '0.5', '--cutmix', '0.5'),
    ('--reprob', '0.5', '--grad-accum-steps', '2', '--channels-last'),
    ('--amp', '--amp-dtype', 'bfloat16', '--clip-grad', '1'),
    ('--train-img-sizes', '32', '64', '--train-batch-sizes', '8', '4'),
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
    (('--multimix-views', '2'), '--multimix-views 2 requires a teacher'),
    ((*TEACHER, '--multimix-views', '2', '--aug-splits', '2', '--aa', 'augmix'), '--aug-splits already creates views'),
    ((*TEACHER, '--multimix-teacher-decay', '1'), '--multimix-teacher-decay must be in'),
    ((*TEACHER, '--multimix-distill-weight', '-1'), '--multimix-distill-weight must be in'),
    (('--multimix-teacher', 'test_resnot'), '--multimix-teacher test_resnot: timm has no such model'),
    (('--multimix-teacher', 'test_vit', '--multimix-teacher-path', 'none.pth'), '--multimix-teacher-path none.pth'),
    (('--eval-metric', 'teacher_top1'), '--eval-weights must be one of student'),
    ((*TEACHER, '--eval-weights', 'ema'), '--eval-weights must be one of teacher, student'),
    ((*TEACHER, '--eval-metric', 'teacher_top1', '--eval-weights', 'student'), 'contradicts --eval-weights student'),
])
def test_refused_before_training(script, image_folder, options, message):
    assert script.train(image_folder, '--multimix', 'dense', *options) == 2
    assert message in script.text and script.written() == []


def test_unused_teacher_options_are_logged(script, image_folder):
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


def test_grayscale_images_and_a_pretrained_teacher(script, image_folder, tmp_path):
    """timm's statistics of three channels are averaged once, so that its loaders do not warn of it."""
    model = timm.create_model('test_resnet', num_classes=3, in_chans=1)
    torch.save(model.state_dict(), tmp_path / 'teacher.pth')
    options = dict(in_chans=1, multimix_teacher='test_resnet', multimix_teacher_path=tmp_path / 'teacher.pth')
    assert script.train(image_folder, '--multimix', 'pooled', **options) == 0
    assert 'mean (0.5,), std (0.5,)' in script.text and 'mean/std' not in script.text
