"""Tests of MultiMixTask with a teacher: views, shared averages, checkpoints, compilation and several processes."""
import copy

import pytest
import timm
import torch
import torch.distributed as dist
from distributed_helpers import on_ranks
from loss_helpers import peak_memory
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

from timm_multimix import MultiLabelMultiMixTask, MultiMixTask, PretrainedTeacher, attach

CLASSES = 5


def make_task(task_cls=MultiMixTask, model='test_resnet', **options):
    torch.manual_seed(0)
    options = {'num_mixes': 20, 'teacher': 'ema', **options}
    task = task_cls(timm.create_model(model, num_classes=CLASSES), verbose=False, **options)
    task.get_trainable_module().train()
    return task


def make_batch(views=1, size=64, count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3 * views, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def run(task, images, target):
    torch.manual_seed(2)
    result = task(images, target)
    task.zero_grad()
    result['loss'].backward()
    return result['loss'].item(), [parameter.grad for parameter in task.get_trainable_module().parameters()]


def train_step(task, optimizer, step, views=1):
    torch.manual_seed(step)
    task(torch.randn(4, 3 * views, 64, 64), torch.randint(CLASSES, (4,)))['loss'].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=step + 1)


def weights(module):
    return list(module.state_dict().values())


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.mark.parametrize('mode', ['dense', 'pooled'])
def test_weight_zero_is_plain_multimix_to_the_bit(mode):
    batch = make_batch()
    plain = run(make_task(teacher='none', mode=mode), *batch)
    actual = run(make_task(mode=mode, distill_weight=0.0), *batch)
    assert actual[0] == plain[0] and all(map(torch.equal, actual[1], plain[1]))
    assert run(make_task(mode=mode), *batch)[0] != plain[0]


def test_student_sees_the_first_view_and_the_teacher_the_second():
    task, (images, target) = make_task(views=2, distill_weight=1.0), make_batch(views=2)
    seen = {}
    task.trainable_module.register_forward_pre_hook(lambda _, args: seen.update(student=args[0]))
    task.teacher.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[0]))
    before = {name: value.clone() for name, value in task.teacher.module.named_buffers()}
    first = run(task, images, target)
    assert torch.equal(seen['student'], images[:, :3]) and torch.equal(seen['teacher'], images[:, 3:])
    # The student's running statistics depend on its own view only. The teacher's running statistics do not change.
    statistics = [value.clone() for value in task.get_trainable_module().buffers()]
    other = make_task(views=2, distill_weight=1.0)
    changed = run(other, torch.cat([images[:, :3], torch.randn(4, 3, 64, 64)], dim=1), target)
    assert all(map(torch.equal, other.get_trainable_module().buffers(), statistics)) and changed[0] != first[0]
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.module.named_buffers())


def test_one_view_is_two_equal_ones():
    images, target = make_batch()
    one, two = run(make_task(), images, target), run(make_task(views=2), images.repeat(1, 2, 1, 1), target)
    assert one[0] == two[0] and all(map(torch.equal, one[1], two[1]))


