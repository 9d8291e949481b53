"""Devices other than the CPU, emulated: as the model's device, as the default device, or both."""
import copy
import csv
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from device_helpers import DEVICE, emulated_device
from training_helpers import image_folder  # noqa: F401

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
    sample_weights,
)
from timm_multimix.calibration.temperature import fit_temperature, fold_temperature
from timm_multimix.common.console import Averages
from timm_multimix.data.demo import DEMOS, create_dataset
from timm_multimix.data.glyphs import render_glyphs
from timm_multimix.evaluation import geometry, metrics, ood
from timm_multimix.evaluation.images import choose
from timm_multimix.evaluation.main import main as evaluate
from timm_multimix.losses import manifold_mixup_weights
from timm_multimix.training import main as train


@pytest.fixture(params=[('cpu', DEVICE), (DEVICE, DEVICE), (DEVICE, 'cpu')], ids=['device', 'both', 'default'])
def device(request):
    """Device of the model. The emulated device is that device, the default device, or both."""
    default, device = request.param
    with emulated_device(), torch.device(default):
        yield torch.device(device)


@pytest.fixture
def model():
    return timm.create_model('test_resnet', num_classes=4)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4) for _ in range(2)]


def _predictions():
    target = torch.arange(60) % 7
    return torch.randn(60, 7) + 2 * F.one_hot(target, 7), target


@pytest.mark.parametrize('device', [('cpu', DEVICE)], indirect=True)
def test_the_emulated_device(device):
    values = torch.ones(3, device=device)
    with pytest.raises(TypeError, match='float64'):
        values.double()
    with pytest.raises(RuntimeError, match='different devices'):
        values + torch.ones(3)
    with pytest.raises(RuntimeError, match='generator'):
        torch.randperm(3, generator=torch.Generator(), device=device)
    assert values.cpu().double().tolist() == [1, 1, 1]


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_attach_and_teachers(name, device):
    model, images = timm.create_model(name, num_classes=4).to(device).train(), torch.randn(2, 3, 160, 160).to(device)
    other = copy.deepcopy(model)
    attach(model)
    teacher = EMATeacher(model)
    output = model(images)
    assert teacher(images).dense_logits.shape == output.dense_logits.shape
    assert PretrainedTeacher(other, model)(images).shape == (2, 4)
    teacher.update(model)
    detach(model)
    assert dense_logits(model, model.forward_features(images)).device == device


@pytest.mark.parametrize('options', [dict(), dict(attention='cam', attention_grad=True), dict(clean_weight=0.5)])
def test_losses(model, batches, options, device):
    images, target = (tensor.to(device) for tensor in batches[0])
    attach(model.to(device).train())
    teacher = EMATeacher(model)
    loss = SelfDistillationLoss(MultiMixLoss(20, **options))(model(images), target, teacher(images))
    loss.backward()
    assert loss.isfinite() and loss.device == device


def test_task(model, batches, device):
    task = MultiMixTask(model.to(device), num_mixes=20, teacher='ema', verbose=False, device=device)
    model.train()
    assert task(*(tensor.to(device) for tensor in batches[0]))['loss'].isfinite()


@pytest.mark.parametrize('options', [dict(), dict(num_positions=3), dict(tuple_length=2, alpha=(0.5, 2))])
def test_weights(options, device):
    options = dict(alpha=1.0) | options
    assert sample_weights(5, 8, **options, device=device).device == device
    assert sample_weights(5, 8, **options, generator=torch.Generator()).device.type == 'cpu'
    assert manifold_mixup_weights(8).device == torch.empty(()).device  # the default


