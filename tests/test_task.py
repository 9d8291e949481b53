"""Tests of MultiMixTask: timm's task protocol and the schedule of MultiMix."""
import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.distributed as dist
from timm.loss import (
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_multimix.build.criteria import loss_options
from timm_multimix.losses.module import MultiMixLoss, MultiMixOutput
from timm_multimix.task import MultiLabelMultiMixTask, MultiMixTask

CLASSES = 5


def _model(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def _task(name='test_resnet', task_cls=MultiMixTask, **kwargs):
    return task_cls(_model(name), verbose=False, **{'num_mixes': 20, **kwargs})


def _batch(batch_size=4, size=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (batch_size,), generator=generator)


def _train(task):
    task.get_trainable_module().train()
    return task


@pytest.mark.parametrize('mode,parts', [('dense', {'dense', 'pooled'}), ('pooled', {'pooled'}), ('off', set())])
def test_result_has_loss_output_and_parts(mode, parts):
    task = _train(_task(mode=mode))
    result = task(*_batch())
    assert set(result) == {'loss', 'output', *parts}
    assert result['output'].shape == (4, CLASSES)
    assert not any(result[name].requires_grad for name in parts)
    result['loss'].backward()
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


@pytest.mark.parametrize('options', [
    dict(clean_weight=0.25), dict(pooled_weight=0.0), dict(pooled_weight=1.0), dict(clean_weight=1.0),
])
def test_loss_is_that_of_multimix_loss(options):
    task = _train(_task(criterion_kwargs=dict(smoothing=0.1), **options))
    images, target = _batch()
    loss = MultiMixLoss(num_mixes=20, smoothing=0.1, **options)
    torch.manual_seed(3)
    output = task.get_trainable_module()(images)
    assert isinstance(output, MultiMixOutput)
    expected = loss.terms(output, target)
    torch.manual_seed(3)
    result = task(images, target)
    assert set(expected) - {'loss'} == set(result) - {'loss', 'output'}
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


@pytest.mark.parametrize('attention', ['uniform', 'gap', 'cam'])
def test_attention_is_computed_where_it_can_be(attention):
    task = _train(_task(attention=attention))
    given = task.get_trainable_module()(_batch()[0]).attention
    assert task.loss.attention == ('cam' if attention == 'cam' else None)
    assert (given is None) == (attention != 'gap')
    assert torch.isfinite(task(*_batch())['loss'])


def _flops(task):
    """Number of floating-point operations of a forward pass in training mode."""
    with FlopCounterMode(display=False) as counter:
        task(*_batch())
    return counter.get_total_flops()


def test_off_epochs_are_plain_classification():
    task = _train(_task(criterion_kwargs=dict(smoothing=0.1), start_epoch=1, off_epoch=3))
    plain = _train(ClassificationTask(_model(), criterion_kwargs=dict(smoothing=0.1), verbose=False))
    for epoch, on in enumerate([False, True, True, False]):
        task.set_epoch(epoch)
        assert task.schedule.is_active(task.epoch) == on
        result = task(*_batch())
        assert ('dense' in result) == on
        if not on:  # no additional operations
            assert _flops(task) == _flops(plain)
            state = copy.deepcopy(task.get_trainable_module().state_dict())
            plain.get_trainable_module().load_state_dict(state)
            torch.testing.assert_close(task(*_batch()), plain(*_batch()), rtol=0, atol=0)


def test_parts_switch_inside_a_compiled_task():
    task = _task(start_epoch=1, off_epoch=2)
    task.compile(backend='eager')
    _train(task)
    assert [set(_at(task, epoch)) - {'loss', 'output'} for epoch in range(3)] == [set(), {'dense', 'pooled'}, set()]
    task.get_eval_model().eval()
    with torch.no_grad():
        assert task.get_eval_model()(_batch()[0]).shape == (4, CLASSES)


@pytest.mark.parametrize('device,options,graphs', [
    ('cuda', dict(), 2), pytest.param('cuda', dict(mode='pooled'), 2, marks=pytest.mark.slow), ('cpu', dict(), 1),
    ('cuda', dict(teacher='ema', distill_ramp_epochs=3), 2)])
def test_compiles_the_loss_on_a_gpu(device, options, graphs):
    torch._dynamo.reset()
    task = _task(num_mixes=300, **options)
    task.device = torch.device(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    task.compile(backend=counter)
    expected = _task(num_mixes=300, **options)
    expected.load_checkpoint_state(task.get_checkpoint_state()['state_dict'], task.get_task_state())
    for epoch in range(6):
        result = _at(task, epoch)
        result['loss'].backward()
        torch.testing.assert_close(result['loss'], _at(expected, epoch)['loss'], rtol=0.2, atol=0)  # other mixes
    assert counter.frame_count == graphs


def _at(task, epoch):
    task.set_epoch(epoch)
    return task(*_batch())


@pytest.mark.parametrize('options', [dict(start_epoch=-1), dict(start_epoch=2, off_epoch=2), dict(mode='sparse')])
def test_refuses_impossible_settings(options):
    with pytest.raises(ValueError):
        _task(**options)


def test_both_kinds_of_batches_smooth_soft_targets_as_pytorch():
    task = _train(_task(criterion=nn.CrossEntropyLoss(label_smoothing=0.2), clean_weight=1.0))
    images, target = _batch()
    soft = nn.functional.one_hot(target, CLASSES).float()
    losses = [task(images, given, multimix=multimix)['loss'] for given in (target, soft) for multimix in (True, False)]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


def test_options_of_the_criterion_are_refused():
    for options in (dict(smoothing=0.1), dict(loss_type='bce')):
        with pytest.raises(TypeError, match='Set criterion or criterion_kwargs'):
            _task(**options)


@pytest.mark.parametrize('mode', ['off', 'pooled', 'dense'])
@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(num_mixes=-4), ValueError, 'num_mixes must be at least 1, got -4'),
    (dict(nonsense=3), TypeError, "unexpected keyword argument 'nonsense'"),
    (dict(attention='gaze'), ValueError, 'attention query must be one of'),
    (dict(attention_norm='l2'), ValueError, 'attention norm must be one of'),
    (dict(alpha=-1.0), ValueError, 'alpha must be a positive number'),
    (dict(preset='best'), ValueError, 'preset must be one of'),
    (dict(prob=2.0), ValueError, 'probability'),
    (dict(distill_weight=-1.0), ValueError, 'distill_weight'),
    (dict(distill_temperature=0.0), ValueError, 'distill_temperature'),
    (dict(distill_ramp_epochs=-1), ValueError, 'ramp_epochs'),
    (dict(teacher_decay=1.0), ValueError, 'decay'),
    (dict(off_epoch=-1), ValueError, 'off_epoch must be 0 or more, got -1'),
])
def test_wrong_options_are_errors_in_every_mode(mode, options, error, message):
    with pytest.raises(error, match=message):
        _task(mode=mode, **options)