def test_views_keep_the_layout_of_the_batch():
    task = make_task(views=2)
    layouts = []
    task.trainable_module.register_forward_pre_hook(
        lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    images, target = make_batch(views=2)
    task(images.contiguous(memory_format=torch.channels_last), target)
    task(images, target)
    assert layouts == [True, False]
    with pytest.raises(ValueError, match=r'\(b, 2c, h, w\), got \(4, 3, 64, 64\)'):
        task(images[:, :3], target)


def test_teacher_works_only_while_it_teaches():
    task, batch = make_task(start_epoch=1, off_epoch=4, distill_ramp_epochs=2), make_batch()
    calls = []
    task.teacher.register_forward_hook(lambda *_: calls.append(epoch))
    for epoch in range(5):
        task.set_epoch(epoch)
        assert torch.isfinite(task(*batch)['loss'])
    assert calls == [1, 2, 3]
    task = make_task(distill_ramp_epochs=2)
    task.teacher.register_forward_hook(lambda *_: calls.append('ramp'))
    task.set_epoch(0)
    task(*batch)
    assert 'ramp' not in calls
    task.set_epoch(1)
    task.eval()
    task.get_trainable_module().eval()
    assert set(task(*batch)) == {'loss', 'output'} and 'ramp' not in calls


@pytest.mark.parametrize('task_cls, options', [
    (MultiLabelMultiMixTask, {}), (MultiMixTask, dict(criterion_kwargs=dict(loss_type='bce', smoothing=0.1))),
    (MultiMixTask, dict(attention='cam', attention_grad=True, clean_weight=0.5, distill_temperature=2.0)),
])
def test_goes_with_other_losses(task_cls, options):
    task, (images, target) = make_task(task_cls, **options), make_batch()
    if task_cls is MultiLabelMultiMixTask:
        target = nn.functional.one_hot(target, CLASSES).float()
    loss, gradients = run(task, images, target)
    assert loss > 0 and all(gradient.isfinite().all() for gradient in gradients)


def test_goes_with_autocast_and_models_in_bfloat16():
    images, target = make_batch()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert make_task()(images, target)['loss'].isfinite()
    task = make_task(dtype=torch.bfloat16)
    task.to(torch.bfloat16)
    task(images.bfloat16(), target)['loss'].backward()
    task.update_ema()
    assert task.teacher.module.get_classifier().weight.dtype == torch.bfloat16


def test_teacher_is_the_average_of_the_weights():
    task = make_task(teacher_decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    states = []
    for step in range(3):
        train_step(task, optimizer, step)
        states.append([value.clone() for value in task.get_trainable_module().parameters()])
    decay = min(0.5, 1 - 2 ** (-2 / 3)), min(0.5, 1 - 3 ** (-2 / 3))
    for teacher, first, second, third in zip(task.teacher.module.parameters(), *states, strict=True):
        expected = first * decay[0] + second * (1 - decay[0])
        torch.testing.assert_close(teacher, expected * decay[1] + third * (1 - decay[1]))


def test_one_average_serves_as_both():
    task = make_task(teacher_decay=0.9)
    average = task.setup_ema(decay=0.9, use_warmup=True)
    assert task.teacher.average is average and not task._owns_average
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    for step in range(2):
        train_step(task, optimizer, step)
    assert 'state_dict_teacher' not in task.get_checkpoint_state()
    other = make_task(teacher_decay=0.9)
    optimizer = create_optimizer_v2(other.get_trainable_module(), opt='sgd', lr=0.1)
    for step in range(2):
        train_step(other, optimizer, step)
    assert same(task.teacher.module, other.teacher.module)
    later = make_task(teacher_decay=0.9, start_epoch=1)  # created while the model is not attached
    later.setup_ema(decay=0.9)
    later.set_epoch(1)
    assert later.teacher(make_batch()[0]).dense_logits is not None
    separate = make_task(teacher_decay=0.9)
    assert separate.setup_ema(decay=0.99) is not separate.teacher.average and separate._owns_average
    assert separate.setup_ema(decay=0.9, device='cpu') is not separate.teacher.average  # an explicit device


@pytest.mark.parametrize('shared', [False, True])
def test_resumed_run_is_the_run_uninterrupted(tmp_path, shared):
    def build():
        task = make_task(teacher_decay=0.9)
        return task, create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, momentum=0.9)

    task, optimizer = build()
    if shared:
        task.setup_ema(decay=0.9, use_warmup=True)
    for step in range(3):
        train_step(task, optimizer, step)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')
    checkpoint = torch.load(path, weights_only=True)
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    model.load_state_dict(checkpoint['state_dict_ema' if shared else 'state_dict_teacher'])
    assert same(model, task.teacher.module) and not same(model, task.get_trainable_module())
    torch.save({name: value for name, value in checkpoint.items() if name != 'task_state'}, tmp_path / 'less.pth.tar')
    assert (tmp_path / 'last.pth.tar').stat().st_size < 1.1 * (tmp_path / 'less.pth.tar').stat().st_size

    resumed, new_optimizer = build()
    resume_task_checkpoint(resumed, path, new_optimizer, log_info=False)
    if shared:
        resumed.setup_ema(decay=0.9, use_warmup=True)
        load_task_ema_checkpoint(resumed, path)
    for step in range(3, 6):
        train_step(task, optimizer, step)
        train_step(resumed, new_optimizer, step)
    assert same(task.get_trainable_module(), resumed.get_trainable_module())
    assert same(task.teacher.module, resumed.teacher.module)


def test_teacher_of_a_checkpoint_without_one_is_what_the_student_is():
    task, other = make_task(), make_task(teacher='none')
    with torch.no_grad():
        other.get_trainable_module().get_classifier().weight.add_(1)
    task.load_checkpoint_state(other.get_checkpoint_state()['state_dict'])
    assert same(task.teacher.module, other.get_trainable_module())


@pytest.mark.parametrize('shared', [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles(shared):
    task, batch = make_task(), make_batch()
    reference = make_task()
    if shared:
        for each in (task, reference):
            each.setup_ema(decay=0.999, use_warmup=True)
    task.compile(backend='aot_eager')
    assert task.teacher.module._compiled_call_impl is not None
    task.compile_ema(backend='aot_eager')
    task.update_ema(step=1)
    reference.update_ema(step=1)
    torch.testing.assert_close(run(task, *batch), run(reference, *batch))
    task.get_trainable_module().eval()
    teacher = task.get_eval_teacher()
    torch.testing.assert_close(teacher(batch[0]), reference.get_eval_teacher()(batch[0]))
    if shared:
        torch.testing.assert_close(task.get_eval_model(ema=True)(batch[0]), teacher(batch[0]))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_training_gives_the_same_gradient(process_group):
    batch = make_batch(views=2)
    expected = run(make_task(views=2), *batch)
    task = make_task(views=2)
    task.prepare_distributed()
    torch.testing.assert_close(run(task, *batch), expected)
    task.update_ema(step=1)
    assert 'state_dict_teacher' in task.get_checkpoint_state()


def test_task_with_a_teacher_is_copied():
    task, batch = make_task(), make_batch()
    clone = copy.deepcopy(task)
    torch.testing.assert_close(run(clone, *batch), run(task, *batch))


def test_another_model_teaches():
    model, batch = timm.create_model('test_vit', num_classes=CLASSES, img_size=64), make_batch()
    teacher = PretrainedTeacher(model, make_task().get_trainable_module())
    task = make_task(teacher=teacher)
    before = copy.deepcopy(teacher.state_dict())
    assert run(task, *batch)[0] != run(make_task(teacher='none'), *batch)[0]
    task.update_ema(step=1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert task.get_eval_teacher() is None and set(task.get_checkpoint_state()) == {'state_dict'}


def test_module_that_teaches_is_frozen_and_in_evaluation_mode():
    """BatchNorm statistics, modes and gradients of a teacher module do not change."""
    teacher = nn.Sequential(timm.create_model('test_resnet', num_classes=CLASSES), nn.BatchNorm1d(CLASSES)).train()
    before = copy.deepcopy(teacher.state_dict())
    task = make_task(teacher=teacher)
    for _ in range(2):
        task.train()
        assert not any(module.training for module in teacher.modules())
        run(task, *make_batch())
        teacher.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in task.get_trainable_module().parameters())


def test_attached_module_teaches_at_every_position():
    teacher = timm.create_model('test_resnet', num_classes=CLASSES)
    attach(teacher)
    task = make_task(teacher=teacher)
    batch = make_batch()
    assert run(task, *batch)[0] > 0
    assert task.teacher(batch[0]).dense_logits.shape == (4, 4, CLASSES)
    assert not task.teacher(batch[0]).dense_logits.requires_grad


def test_teacher_that_shares_parameters_with_the_model_is_refused():
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    with pytest.raises(ValueError, match='shares parameters'):
        MultiMixTask(model, teacher=nn.Sequential(model), verbose=False)
    assert model.conv1[0].weight.requires_grad


@pytest.mark.parametrize('teacher', [None, 3, lambda images: images])
def test_teacher_of_another_type_is_refused(teacher):
    with pytest.raises(TypeError, match='teacher must be'):
        make_task(teacher=teacher)


@pytest.mark.parametrize('options, message', [
    (dict(views=3), 'views must be 1 or 2, got 3'), (dict(teacher='none', views=2), 'views=2 requires a teacher'),
    (dict(teacher_decay=-0.1), 'teacher_decay must be in'), (dict(distill_weight=-0.1), 'distill_weight must be in'),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task(**options)


def _averages(steps):
    """Train with different initial weights in every process. DDP copies the weights of rank 0."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    task = MultiMixTask(
        timm.create_model('test_resnet', num_classes=CLASSES), verbose=False, num_mixes=20, teacher='ema', views=2)
    task.get_trainable_module().train()
    task.prepare_distributed()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    averages = []
    for step in range(steps):
        averages += [parameter.detach().clone().numpy() for parameter in task.teacher.module.parameters()]
        train_step(task, optimizer, 10 * step + rank, views=2)
    return averages


def test_processes_have_the_same_teacher(tmp_path):
    first, second = on_ranks(tmp_path / 'ranks', 2, _averages, 3)
    assert all((one == other).all() for one, other in zip(first, second, strict=True))


def test_teacher_takes_next_to_no_memory():
    def step(**options):
        task, batch = make_task(**options), make_batch(count=32)
        return lambda: task(*batch)['loss'].backward()
    plain, with_teacher = (step(teacher=teacher) for teacher in ('none', 'ema'))
    plain()
    with_teacher()
    assert peak_memory(with_teacher) <= 1.05 * peak_memory(plain)
