"""Fit a temperature and fold it into the classifier."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn.utils import parametrizations

from timm_multimix import calibrate
from timm_multimix.calibration.temperature import (
    collect_logits,
    fit_temperature,
    fold_temperature,
    last_layers,
    scalable_classifier,
)


def random_problem(num_images=200, num_classes=5, scale=3.0, seed=0):
    """Return logits of an overconfident classifier with an accuracy of about two thirds, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator) + 1.5 * F.one_hot(target, num_classes)
    return scale * logits, target


def best_temperature(logits, target):
    """Search the minimum of the cross-entropy."""
    def loss(log_temperature):
        return F.cross_entropy(logits.double() / np.exp(log_temperature), target).item()

    return np.exp(minimize_scalar(loss, bounds=(-6, 6), method='bounded', options=dict(xatol=1e-9)).x)


@pytest.mark.parametrize('scale', [0.02, 0.5, 3.0, 200.0])
@pytest.mark.parametrize('num_classes', [2, 5])
def test_temperature_minimizes_the_loss(scale, num_classes):
    logits, target = random_problem(num_classes=num_classes, scale=scale)
    assert fit_temperature(logits, target) == pytest.approx(
        scale * best_temperature(*random_problem(num_classes=num_classes, scale=1.0)), rel=1e-5)


def test_temperature_for_soft_targets():
    logits, target = random_problem()
    soft = F.one_hot(target, 5).double()
    assert fit_temperature(logits, soft) == pytest.approx(fit_temperature(logits, target), rel=1e-10)
    soft = 0.8 * soft + 0.04
    assert fit_temperature(logits, soft) == pytest.approx(best_temperature(logits, soft), rel=1e-5)


def test_temperature_is_invariant_to_shifts_of_the_logits():
    logits, target = random_problem()
    shifted = logits.double() + 1e6 * torch.randn(len(logits), 1, dtype=torch.float64)
    assert fit_temperature(shifted, target) == pytest.approx(fit_temperature(logits, target), rel=1e-6)


def test_images_all_classified_correctly_give_the_rule_of_succession():
    """With two classes and equal logits for all images, the fitted confidence is exactly (n + 1) / (n + 2)."""
    target = torch.randint(2, (30,))
    logits = 40.0 * F.one_hot(target, 2)
    probs = (logits.double() / fit_temperature(logits, target)).softmax(1)
    torch.testing.assert_close(probs.max(1).values, torch.full((30,), 31 / 32, dtype=torch.float64))


@pytest.mark.parametrize('logits, target, message', [
    (torch.randn(4, 3), torch.zeros(5).long(), 'got shapes'),
    (torch.randn(0, 3), torch.zeros(0).long(), 'got shapes'),
    (torch.randn(4, 1), torch.zeros(4).long(), 'got shapes'),
    (torch.randn(4, 3, 3), torch.zeros(4).long(), 'got shapes'),
    (torch.tensor([[1.0, torch.nan]]), torch.tensor([0]), 'not finite'),
    (torch.tensor([[1.0, 2.0]]), torch.tensor([2]), 'from 0 to 1, got torch.int64 from 2'),
    (torch.randn(4, 3), torch.rand(4), 'got torch.float32'),
    (torch.randn(4, 3), 0.5 * torch.eye(3)[[0, 1, 2, 0]], 'sum to 1'),
    (torch.randn(4, 3), torch.full((4, 3), torch.nan), 'sum to 1'),
    (torch.randn(4, 3), torch.ones(4, 1), r'probabilities \(4, 3\)'),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), 'do not predict'),
    (-10 * torch.eye(3), torch.arange(3), 'do not predict'),
])
def test_problems_without_a_temperature(logits, target, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, target)


class Net(nn.Module):
    """A small body and a head."""

    def __init__(self, head, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Tanh())
        self.head = head

    def forward(self, images):
        return self.head(self.body(images))