@pytest.mark.parametrize('teacher', ['ema', 'test_resnet', nn.Identity()])
def test_teacher_without_multimix_is_refused(teacher):
    with pytest.raises(ValueError, match="mode='off'"):
        _task(mode='off', teacher=teacher)


@pytest.mark.parametrize('mode', ['off', 'pooled', 'dense'])
@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(), SoftTargetCrossEntropy()])
def test_softmax_of_a_single_class_is_refused(mode, criterion):
    with pytest.raises(ValueError, match='bce'):
        MultiMixTask(timm.create_model('test_resnet', num_classes=1), criterion, mode=mode, verbose=False)


def test_unserved_model_is_refused_before_its_first_multimix_epoch():
    with pytest.raises(ValueError, match='class token'):
        _task(attention='token', start_epoch=10)


def test_class_token_must_be_trained():
    with pytest.raises(ValueError, match='class token'):
        _task('test_vit', pooled_weight=0.0)
    _task('test_vit', pooled_weight=0.0, clean_weight=0.5)


def test_device_and_dtype_stay_in_sync():
    task = _task().to(dtype=torch.float64)
    assert task.dtype == next(task.parameters()).dtype == torch.float64
    task.to('meta').to(torch.float32)
    assert task.device == next(task.parameters()).device == torch.device('meta')
    assert nn.Sequential(task).half() and task.dtype == torch.float16


def test_bfloat16_model():
    task = _train(_task().to(dtype=torch.bfloat16))
    images, target = _batch()
    result = task(images.bfloat16(), target)
    assert result['loss'].dtype == torch.float32 and torch.isfinite(result['loss'])
    result['loss'].backward()


def test_autocast():
    task = _train(_task())
    with torch.autocast('cpu', torch.bfloat16):
        result = task(*_batch())
    assert result['output'].dtype == torch.bfloat16 and result['loss'].dtype == torch.float32


def test_evaluation_is_the_plain_model():
    task, plain = _task(), _model()
    images, target = _batch()
    task.get_trainable_module().eval()
    plain.eval()
    torch.testing.assert_close(task.get_eval_model()(images), plain(images), rtol=0, atol=0)
    evaluator = task.create_evaluator()
    evaluator.update(task.get_eval_model()(images), target)
    assert set(evaluator.compute()) == {'loss', 'top1', 'top5'}


