"""The sets of weights in a checkpoint: where they are, whose metric is whose, what becomes of them on resuming."""
import argparse
from types import SimpleNamespace

import pytest

from timm_multimix.build.saved_weights import (
    changes,
    described,
    entries,
    metrics_of,
    saved_weights,
    split_metric,
    weights_of_metric,
)
from timm_multimix.training.validation import entry_to_validate

TEACHER = dict(multimix='dense', multimix_teacher='ema')
ALL = dict(state_dict={}, state_dict_ema={}, state_dict_teacher={})


@pytest.mark.parametrize('name, expected', [
    ('top1', (None, 'top1')), ('teacher_top1', ('teacher', 'top1')), ('ema_loss', ('ema', 'loss')),
    ('student_micro_f1', ('student', 'micro_f1')), ('micro_f1', (None, 'micro_f1')), ('', (None, ''))])
def test_metrics_say_whose_they_are(name, expected):
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
    (dict(state_dict={}, weights_of='state_dict_teacher', args=TEACHER), dict(teacher='state_dict')),
    (dict(state_dict={}, weights_of='state_dict_ema', args=TEACHER), dict(ema='state_dict', teacher='state_dict')),
    (dict(state_dict={}, weights_of='state_dict'), dict(student='state_dict')),
])
def test_weights_have_their_places(checkpoint, expected):
    assert saved_weights(checkpoint) == expected


def test_weights_are_described():
    assert [described(ALL, entry) for entry in ALL] == [
        'the trained weights', 'the average of the weights', "the teacher's weights"]
    assert described(dict(state_dict={}, state_dict_ema={}, args=TEACHER), 'state_dict_ema') == "the teacher's weights"
    assert described(dict(state_dict={}, weights_of='state_dict_ema'), 'state_dict') == 'the average of the weights'


def test_metrics_are_of_the_very_weights():
    metrics = dict(state_dict=dict(top1=80.0, loss=1.0), state_dict_teacher=dict(top1=40.0, loss=2.0))
    checkpoint = dict(ALL, metric=80.0, metric_of='state_dict', metrics=metrics)
    assert metrics_of(checkpoint, 'state_dict') == dict(top1=80.0, loss=1.0)
    assert metrics_of(checkpoint, 'state_dict_teacher') == dict(top1=40.0, loss=2.0)
    assert metrics_of(checkpoint, 'state_dict_ema', 'top1') == {}
    assert metrics_of({**checkpoint, 'temperature': 2.0}, 'state_dict') == dict(top1=80.0)
    of_timm = dict(state_dict={}, state_dict_ema={}, metric=40.0)
    assert metrics_of(of_timm, 'state_dict_ema', 'top1') == dict(top1=40.0)
    assert metrics_of(of_timm, 'state_dict', 'top1') == {} == metrics_of(dict(state_dict={}), 'state_dict', 'top1')
    assert weights_of_metric(of_timm) == 'state_dict_ema'


@pytest.mark.parametrize('before, now, words', [
    (ALL, ALL, []),
    (dict(state_dict={}), ALL, []),
    (ALL, dict(state_dict={}), ['add --model-ema', 'add --multimix-teacher ema']),
    (('state_dict', 'state_dict_ema'), ALL, ['uses state_dict_teacher, which starts from']),
    (('state_dict', 'state_dict_teacher'), ('state_dict', 'state_dict_ema'), ['state_dict_ema, which is the average']),
])
def test_changes_on_resuming(before, now, words):
    kept = entries(now, TEACHER if len(now) > 1 else {})
    lines = changes(entries(before, TEACHER), kept)
    assert bool(lines) == bool(words) and all(word in '\n'.join(lines) for word in words)
    assert not lines or "the teacher's weights" in lines[-1]


def test_validation_takes_the_only_weights_that_there_are():
    """A calibrated file holds those of the teacher, say, and --eval-metric may name others."""
    calibrated = dict(
        state_dict={}, metric_of='state_dict', weights_of='state_dict_teacher', args=TEACHER, temperature=2.0)
    for eval_metric in ('top1', 'student_top1', 'teacher_top1'):
        run = SimpleNamespace(args=SimpleNamespace(eval_metric=eval_metric, model_ema=False))
        assert entry_to_validate(run, calibrated) == 'state_dict'
