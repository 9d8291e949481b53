"""Metrics that are NaN: they are no best metric, neither at once nor after a resume, and in no card."""
import json
import math

import pytest
import yaml
from timm.task import ClassificationEvaluator

from timm_multimix.build.saved_weights import metrics_of
from timm_multimix.hub.export import export

pytest_plugins = ['training_helpers']


@pytest.fixture
def validation_losses(monkeypatch):
    """Sets the loss of each validation, in order."""
    compute, left = ClassificationEvaluator.compute, []

    def changed(self, distributed=False):
        return compute(self, distributed) | dict(loss=left.pop(0))

    monkeypatch.setattr(ClassificationEvaluator, 'compute', changed)
    return left.extend


@pytest.mark.parametrize('losses, best', [
    ([math.nan, 2.0, 1.0], 2), ([math.nan, 1.0, math.nan], 1), ([2.0, math.nan, 1.0], 2), ([1.0, math.nan, 2.0], 0)])
@pytest.mark.parametrize('stops', [[3], [1, 2, 3]])
def test_nan_is_never_the_best(script, image_folder, validation_losses, losses, best, stops):
    validation_losses(losses)
    for stop in stops:
        argv = dict(epochs=3, stop_epoch=stop, eval_metric='loss', checkpoint_hist=2, resume='auto')
        assert script.train(image_folder, **argv) == 0, script.text
    assert f'Best loss: {losses[best]:.4g} in epoch {best}' in script.text
    state = script.checkpoint('model_best.pth.tar')
    assert state['epoch'] == best and state['metric'] == losses[best]
    kept = {path.name for path in script.run_folder().glob('checkpoint-*')}
    assert f'checkpoint-{best}.pth.tar' in kept and len(kept) == 2


def test_run_without_any_metric(script, image_folder, validation_losses):
    validation_losses([math.nan, math.nan])
    assert script.train(image_folder, epochs=2, eval_metric='loss') == 0, script.text
    assert 'Best' not in script.text
    assert not (script.run_folder() / 'model_best.pth.tar').exists()
    assert script.checkpoint()['epoch'] == 1 and 'metric' not in script.checkpoint()


def test_schedule_by_a_metric_of_nan_continues_as_uninterrupted(script, image_folder, validation_losses):
    options = dict(epochs=3, eval_metric='loss', sched='plateau', patience_epochs=0)
    validation_losses([1.0, math.nan, 2.0, 1.0, math.nan, 2.0])
    assert script.train(image_folder, **options) == 0, script.text
    for stop in (2, 3):
        argv = dict(options, stop_epoch=stop, experiment='stopped', resume='auto')
        assert script.train(image_folder, **argv) == 0, script.text
    assert script.summary() == script.summary('stopped')


def test_only_the_selecting_weights_count(script, image_folder, validation_losses):
    validation_losses([1.0, math.nan, math.nan, 3.0])  # of the trained weights and the teacher, in two epochs
    argv = dict(multimix='dense', multimix_teacher='ema', eval_metric='loss')
    assert script.train(image_folder, **argv, epochs=2) == 0, script.text
    state = script.checkpoint('model_best.pth.tar')
    assert (state['epoch'], state['metric'], state['eval_weights']) == (1, 3.0, 'teacher')


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_card_holds_numbers_only(script, image_folder, validation_losses, tmp_path, value):
    validation_losses([value])
    assert script.train(image_folder) == 0, script.text
    export(str(script.run_folder()), str(tmp_path), 'user/name')
    card = (tmp_path / 'README.md').read_text()
    assert '.nan' not in card and '.inf' not in card and ' nan' not in card
    metadata = yaml.safe_load(card.split('---')[1])
    assert [metric['type'] for metric in metadata['model-index'][0]['results'][0]['metrics']] == ['accuracy'] * 2
    json.loads((tmp_path / 'config.json').read_text(), parse_constant=pytest.fail)


def test_metrics_of_a_checkpoint_are_finite():
    checkpoint = dict(state_dict={}, metric=math.nan, metrics=dict(state_dict=dict(loss=math.nan, top1=50.0)))
    assert metrics_of(checkpoint, 'state_dict') == dict(top1=50.0)
    assert metrics_of(dict(state_dict={}, metric=math.nan), 'state_dict', 'top1') == {}