def test_checkpoints_are_those_of_the_plain_model(tmp_path):
    """timm's helpers save, resume and load the checkpoint. Loading does not require this package."""
    task = _train(_task())
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-3)
    task.setup_ema(decay=0.5)
    task(*_batch())['loss'].backward()
    optimizer.step()
    task.update_ema(step=1)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.0)
    path = tmp_path / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint['state_dict']) == list(checkpoint['state_dict_ema']) == list(_model().state_dict())

    other = _task(mode='pooled')
    assert resume_task_checkpoint(other, str(path), create_optimizer_v2(other.get_trainable_module()), log_info=False)
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, str(path))
    for ema in (False, True):
        expected = task.get_checkpoint_state(ema=ema)
        torch.testing.assert_close(other.get_checkpoint_state(ema=ema), expected, rtol=0, atol=0)

    code = (
        "import sys; sys.modules['timm_multimix'] = None; import timm; "
        f"timm.create_model('test_resnet', num_classes={CLASSES}, checkpoint_path={str(path)!r})")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_ema_follows_an_attached_model():
    task = _train(_task())
    task.setup_ema(decay=0.0)
    with torch.no_grad():
        next(task.get_trainable_module().parameters()).add_(1.0)
    task.update_ema(step=1)
    images = _batch()[0]
    task.get_trainable_module().eval()
    torch.testing.assert_close(task.get_eval_model(ema=True)(images), task.get_eval_model()(images))


def test_distributed_training_gives_the_same_gradient(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        gradients = []
        for wrap in (False, True):
            task = _train(_task(start_epoch=1))
            if wrap:
                task.prepare_distributed(broadcast_buffers=False)
            task.set_epoch(1)  # attaches inside the wrapper
            torch.manual_seed(3)
            task(*_batch())['loss'].backward()
            gradients.append([p.grad for p in task.get_trainable_module().parameters()])
        torch.testing.assert_close(gradients[1], gradients[0])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('criterion,expected', [
    (nn.CrossEntropyLoss(), dict(loss_type='ce', smoothing=0.0)),
    (nn.CrossEntropyLoss(label_smoothing=0.2), dict(loss_type='ce', smoothing=0.2)),
    (LabelSmoothingCrossEntropy(0.3), dict(loss_type='ce', smoothing=0.3)),
    (SoftTargetCrossEntropy(), dict(loss_type='ce', smoothing=0.0)),
    (BinaryCrossEntropy(), dict(loss_type='bce', smoothing=0.0)),
])
def test_multimix_takes_over_the_kind_of_loss(criterion, expected):
    assert loss_options(criterion) == expected


@pytest.mark.parametrize('criterion', [
    JsdCrossEntropy(), AsymmetricLossSingleLabel(), nn.CrossEntropyLoss(reduction='sum'),
    nn.CrossEntropyLoss(ignore_index=0), BinaryCrossEntropy(reduction='sum'),
])
def test_losses_that_cannot_be_mixed_are_refused(criterion):
    with pytest.raises(ValueError, match='MultiMix'):
        _task(criterion=criterion)


@pytest.mark.parametrize('options', [
    dict(smoothing=0.0), dict(smoothing=0.2), dict(smoothing=0.2, target_threshold=0.1), dict(sum_classes=True),
    dict(smoothing=0.2, smooth_dense=True), dict(weight=torch.arange(CLASSES) + 1.0, pos_weight=3.0),
])
@pytest.mark.parametrize('dense_target', [False, True])
def test_binary_cross_entropy_treats_targets_as_timm_does(options, dense_target):
    """For a batch of equal examples, the loss of the mixes equals the plain loss of the example."""
    criterion = BinaryCrossEntropy(**options)
    task = _train(_task(mode='pooled', criterion=criterion, tuple_length=1))
    image, target = _batch(1)
    images, target = image.repeat(4, 1, 1, 1), target.repeat(4)
    if dense_target:
        target = torch.rand(1, CLASSES).repeat(4, 1)
    result = task(images, target)
    torch.testing.assert_close(result['loss'], criterion(result['output'], target))


def test_soft_targets_of_mixup():
    task = _train(_task(criterion=SoftTargetCrossEntropy()))
    images, _ = _batch()
    result = task(images, torch.rand(4, CLASSES).softmax(dim=1))
    assert torch.isfinite(result['loss'])


def test_multi_label_task():
    task = _train(_task(task_cls=MultiLabelMultiMixTask, threshold=0.3))
    images, target = _batch()
    rows = torch.eye(CLASSES)[target]
    result = task(images, rows)
    assert task.loss.loss_type == 'bce' and torch.isfinite(result['loss'])
    evaluator = task.create_evaluator()
    evaluator.update(result['output'], rows)
    assert evaluator.threshold == 0.3 and 'map' in evaluator.compute()
    with pytest.raises(ValueError, match='floating point'):
        task(images, target)
    with pytest.raises(ValueError, match='threshold'):
        _task(task_cls=MultiLabelMultiMixTask, threshold=1.0)
