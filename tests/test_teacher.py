import copy
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_multimix import (
    EMATeacher,
    MultiMixLoss,
    MultiMixOutput,
    PretrainedTeacher,
    SelfDistillationLoss,
    attach,
)

METHOD = Path(__file__).parent.parent / 'docs' / 'method.md'


def resnet(**options):
    return timm.create_model('test_resnet', num_classes=4, **options)


def images_of_color(count=32, size=32):
    """Return images of classes that are learned in a few steps."""
    target = torch.arange(count) % 4
    colors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])
    return colors[target][..., None, None] + 0.3 * torch.randn(count, 3, size, size), target


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# EMATeacher


@pytest.mark.parametrize('mode', ['pooled', 'dense'])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_prediction_of_a_new_teacher_equals_that_of_the_student_in_evaluation(mode, name):
    model = timm.create_model(name, num_classes=4, **({'img_size': 48} if 'vit' in name else {}))
    attach(model, mode)
    teacher = EMATeacher(model)
    images = torch.randn(2, 3, 48, 48)
    output = teacher(images)
    assert isinstance(output, MultiMixOutput) and not output.logits.requires_grad
    model.eval()
    torch.testing.assert_close(output.logits, model(images))
    if mode == 'dense':
        model.train()  # without BatchNorm and dropout, training mode gives the same prediction
        if name == 'test_vit':
            torch.testing.assert_close(output, model(images), check_stride=False)
        assert output.dense_logits.shape == model(images).dense_logits.shape
        torch.testing.assert_close(output.attention.sum(1), torch.ones(2))
    assert isinstance(teacher.module(images), torch.Tensor)  # for validation


def test_prediction_of_a_teacher_is_the_mean_over_positions():
    model = resnet()
    attach(model)
    output = EMATeacher(model)(torch.randn(2, 3, 96, 96))  # average pooling, then an affine classifier
    torch.testing.assert_close(output.dense_logits.mean(1), output.logits)


def test_average_matches_its_definition():
    model = resnet()
    teacher = EMATeacher(model, decay=0.9, use_warmup=False)
    expected = copy.deepcopy(model.state_dict())
    for count in range(3):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.rand_like(tensor.float()) * 10)
        teacher.update(model)
        decay = 0.9 if count else 0.0  # the first update replaces the initial weights
        for key, value in model.state_dict().items():
            floating = value.is_floating_point()
            expected[key] = expected[key] * decay + value * (1 - decay) if floating else value.clone()
    actual = teacher.module.state_dict()
    assert any('running_var' in key for key in actual)  # running statistics are averaged too
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value)


def test_warmup_reduces_the_share_of_the_initial_weights():
    model = nn.Linear(2, 2)
    slow, warm = EMATeacher(model, use_warmup=False), EMATeacher(model)
    for teacher in (slow, warm):
        teacher.update(model)
    with torch.no_grad():
        model.weight += 1
    before = slow.module.weight.clone()
    for _ in range(20):
        slow.update(model)
        warm.update(model)
    assert (slow.module.weight - before).max() < 0.03 and (warm.module.weight - before).min() > 0.8


def test_teacher_with_batch_norm_predicts_well():
    torch.manual_seed(1)
    model = resnet()
    attach(model)
    teacher, criterion = EMATeacher(model), SelfDistillationLoss(MultiMixLoss(100), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        images, target = images_of_color()
        step(model, optimizer, criterion(model(images), target, teacher(images)))
        teacher.update(model)
    images, target = images_of_color(128)
    logits = teacher.module(images)
    assert (logits.argmax(1) == target).double().mean() > 0.95 and F.cross_entropy(logits, target) < 0.4
    # The running statistics of the teacher match the statistics of its features.
    statistics = {}
    for name, module in teacher.module.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: statistics.update({name: args[0].var((0, 2, 3), correction=0)}))
    teacher.module(images)
    ratios = [(statistics[name] / teacher.module.get_submodule(name).running_var).median() for name in statistics]
    deviations = torch.stack(ratios).log().abs()
    assert len(ratios) > 3 and deviations.median() < 0.2, deviations


