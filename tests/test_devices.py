"""Devices other than the CPU, emulated: a default device without data, and a device without float64."""
import copy

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_multimix import (
    EMATeacher,
    MultiMixLoss,
    MultiMixTask,
    PretrainedTeacher,
    SelfDistillationLoss,
    attach,
    calibrate,
    dense_logits,
    detach,
)
from timm_multimix.calibration.temperature import fit_temperature, fold_temperature
from timm_multimix.common.console import Averages
from timm_multimix.data.glyphs import render_glyphs
from timm_multimix.evaluation.between import sample_pairs
from timm_multimix.evaluation.geometry import compactness, project, uniformity
from timm_multimix.evaluation.images import choose
from timm_multimix.evaluation.metrics import cross_fit, reliability
from timm_multimix.evaluation.ood import noise_batches


class WithoutFloat64(TorchDispatchMode):
    """Raises an error for every operation that returns float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f'{func} returned float64.')
        return result


@pytest.fixture
def model():
    return timm.create_model('test_resnet', num_classes=4)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4) for _ in range(2)]


@pytest.fixture(params=['meta', 'without float64'])
def device(request):
    """A default device without data, and one without float64."""
    return torch.device('meta') if request.param == 'meta' else WithoutFloat64()


@pytest.mark.parametrize('name', ['test_resnet', 'levit_128s', 'test_vit'])
def test_attach_and_teachers(name, device):
    size = 160 if name == 'test_vit' else 224
    model, images = timm.create_model(name, num_classes=4).train(), torch.randn(2, 3, size, size)
    other = copy.deepcopy(model)
    with device:
        attach(model)
        teacher = EMATeacher(model)
        output = model(images)
        assert teacher(images).dense_logits.shape == output.dense_logits.shape
        assert PretrainedTeacher(other, model)(images).shape == (2, 4)
        teacher.update(model)
        detach(model)
        assert dense_logits(model, model.forward_features(images)).shape == output.dense_logits.shape


@pytest.mark.parametrize('options', [dict(), dict(attention='cam', attention_grad=True), dict(clean_weight=0.5)])
def test_losses_with_another_default_device(model, batches, options):
    images, target = batches[0]
    with torch.device('meta'):
        attach(model.train())
        teacher = EMATeacher(model)
        loss = SelfDistillationLoss(MultiMixLoss(20, **options))(model(images), target, teacher(images))
        loss.backward()
    assert loss.isfinite() and loss.device.type == 'cpu'


def test_task_with_another_default_device(model, batches):
    with torch.device('meta'):
        task = MultiMixTask(model, num_mixes=20, teacher='ema', verbose=False, device=torch.device('cpu'))
        model.train()
        assert task(*batches[0])['loss'].isfinite()


def test_calibration(model, batches, device):
    expected = copy.deepcopy(model)
    temperature = calibrate(expected, batches)
    folded = copy.deepcopy(model)
    with device:
        assert calibrate(model, batches) == pytest.approx(temperature, rel=1e-6)
        fold_temperature(folded, temperature, batches[0][0])
    images = batches[0][0]
    for calibrated in (model, folded):
        torch.testing.assert_close(calibrated.eval()(images), expected.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('soft', [False, True])
def test_temperature(dtype, soft, device):
    logits, target = torch.randn(100, 4).to(dtype), torch.randint(4, (100,))
    logits += 2 * torch.eye(4)[target].to(dtype)
    target = torch.eye(4)[target] if soft else target
    expected = fit_temperature(logits.double(), target)
    with device:
        assert fit_temperature(logits, target) == pytest.approx(expected, rel=1e-6)


def test_averages(device):
    values = torch.rand(100)
    with device:
        averages = Averages(torch.device('cpu'), ['loss', 'plain'])
        for value in values:
            averages.update({'loss': value}, 3)
        averages.update({'loss': values[0] * torch.nan}, 0)
        resumed = Averages(torch.device('cpu'))
        resumed.load_state_dict(averages.state_dict())
        resumed.update({'loss': values[0]}, 100)
        averages = averages.compute()
    assert averages == {'loss': pytest.approx(values.double().mean().item(), rel=1e-12)}
    assert list(resumed.sums) == ['loss', 'plain']
    expected = (3 * values.double().sum() + 100 * values[0].double()) / 400
    assert resumed.compute() == {'loss': pytest.approx(expected.item(), rel=1e-12)}


def test_averages_do_not_hold_all_values():
    averages = Averages(torch.device('cpu'))
    for _ in range(10_000):
        averages.update({'loss': torch.ones(())}, 1)
    assert len(averages._pending) < 5000
    assert averages.compute() == {'loss': 1.0}


def test_evaluation_with_another_default_device():
    target = torch.arange(40) % 4
    logits = torch.randn(40, 4) + torch.eye(4)[target]
    embeddings, point = torch.randn(40, 6), torch.ones(40, 6)
    render_glyphs.cache_clear()
    with torch.device('meta'):
        assert len(cross_fit(logits, target).temperatures) == 2
        assert sum(reliability(logits, target).count) == 40
        assert sample_pairs(target, 10).shape == (10, 2)
        assert compactness(embeddings, target)[0] > 0 and uniformity(embeddings) < 0
        assert project(point).shape == (40, 2)
        assert len(choose(range(100), 10, 0)) == 10
        assert next(noise_batches('uniform', 4, (3, 8, 8), 4)).mean() > 0
        assert render_glyphs('test', 3, characters='ab')[0].any()