class Sum(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class AsMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.conv(x[..., None, None]).flatten(1)


class Twice(nn.Module):
    """One classifier for two views of the features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return torch.maximum(self.fc(x), self.fc(x.flip(1)))


HEADS = {
    'linear': lambda: nn.Linear(6, 4),
    'no bias': lambda: nn.Linear(6, 4, bias=False),
    'convolution': AsMap,
    'mlp': lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 4)),
    'norm at the end': lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)),
    'relu at the end': lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()),
    'two': lambda: Sum(nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.Linear(3, 4))),
    'deep one first': lambda: Sum(nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.Linear(3, 4)), nn.Linear(6, 4)),
    'used twice': Twice,
    'weight norm': lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    'starts at zero': lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)),
}
REFUSED = {
    'gelu at the end': (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU()), 'not proportional'),
    'softmax at the end': (lambda: nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)), 'not proportional'),
    'cosine': (lambda: Cosine(6, 4), 'not proportional'),
    'a constant': (lambda: Shifted(6, 4), 'not proportional'),
    'spectral norm': (lambda: parametrizations.spectral_norm(nn.Linear(6, 4)), 'not proportional'),
    'orthogonal': (lambda: parametrizations.orthogonal(nn.Linear(6, 4)), 'not proportional'),
    'features too': (lambda: Sum(nn.Linear(6, 4), nn.AdaptiveAvgPool1d(4)), 'not proportional'),
}


def loader(num_images=60, batch_size=20):
    images = torch.rand(num_images, 3, 2, 2)
    return [(part, torch.arange(len(part)) % 4) for part in images.split(batch_size)]


def labelled_by(model, batches, right=0.7):
    """Return the batches with labels for which the model has the accuracy `right`."""
    model.eval()
    batches = [(images, model(images).argmax(1)) for images, _ in batches]
    return [(images, torch.where(torch.rand(len(target)) < right, target, (target + 1) % 4))
            for images, target in batches]


@torch.no_grad()
@pytest.mark.parametrize('kind', HEADS)
def test_logits_are_divided_by_the_temperature(kind):
    model = Net(HEADS[kind]()).eval()
    if kind == 'starts at zero':
        nn.init.zeros_(model.head[1].weight)
        assert last_layers(model, loader()[0][0][:1]) == scalable_classifier(model, loader()[0][0]) == ['head.1']
        nn.init.normal_(model.head[1].weight)
    batches = labelled_by(model, loader())
    before = torch.cat([model(images) for images, _ in batches])
    target = torch.cat([target for _, target in batches])
    body, keys = copy.deepcopy(model.body.state_dict()), list(model.state_dict())
    temperature = calibrate(model, batches)
    after = torch.cat([model(images) for images, _ in batches])
    assert temperature == pytest.approx(best_temperature(before, target), rel=1e-4)
    assert abs(temperature - 1) > 0.05
    torch.testing.assert_close(after, before / temperature, rtol=1e-5, atol=1e-6)
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, body[name]) for name, value in model.body.state_dict().items())
    assert calibrate(model, batches) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize('kind', REFUSED)
def test_heads_that_are_not_proportional_are_refused_and_unchanged(kind):
    make, message = REFUSED[kind]
    model = Net(make()).eval()
    batches = labelled_by(model, loader())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_heads_with_one_weight_are_scaled_once():
    model = Net(Sum(nn.Linear(6, 4), nn.Linear(6, 4))).eval()
    model.head.parts[0].weight = model.head.parts[1].weight
    images = loader()[0][0]
    before = model(images)
    fold_temperature(model, 2.0, images)
    torch.testing.assert_close(model(images), before / 2)


def test_compiled_models():
    model = Net(nn.Linear(6, 4)).eval()
    batches = labelled_by(model, loader())
    weight = model.head.weight.detach().clone()

    def compiled(*args):
        raise AssertionError('the model must not be compiled')

    temperature = calibrate(torch.compile(model, backend=compiled), batches)
    torch.testing.assert_close(model.head.weight.detach(), weight / temperature)


def test_modes_gradients_and_statistics_are_unchanged():
    model = Net(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))).train()
    model.body.eval()
    batches = labelled_by(copy.deepcopy(model), loader())
    statistics = model.head[0].running_mean.clone()
    calibrate(model, batches)
    assert model.head.training and not model.body.training
    assert torch.equal(model.head[0].running_mean, statistics)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class RoundingLinear(nn.Linear):
    """Linear layer that rounds its operands, as a GPU does with TF32."""

    def forward(self, x):
        return nn.functional.linear(x.bfloat16().float(), self.weight.bfloat16().float(), self.bias)


def test_products_that_round():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), RoundingLinear(6, 4))
    assert scalable_classifier(model, torch.randn(8, 6)) == ['2']


def test_frozen_models_and_half_precision():
    model = Net(nn.Linear(6, 4)).eval().requires_grad_(False)
    batches = labelled_by(model, loader())
    half = copy.deepcopy(model).bfloat16()
    before = half(batches[0][0].bfloat16()).float()
    temperature = calibrate(half, [(images.bfloat16(), target) for images, target in batches])
    torch.testing.assert_close(half(batches[0][0].bfloat16()).float(), before / temperature, rtol=0.03, atol=0.03)
    assert calibrate(model, batches) == pytest.approx(temperature, rel=0.05)


def test_collected_logits_are_in_order():
    model = Net(nn.Linear(6, 4)).train()
    batches = loader(num_images=50)
    logits, target, example = collect_logits(model, batches)
    assert torch.equal(logits, model.eval()(torch.cat([images for images, _ in batches])).detach())
    assert torch.equal(target, torch.cat([target for _, target in batches])) and len(example) == 2
    with pytest.raises(ValueError, match='no images'):
        calibrate(model, [])


@pytest.mark.parametrize('temperature', [0, -1.0, float('inf'), float('nan')])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match='positive number'):
        fold_temperature(Net(nn.Linear(6, 4)), temperature, loader()[0][0])


@torch.no_grad()
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout'])
def test_predictions_are_unchanged(tmp_path, name):
    """The calibrated state_dict is a checkpoint that timm can load."""
    model = timm.create_model(name, num_classes=4).eval()
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(200, 3, 32, 32) if name != 'test_vit' else torch.randn(200, 3, 160, 160)[:40]
    batches = labelled_by(model, [(part, None) for part in images.split(20)])
    before = model(images)
    temperature = calibrate(model, batches)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'calibrated.pth.tar')
    loaded = timm.create_model(name, num_classes=4, checkpoint_path=str(tmp_path / 'calibrated.pth.tar')).eval()
    after = loaded(images)
    torch.testing.assert_close(after * temperature, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.argsort(1), before.argsort(1))


def test_scripted_models_are_refused():
    with pytest.warns(FutureWarning):
        model = torch.jit.script(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r'torch\.jit'):
        scalable_classifier(model, torch.randn(2, 6))
