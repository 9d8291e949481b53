"""Named weight sets in a checkpoint: their entries and metrics."""
import argparse

import pytest

from timm_multimix.build.saved_weights import (
    described,
    metrics_of,
    saved_weights,
    selects_alike,
    split_metric,
    weights_entry,
)
from timm_multimix.training.config import parse_args

TEACHER = dict(multimix='dense', multimix_teacher='ema')
ALL = dict(state_dict={}, state_dict_ema={}, state_dict_teacher={})
CALIBRATED = dict(state_dict={}, temperature=2.0)


@pytest.mark.parametrize('name, expected', [
    ('top1', (None, 'top1')), ('teacher_top1', ('teacher', 'top1')), ('ema_loss', ('ema', 'loss')),
    ('student_micro_f1', ('student', 'micro_f1')), ('micro_f1', (None, 'micro_f1')), ('', (None, ''))])
def test_metric_names_contain_the_weight_set(name, expected):
    assert split_metric(name) == expected


@pytest.mark.parametrize('checkpoint, expected', [
    (ALL, dict(student='state_dict', ema='state_dict_ema', teacher='state_dict_teacher')),
    (dict(state_dict={}, state_dict_ema={}), dict(student='state_dict', ema='state_dict_ema')),
    (dict(state_dict={}, state_dict_ema={}, args=argparse.Namespace(**TEACHER)),
     dict(student='state_dict', ema='state_dict_ema', teacher='state_dict_ema')),
    (dict(state_dict={}, state_dict_ema={}, args={**TEACHER, 'multimix': 'off'}),
     dict(student='state_dict', ema='state_dict_ema')),
    (dict(state_dict={}, args=TEACHER), dict(student='state_dict')),
    (dict(model={}), dict(student='model')),
    (dict(CALIBRATED, eval_weights='teacher', args=TEACHER), dict(teacher='state_dict')),
    (dict(CALIBRATED, eval_weights='ema', args=TEACHER), dict(ema='state_dict', teacher='state_dict')),
    (dict(CALIBRATED, eval_weights='student'), dict(student='state_dict')),
    (dict(CALIBRATED, metric_of='state_dict', weights_of='state_dict_teacher', args=TEACHER),  # of version 0.1
     dict(teacher='state_dict')),
])
def test_entries_of_weight_sets(checkpoint, expected):
    assert saved_weights(checkpoint) == expected


def test_weights_are_described():
    assert [described(ALL, entry) for entry in ALL] == [
        'the trained weights', 'the average of the weights', "the teacher's weights"]
    assert described(dict(state_dict={}, state_dict_ema={}, args=TEACHER), 'state_dict_ema') == "the teacher's weights"
    assert described(dict(CALIBRATED, eval_weights='ema'), 'state_dict') == 'the average of the weights'


def test_metrics_of_an_entry():
    metrics = dict(state_dict=dict(top1=80.0, loss=1.0), state_dict_teacher=dict(top1=40.0, loss=2.0))
    checkpoint = dict(ALL, metric=80.0, eval_weights='student', metrics=metrics)
    assert metrics_of(checkpoint, 'state_dict') == dict(top1=80.0, loss=1.0)
    assert metrics_of(checkpoint, 'state_dict_teacher') == dict(top1=40.0, loss=2.0)
    assert metrics_of(checkpoint, 'state_dict_ema', 'top1') == {}
    assert metrics_of(dict(CALIBRATED, metrics=metrics), 'state_dict') == dict(top1=80.0)
    of_timm = dict(state_dict={}, state_dict_ema={}, metric=40.0)
    assert metrics_of(of_timm, 'state_dict_ema', 'top1') == dict(top1=40.0)
    assert metrics_of(of_timm, 'state_dict', 'top1') == {} == metrics_of(dict(state_dict={}), 'state_dict', 'top1')


@pytest.mark.parametrize('checkpoint, weights, expected', [
    (dict(ALL, eval_weights='teacher'), 'best', 'state_dict_teacher'),
    (dict(ALL, eval_weights='teacher'), 'student', 'state_dict'),
    (dict(ALL, eval_weights='student', metric_of='state_dict_ema'), 'best', 'state_dict'),
    (dict(ALL, metric_of='state_dict_teacher'), 'best', 'state_dict_teacher'),  # of version 0.1
    (dict(ALL, metric_of=None), 'best', 'state_dict_ema'),
    (dict(state_dict={}, state_dict_ema={}, eval_weights='teacher', args=TEACHER), 'best', 'state_dict_ema'),
    (dict(state_dict={}, state_dict_ema={}), 'best', 'state_dict_ema'),  # of timm
    (dict(state_dict={}), 'best', 'state_dict'), (dict(model={}), 'best', 'model'),
    (dict(state_dict={}, eval_weights='teacher'), 'best', 'state_dict'),
    (dict(state_dict={}), 'teacher', None), (dict(CALIBRATED, eval_weights='ema'), 'student', None),
    (dict(CALIBRATED, eval_weights='ema'), 'best', 'state_dict'),
])
def test_entry_of_weights(checkpoint, weights, expected):
    assert weights_entry(checkpoint, weights) == expected


@pytest.mark.parametrize('checkpoint, expected', [
    (dict(state_dict={}), True),  # of timm
    (dict(state_dict={}, args=dict(eval_metric='top5')), False),
    (dict(ALL, eval_weights='teacher', args=dict(TEACHER, eval_metric='top1')), False),
    (dict(ALL, metric_of='state_dict', args=dict(TEACHER, eval_metric='top1')), True),  # of version 0.1
    (dict(ALL, metric_of='state_dict_teacher', args=dict(TEACHER, eval_metric='teacher_top1')), False),
    (dict(state_dict={}, args=dict(eval_metric='loss', val_split='')), False),
])
def test_selection_of_the_best_checkpoint(checkpoint, expected):
    assert selects_alike(checkpoint, parse_args(['--eval-weights', 'student'])) == expected
    without_validation = parse_args(['--val-split', ''])
    assert selects_alike(dict(checkpoint, args=dict(eval_metric='loss', val_split='')), without_validation)
    assert not selects_alike(dict(checkpoint, args=dict(eval_metric='loss', val_split='a')), without_validation)


def test_a_run_resumed_with_another_selection_selects_a_new_best(script, image_folder):
    changed = dict(eval_weights='student', eval_metric='loss')
    assert script.train(image_folder, '--model-ema', epochs=1) == 0, script.text
    first = script.checkpoint('model_best.pth.tar')
    assert script.train(image_folder, '--model-ema', epochs=2, resume='auto', **changed) == 0, script.text
    assert 'selected by another metric or by other weights' in script.text
    best = script.checkpoint('model_best.pth.tar')
    assert (first['epoch'], best['epoch']) == (0, 1)  # whatever the metric of the first epoch
    files = dict(best['saver']['checkpoint_files'])
    assert files == {'checkpoint-0.pth.tar': None}
    assert script.train(image_folder, '--model-ema', epochs=3, resume='auto', **changed) == 0
    assert 'selected by another metric' not in script.text


def test_weights_that_are_not_validated(script, image_folder):
    options = dict(eval_weights='student', val_split='')
    assert script.train(image_folder, '--model-ema', **options) == 2 and '--val-split' in script.lines[-1]
    assert script.train(image_folder) == 0
    best = script.run_folder() / 'model_best.pth.tar'
    assert script.train(image_folder, validate=best, eval_weights='ema') == 2
    assert script.lines[-1].endswith('contains only the weights student.')
    assert script.train(image_folder, validate=best) == 0
    assert script.lines[-1].endswith('(the trained weights)')