def test_teacher_stays_in_evaluation_mode_without_gradient():
    model = resnet(drop_rate=0.5)
    attach(model)
    teacher = EMATeacher(model)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.module.state_dict())
    images, target = images_of_color(8)
    SelfDistillationLoss(MultiMixLoss(20))(model(images), target, teacher(images)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad.any() for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.module.state_dict().items())


def test_state_of_a_teacher_is_saved_and_restored(tmp_path):
    model = resnet()
    teacher = EMATeacher(model, decay=0.9)
    def change(steps, *teachers):
        for _ in range(steps):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn_like(parameter)
            for each in teachers:
                each.update(model)
    change(3, teacher)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    other = EMATeacher(model, decay=0.9)
    other.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True))
    assert other.num_updates == 3
    change(3, teacher, other)
    for actual, expected in zip(other.module.state_dict().values(), teacher.module.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


def test_averages_of_bfloat16_are_resumed_exactly():
    model = nn.Linear(50, 50).bfloat16()
    teacher = EMATeacher(model)
    other = EMATeacher(model)
    for count in range(6):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        teacher.update(model)
        if count:
            other.update(model)
        else:
            other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert torch.equal(teacher.module.weight, other.module.weight)


def test_compiled_and_plain_models_have_teachers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    compiled = torch.compile(model, backend='eager')
    teacher = EMATeacher(compiled)
    teacher.compile(backend='eager')
    images = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(teacher(images), model(images))  # logits, for pooled MultiMix
    teacher.update(compiled)
    assert isinstance(SelfDistillationLoss(MultiMixLoss(10))(model(images), torch.arange(5) % 4, teacher(images)),
                      torch.Tensor)


def test_teacher_compiles_without_a_graph_break():
    model = resnet()
    attach(model)
    teacher, images = EMATeacher(model), torch.randn(2, 3, 64, 64)
    expected, plain = teacher(images), teacher.module(images)
    teacher.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(teacher(images), expected)
    torch.testing.assert_close(teacher.module(images), plain)


def test_bad_decay_is_refused():
    with pytest.raises(ValueError, match=r'must be in \[0, 1\), got 1'):
        EMATeacher(nn.Linear(1, 1), decay=1.0)


# SelfDistillationLoss


def test_loss_equals_the_wrapped_loss_with_a_teacher():
    logits, teacher, target = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    def loss():
        return MultiMixLoss(20, generator=torch.Generator().manual_seed(0))
    actual = SelfDistillationLoss(loss(), 0.3, 2.0)(logits, target, teacher)
    assert actual == loss().terms(logits, target, teacher, distill_weight=0.3, distill_temperature=2.0)['loss']
    assert SelfDistillationLoss(loss(), 0.0)(logits, target, teacher) == loss()(logits, target)


def test_share_grows_with_the_epoch():
    loss = SelfDistillationLoss(MultiMixLoss(20), 0.6, ramp_epochs=3)
    shares = []
    for epoch in range(5):
        loss.set_epoch(epoch)
        shares.append(loss.weight)
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.6])
    steady = SelfDistillationLoss(MultiMixLoss(20), 0.6)
    steady.set_epoch(0)
    assert steady.weight == 0.6
    assert pickle.loads(pickle.dumps(loss)).weight == loss.weight


@pytest.mark.parametrize('options, message', [
    (dict(distill_weight=2), 'distill_weight must be in'),
    (dict(distill_temperature=0), 'distill_temperature must be positive'),
    (dict(ramp_epochs=-1), 'ramp_epochs must not be negative, got -1'),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillationLoss(MultiMixLoss(10), **options)


# PretrainedTeacher


def test_pretrained_teacher_normalizes_images():
    student, model = resnet(), resnet()
    model.pretrained_cfg = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    teacher = PretrainedTeacher(model, student, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    pixels = torch.rand(2, 3, 32, 32)
    expected = model.eval()((pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None])
                            / torch.tensor([0.4, 0.5, 0.6])[:, None, None])
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.25), expected)
    teacher.train()
    assert not model.training and not teacher(pixels).requires_grad