def test_calibration(model, batches, device):
    images = batches[0][0]
    expected = copy.deepcopy(model)
    temperature = calibrate(expected, batches)
    folded = copy.deepcopy(model).to(device)
    assert calibrate(model.to(device), batches) == pytest.approx(temperature, rel=1e-6)
    fold_temperature(folded, temperature, images.to(device))
    for calibrated in (model, folded):
        torch.testing.assert_close(
            calibrated.eval()(images.to(device)).cpu(), expected.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('soft', [False, True])
def test_temperature(dtype, soft):
    logits, target = _predictions()
    logits, target = logits.to(dtype), F.one_hot(target).float() if soft else target
    expected = fit_temperature(logits.double(), target)
    with emulated_device():
        assert fit_temperature(logits.to(DEVICE), target.to(DEVICE)) == pytest.approx(expected, rel=1e-6)


def test_averages():
    values = torch.rand(100)
    with emulated_device():
        on_device = values.to(DEVICE)
        averages = Averages(DEVICE)
        for value in on_device:
            averages.update({'loss': value}, 3)
        averages.update({'loss': on_device[0] * torch.nan}, 0)
        resumed = Averages(DEVICE)
        resumed.load_state_dict(averages.state_dict())
        resumed.update({'loss': on_device[0]}, 100)
        averages = averages.compute()
    assert averages == {'loss': pytest.approx(values.double().mean().item(), rel=1e-12)}
    assert list(resumed.sums) == ['loss']
    expected = (3 * values.double().sum() + 100 * values[0].double()) / 400
    assert resumed.compute() == {'loss': pytest.approx(expected.item(), rel=1e-12)}


def test_averages_do_not_hold_all_values():
    averages = Averages(torch.device('cpu'))
    for _ in range(10_000):
        averages.update({'loss': torch.ones(())}, 1)
    assert len(averages._pending) < 5000
    assert averages.compute() == {'loss': 1.0}


def _measure(logits, target):
    pairs = geometry.sample_pairs(target, 9)
    return dict(
        classification=metrics.classification_metrics(logits, target),
        reliability=metrics.reliability(logits, target)['count'],
        tempered=metrics.cross_fit(logits, target)[0].tolist(),
        ood=ood.detection_metrics(*(score(logits) for score in ood.SCORES.values())),
        pairs=pairs.tolist(),
        between=geometry.confidence_and_entropy(logits),
        nearest=geometry.nearest_classes(logits[:2], logits, target).tolist(),
        third=geometry.count_third_class(target[:2], torch.stack([target[:2]] * 2, dim=1)),
        geometry=(geometry.alignment(logits, target), geometry.uniformity(logits)),
        compactness=geometry.compactness(logits, target),
        projection=geometry.project(logits).tolist(),
        noise=next(ood.noise_batches('gaussian', 2, (3, 4, 4), 2))[0].tolist(),
        chosen=choose(range(100), 10, 0))


def test_metrics(device):
    with torch.device('cpu'):
        logits, target = _predictions()
        expected = _measure(logits, target)
    assert _measure(logits.to(device), target.to(device)) == expected


@pytest.mark.parametrize('device', [(DEVICE, 'cpu')], indirect=True)
@pytest.mark.parametrize('name', DEMOS)
def test_demo_datasets(name, device):
    render_glyphs.cache_clear()
    image, _ = create_dataset(name, split='train')[0]
    assert image.getbbox()


def _summary(folder):
    with open(folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings('ignore:.*from a non-meta parameter')  # the emulated device supports it
@pytest.mark.parametrize('device', [(DEVICE, DEVICE)], indirect=True)
def test_training_and_evaluation(image_folder, tmp_path, monkeypatch, device):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name, kind in (('emulated', str(device)), ('expected', 'cpu')):
        with nullcontext() if name == 'emulated' else torch.device('cpu'):
            assert train([
                '--data-dir', str(image_folder), '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32',
                '--batch-size', '24', '--epochs', '1', '--workers', '0', '--val-split', '', '--multimix', 'dense',
                '--output', '.', '--experiment', name, '--device', kind]) == 0
    emulated, expected = _summary(tmp_path / 'emulated'), _summary(tmp_path / 'expected')
    assert emulated[0]['train_top1'] == expected[0]['train_top1']
    # the weights are drawn on the device
    assert float(emulated[0]['train_loss']) == pytest.approx(float(expected[0]['train_loss']), rel=0.05)
    assert evaluate(['emulated', '--data-dir', str(image_folder), '--split', 'validation', '--device', str(device),
                     '--workers', '0', '--parts', 'ood', 'between', '--output', 'evaluation']) == 0