def test_pretrained_teacher_of_a_checkpoint(tmp_path):
    model = resnet()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'teacher.pth.tar')
    teacher = PretrainedTeacher('test_resnet', resnet(), path=str(tmp_path / 'teacher.pth.tar'))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), model.eval()(images))


@pytest.mark.parametrize('given', [
    dict(), dict(mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3)), dict(mean=(0.3,), std=(0.2,))])
def test_pretrained_teacher_of_grayscale_images(given, tmp_path):
    """The average of three-channel pixel statistics is used, as in timm's loader."""
    student, model = resnet(in_chans=1), resnet(in_chans=1)
    assert len(model.pretrained_cfg['mean']) == 3
    pixels = torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(given.get(name, student.pretrained_cfg[name])).mean() for name in ('mean', 'std'))
    own_mean, own_std = (torch.tensor(model.pretrained_cfg[name]).mean() for name in ('mean', 'std'))
    expected = model.eval()((pixels - own_mean) / own_std)
    torch.testing.assert_close(PretrainedTeacher(model, student, **given)((pixels - mean) / std), expected)
    torch.save(model.state_dict(), tmp_path / 'teacher.pth')
    named = PretrainedTeacher('test_resnet', student, path=str(tmp_path / 'teacher.pth'), **given)
    torch.testing.assert_close(named((pixels - mean) / std), expected)


def test_pretrained_teacher_of_other_channels_is_refused():
    with pytest.raises(ValueError, match='3 input channels and the student has 1'):
        PretrainedTeacher(resnet(), resnet(in_chans=1))


def test_pretrained_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match='has 7 classes and the student has 4'):
        PretrainedTeacher(timm.create_model('test_resnet', num_classes=7), resnet())


def test_loops_of_the_docs_run(tmp_path, monkeypatch):
    """Alternation with mixup, and a teacher whose weights load into a plain model."""
    blocks = re.findall(r'```python\n(.*?)```', METHOD.read_text(), re.DOTALL)
    alternating = next(block for block in blocks if 'handle.enabled' in block)
    teacher = next(block for block in blocks if 'EMATeacher(' in block)
    names = dict(loader=[(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))] * 2, epochs=1)
    exec(alternating.replace('resnet50', 'test_resnet'), names)
    names['handle'].enabled = True
    names['optimizer'] = torch.optim.SGD(names['model'].parameters(), 0.1)
    exec(teacher, names)
    assert names['loss'].isfinite()
    timm.create_model('test_resnet', num_classes=10).load_state_dict(names['teacher'].module.state_dict())


def test_loop_of_the_docs_is_resumed(tmp_path, monkeypatch):
    text = METHOD.with_name('training.md').read_text()
    saving, loading = re.search(r'```python\n(torch\.save\(dict\(.*?)\n(# In the new.*?)```', text, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    images, target = images_of_color(8)

    def create():
        model = resnet()
        attach(model.train())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return dict(torch=torch, model=model, teacher=EMATeacher(model), optimizer=optimizer)

    def train(model, teacher, optimizer, **_):
        torch.manual_seed(0)
        for _ in range(2):
            step(model, optimizer, SelfDistillationLoss(MultiMixLoss(20))(model(images), target, teacher(images)))
            teacher.update(model)

    run, resumed = create(), create()
    train(**run)
    exec(saving, run)
    exec(loading, resumed)
    train(**{name: run[name] for name in ('model', 'teacher', 'optimizer')})
    train(**{name: resumed[name] for name in ('model', 'teacher', 'optimizer')})
    assert run['teacher'].num_updates == resumed['teacher'].num_updates == 4
    for name in ('model', 'teacher'):
        torch.testing.assert_close(
            run[name].state_dict(), resumed[name].state_dict(), rtol=0, atol=0, check_device=False)
