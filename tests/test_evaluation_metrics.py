"""Test each measure of the evaluation against an independent computation or a known value."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.common.errors import UsageError
from timm_multimix.evaluation import (
    classification_metrics,
    cross_fit,
    detection_metrics,
    fgsm,
    geometry,
    ood,
    pgd,
    reliability,
)
from timm_multimix.evaluation.main import build_parser
from timm_multimix.evaluation.metrics import calibration_errors, selective_metrics
from timm_multimix.evaluation.robustness import CORRUPTIONS, SEVERITIES, corrupt


@pytest.fixture(params=[(1, 2), (50, 2), (300, 7), (200, 30)])
def problem(request):
    num_images, num_classes = request.param
    generator = torch.Generator().manual_seed(num_images)
    target = torch.randint(num_classes, (num_images,), generator=generator)
    return 3 * torch.randn(num_images, num_classes, generator=generator) + 2 * F.one_hot(target, num_classes), target


def softmax(logits):
    weights = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def test_classification_metrics(problem):
    logits, target = problem
    probs, labels, n = softmax(logits), target.numpy(), len(target)
    order = np.argsort(-probs, axis=1)
    top1 = order[:, 0] == labels
    bins = np.minimum((probs.max(1) * 15).astype(int), 14)
    ece = sum(abs(top1[bins == k].mean() - probs.max(1)[bins == k].mean()) * (bins == k).mean()
              for k in range(15) if (bins == k).any())
    expected = dict(
        top1=100 * top1.mean(),
        nll=-np.log(probs[np.arange(n), labels]).mean(),
        brier=((probs - np.eye(logits.shape[1])[labels]) ** 2).sum(1).mean(),
        ece=100 * ece)
    if logits.shape[1] > 5:
        expected['top5'] = 100 * (order[:, :5] == labels[:, None]).any(1).mean()
    metrics = classification_metrics(logits, target)
    others = {'adaptive_ece', 'classwise_ece', 'aurc', 'coverage_at_5_risk'}
    assert set(metrics) == set(expected) | others
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_top5_needs_six_classes():
    target = torch.arange(5)
    assert 'top5' not in classification_metrics(torch.eye(5), target)
    assert classification_metrics(torch.eye(6)[:5], target)['top5'] == 100


def test_calibration_errors_by_loops(problem):
    logits, target = problem
    probs, labels, n = softmax(logits), target.numpy(), len(target)
    order = np.argsort(probs.max(1), kind='stable')
    adaptive = 0.0
    for part in np.array_split(order, 15):
        if len(part):
            accuracy = np.mean([probs[i].argmax() == labels[i] for i in part])
            adaptive += len(part) / n * abs(accuracy - probs[part].max(1).mean())
    classwise = []
    for k in range(probs.shape[1]):
        error = 0.0
        for b in range(15):
            members = [i for i in range(n) if min(int(probs[i, k] * 15), 14) == b]
            if members:
                frequency = np.mean([labels[i] == k for i in members])
                error += len(members) / n * abs(frequency - probs[members, k].mean())
        classwise.append(error)
    errors = calibration_errors(logits, target)
    assert errors['adaptive_ece'] == pytest.approx(100 * adaptive, rel=1e-6, abs=1e-9)
    assert errors['classwise_ece'] == pytest.approx(100 * np.mean(classwise), rel=1e-6, abs=1e-9)


def literal_selection(confidence, wrong):
    """Compute AURC, averaged over the orders of ties, and the coverage at 5 % risk from every threshold."""
    risks = []
    for size in range(1, len(wrong) + 1):
        border = sorted(confidence, reverse=True)[size - 1]
        sure = [w for c, w in zip(confidence, wrong, strict=True) if c > border]
        tied = [w for c, w in zip(confidence, wrong, strict=True) if c == border]
        risks.append((sum(sure) + (size - len(sure)) * np.mean(tied)) / size)
    coverage = 0.0
    for threshold in confidence:
        accepted = [w for c, w in zip(confidence, wrong, strict=True) if c >= threshold]
        if np.mean(accepted) <= 0.05:
            coverage = max(coverage, len(accepted) / len(wrong))
    return dict(aurc=100 * np.mean(risks), coverage_at_5_risk=100 * coverage)


def test_selective_metrics_by_loops(problem):
    logits, target = problem
    probs, labels = softmax(logits), target.numpy()
    expected = literal_selection(probs.max(1).tolist(), (probs.argmax(1) != labels).tolist())
    assert selective_metrics(logits, target) == pytest.approx(expected, rel=1e-6)


def test_selective_metrics_with_ties():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.0]])
    target = torch.tensor([0, 0, 1, 0, 1, 1])
    expected = literal_selection([0.9, 0.9, 0.7, 0.7, 0.7, 0.6], [False, False, False, True, False, True])
    for order in (torch.arange(6), torch.arange(6).flip(0), torch.tensor([3, 0, 4, 5, 2, 1])):
        assert selective_metrics(logits[order], target[order]) == pytest.approx(expected)
    assert expected['coverage_at_5_risk'] == pytest.approx(100 / 3)


def test_selection_orders_confidences_that_round_to_one():
    logits = torch.tensor([[90.0, 0.0], [80.0, 0.0], [100.0, 0.0]])
    metrics = selective_metrics(logits, torch.tensor([0, 1, 0]))  # the error is the least confident
    assert metrics == pytest.approx(dict(aurc=100 / 9, coverage_at_5_risk=200 / 3))


def test_selection_without_a_tolerated_threshold():
    metrics = selective_metrics(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1]))
    assert metrics == pytest.approx(dict(aurc=100, coverage_at_5_risk=0))


def test_reliability_adds_up_to_the_calibration_error(problem):
    logits, target = problem
    count, confidence, accuracy = reliability(logits, target).values()
    assert len(count) == 15 and sum(count) == len(target)
    gaps = [n * abs(a - c) for n, a, c in zip(count, accuracy, confidence, strict=True) if n]
    assert 100 * sum(gaps) / len(target) == pytest.approx(classification_metrics(logits, target)['ece'], rel=1e-5)
    for k, (n, c) in enumerate(zip(count, confidence, strict=True)):
        assert k / 15 - 1e-9 <= c <= (k + 1) / 15 + 1e-9 if n else math.isnan(c)


def test_reliability_of_a_hand_made_case():
    """Four images have confidence 0.6, three of them are correct. One has confidence 1 and is wrong."""
    logits = torch.log(torch.tensor([[0.6, 0.4]] * 4 + [[1.0, 1e-30]], dtype=torch.float64))
    bins = reliability(logits, torch.tensor([0, 0, 0, 1, 1]), num_bins=4)
    assert bins['count'] == [0, 0, 4, 1]
    assert bins['confidence'][2:] == pytest.approx([0.6, 1]) and bins['accuracy'][2:] == pytest.approx([0.75, 0])
    on_edge = reliability(torch.zeros(3, 2), torch.tensor([0, 1, 1]), num_bins=4)  # 0.5 is an edge
    assert on_edge['count'] == [0, 0, 3, 0]


def test_confidence_that_rounds_to_one_is_in_the_last_bin():
    """Of 100 images with confidence 0.95 all are correct, of 100 with confidence 1 only 90: the mean gap is 2.5 %."""
    logits = torch.log(torch.tensor([[0.95, 0.05]] * 100 + [[1.0, 1e-30]] * 100, dtype=torch.float64))
    target = torch.tensor([0] * 190 + [1] * 10)
    assert classification_metrics(logits, target)['ece'] == pytest.approx(2.5, abs=1e-4)
    assert reliability(logits, target)['count'][-1] == 200


def test_cross_fit_gives_each_half_the_temperature_of_the_other():
    target = torch.randint(4, (40,))
    logits = torch.randn(40, 4) + 2 * F.one_hot(target, 4)
    divided, temperatures = cross_fit(logits, target, seed=3)
    ratio = (logits.double() / divided)[:, 0]
    halves = [ratio.isclose(torch.tensor(t, dtype=torch.float64)) for t in temperatures]
    assert halves[0].sum() == halves[1].sum() == 20 and torch.equal(halves[0], ~halves[1])
    for own, other, temperature in zip(halves, halves[::-1], temperatures, strict=True):
        assert temperature == pytest.approx(fit_temperature(logits[other], target[other]))
        assert temperature != pytest.approx(fit_temperature(logits[own], target[own]))
    assert torch.equal(divided, cross_fit(logits, target, seed=3)[0])


# attacks

class Small(nn.Module):
    """Small classifier for the attacks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 3))

    def forward(self, images):
        return self.net(images)


@pytest.fixture(scope='module')
def attacked():
    torch.manual_seed(0)
    target = torch.arange(60) % 3
    images = (torch.rand(60, 3, 8, 8) * 0.6 + 0.1 + 0.1 * F.one_hot(target, 3)[:, :, None, None]).clamp(0, 1)
    images[:, :, 0] = torch.tensor([0.0, 1.0]).repeat(4)  # at the ends of the range
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
    model.requires_grad_(False)
    assert (model(images).argmax(1) == target).all()
    return model, images, target


@pytest.mark.parametrize('epsilon', [0.0, 0.02, 0.2])
@pytest.mark.parametrize('attack', ['fgsm', 'pgd', 'pgd from the images'])
def test_attacks_stay_in_the_ball_and_in_the_range(attacked, attack, epsilon):
    model, images, target = attacked
    if attack == 'fgsm':
        result = fgsm(model, images, target, epsilon)
    else:
        result = pgd(model, images, target, epsilon, 2.5 * epsilon / 10, 10, random_start=attack == 'pgd')
    assert (result - images).abs().max() <= epsilon + 1e-6
    assert result.min() >= 0 and result.max() <= 1
    assert not result.requires_grad
    if epsilon:
        assert (result - images).abs().max() > 0.99 * epsilon
        assert F.cross_entropy(model(result), target) > F.cross_entropy(model(images), target)


def test_attacks_lower_accuracy_and_pgd_is_the_stronger(attacked):
    model, images, target = attacked
    accuracy = {
        'fgsm': (model(fgsm(model, images, target, 0.1)).argmax(1) == target).double().mean(),
        'pgd': (model(pgd(model, images, target, 0.1, 0.025, 20)).argmax(1) == target).double().mean()}
    assert accuracy['fgsm'] < 0.5 and accuracy['pgd'] <= accuracy['fgsm']
    loss = {name: F.cross_entropy(model(images), target) for name, images in (
        ('fgsm', fgsm(model, images, target, 0.03)), ('pgd', pgd(model, images, target, 0.03, 0.0075, 20)))}
    assert loss['pgd'] > loss['fgsm']


def test_fgsm_is_one_step_along_the_sign_of_the_gradient(attacked):
    model, images, target = copy.deepcopy(attacked[0]).double(), attacked[1].double(), attacked[2]
    leaf = images.clone().requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(leaf), target), leaf)
    expected = (images + 0.05 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, images, target, 0.05), expected)


def test_pgd_projects_and_steps(attacked):
    model, images, target = copy.deepcopy(attacked[0]).double(), attacked[1].double(), attacked[2]
    expected = images
    for _ in range(5):
        leaf = expected.clone().requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(leaf), target), leaf)
        moved = expected + 0.02 * gradient.sign()
        expected = torch.max(torch.min(moved, images + 0.05), images - 0.05).clamp(0, 1)
    torch.testing.assert_close(pgd(model, images, target, 0.05, 0.02, 5, random_start=False), expected)


@pytest.mark.parametrize('attack', ['fgsm', 'pgd'])
def test_attacks_along_the_gradient_of_cross_entropy(attacked, attack):
    """Both losses give the same steps, unless the gradient of cross-entropy underflows."""
    model, images, target = copy.deepcopy(attacked[0]).double(), attacked[1].double(), attacked[2]

    def run(model, images, loss):
        if attack == 'fgsm':
            return fgsm(model, images, target, 0.05, loss=loss)
        return pgd(model, images, target, 0.05, 0.02, 5, random_start=False, loss=loss)

    torch.testing.assert_close(run(model, images, 'cross-entropy'), run(model, images, 'log-odds'))
    confident = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in confident.net[-1].parameters():
            parameter.mul_(1000)
    images = images.float()
    assert torch.equal(run(confident, images, 'cross-entropy'), images)
    assert (confident(run(confident, images, 'log-odds')).argmax(1) == target).double().mean() < 0.9


def test_random_start_is_random_and_seeded(attacked):
    model, images, target = attacked
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(pgd(model, images, target, 0.05, 0.001, 1))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize('scale', [20.0, 1e-9])
@pytest.mark.parametrize('attack', ['fgsm', 'pgd'])
def test_a_factor_on_the_logits_is_no_protection(attacked, attack, scale):
    """A factor changes no prediction, but can make the gradients of cross-entropy very small."""
    model, images, target = attacked
    if scale > 1:
        assert F.cross_entropy(scale * model(images), target) < 1e-6
    if attack == 'fgsm':
        result = fgsm(lambda x: scale * model(x), images, target, 0.1)
    else:
        result = pgd(lambda x: scale * model(x), images, target, 0.1, 0.05, 5)
    assert (model(result).argmax(1) == target).double().mean() < 0.2


@pytest.mark.parametrize('text, value', [
    ('8', 8 / 255), ('8/255', 8 / 255), ('0', 0), ('1/10', 0.1), ('0.5', 0.5 / 255)])
def test_epsilon_in_levels_or_as_a_fraction(text, value):
    assert build_parser().parse_args(['model', '--eps', text]).eps == [pytest.approx(value)]


@pytest.mark.parametrize('text', ['0.03', '256', '-1', 'x', '3/2', '1/0', '8/', ''])
def test_epsilon_that_is_no_size(text):
    with pytest.raises(UsageError, match='such as 8/255'):
        build_parser().parse_args(['model', f'--eps={text}'])


# corruptions

@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_corruptions_grow_with_severity_and_stay_in_the_range(kind, channels):
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(4, channels, 8, 10, generator=generator), (32, 40), mode='bicubic').clamp(0, 1)
    before = images.clone()
    changes = []
    for severity in SEVERITIES:
        first, second = (corrupt(images, kind, severity, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, second) and first.shape == images.shape and first.dtype == images.dtype
        assert first.min() >= 0 and first.max() <= 1
        changes.append((first - images).abs().mean().item())
    assert changes[0] > 0 and changes[-1] > 1.2 * changes[0] and torch.equal(images, before)
    assert changes == sorted(changes) or kind == 'pixelation'


def test_noise_is_seeded_and_does_not_depend_on_batches():
    images = torch.full((6, 3, 16, 16), 0.5)
    whole = corrupt(images, 'gaussian noise', 1, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = [corrupt(part, 'gaussian noise', 1, generator) for part in images.split(4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(corrupt(images, 'gaussian noise', 1, torch.Generator().manual_seed(4)), whole)
    assert (whole - images).std().item() == pytest.approx(0.08, rel=0.05)


def test_corruptions_of_known_images():
    generator = torch.Generator()
    images = torch.tensor([0.2, 0.6]).repeat(8).view(1, 1, 4, 4)
    torch.testing.assert_close(corrupt(images, 'brightness', 3, generator), images + 0.3)
    torch.testing.assert_close(corrupt(images, 'contrast', 1, generator), 0.4 + 0.4 * (images - 0.4))
    torch.testing.assert_close(corrupt(images, 'pixelation', 3, generator), torch.full_like(images, 0.4))
    flat = torch.full((1, 3, 32, 32), 0.5)
    for kind in ('gaussian blur', 'JPEG compression', 'pixelation', 'contrast'):
        torch.testing.assert_close(corrupt(flat, kind, 5, generator), flat, atol=0.01, rtol=0)


# out-of-distribution detection

def pairwise_auroc(inside, outside):
    return 100 * np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in outside] for a in inside])


def literal_detection(inside, outside):
    """Compute the metrics of OOD detection by counting at every threshold."""
    thresholds = [math.inf, *sorted({*inside, *outside}, reverse=True)]
    rates = [(np.mean(np.array(inside) >= t), np.mean(np.array(outside) >= t)) for t in thresholds]

    def average_precision(own, other, sign):
        total, before = 0.0, 0.0
        for t in sorted({sign * s for s in (*inside, *outside)}, reverse=True):
            hits, misses = np.sum(sign * np.array(own) >= t), np.sum(sign * np.array(other) >= t)
            total += (hits / len(own) - before) * hits / (hits + misses)
            before = hits / len(own)
        return 100 * total

    return dict(
        auroc=pairwise_auroc(inside, outside),
        aupr_in=average_precision(inside, outside, 1),
        aupr_out=average_precision(outside, inside, -1),
        fpr95=100 * min(false for true, false in rates if true >= 0.95),
        accuracy=100 * max((true + 1 - false) / 2 for true, false in rates))


@pytest.mark.parametrize('ties', [False, True])
def test_detection_metrics_by_counting(ties):
    inside, outside = torch.randn(41) + 1, torch.randn(30)
    if ties:
        inside, outside = inside.round(), outside.round()
    assert detection_metrics(inside, outside) == pytest.approx(literal_detection(inside.tolist(), outside.tolist()))


@pytest.mark.parametrize('inside, outside, expected', [
    ([3.0, 4.0], [1.0, 2.0], dict(auroc=100, aupr_in=100, aupr_out=100, fpr95=0, accuracy=100)),
    ([1.0, 1.0], [1.0, 1.0], dict(auroc=50, aupr_in=50, aupr_out=50, fpr95=100, accuracy=50)),
    ([1.0, 3.0], [2.0, 0.0], dict(auroc=75, fpr95=50, accuracy=75)),
    ([1.0, 2.0], [3.0, 4.0], dict(auroc=0, fpr95=100, accuracy=50)),
    ([0.0] + [2.0] * 19, [1.0], dict(fpr95=0)),  # 19 of 20 are 95 %
    (list(map(float, range(20))), list(map(float, range(20))), dict(auroc=50, fpr95=95)),
])
def test_detection_metrics_of_hand_made_cases(inside, outside, expected):
    metrics = detection_metrics(torch.tensor(inside), torch.tensor(outside))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_scores_order_images_as_their_definitions():
    logits = torch.randn(50, 6).double()
    assert torch.equal(ood.max_softmax(logits).argsort(), logits.softmax(1).max(1).values.argsort())
    torch.testing.assert_close(ood.max_softmax(logits).sigmoid(), logits.softmax(1).max(1).values)
    torch.testing.assert_close(ood.energy(logits), logits.exp().sum(1).log())
    sure = ood.max_softmax(torch.tensor([[100.0, 0, 0], [200.0, 0, 0]]))
    assert sure[1] > sure[0] and sure.isfinite().all()


@pytest.mark.parametrize('kind', ood.NOISES)
def test_noise(kind):
    def noise(batch_size, seed=0):
        return torch.cat([images for images, _ in ood.noise_batches(kind, 50, (3, 16, 16), batch_size, seed)])

    images = noise(20)
    assert images.shape == (50, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, noise(7))
    assert not torch.equal(images, noise(20, seed=1))
    clipped = ((images == 0) | (images == 1)).double().mean().item()
    # standard normal beyond half a deviation from its mean, on both sides
    assert clipped == pytest.approx(0.0 if kind == 'uniform' else 0.617, abs=0.01)
    assert images.mean().item() == pytest.approx(0.5, abs=0.01)


# geometry

def test_alignment_and_uniformity_by_pairs():
    embeddings, target = torch.randn(40, 5), torch.randint(3, (40,))
    points = (embeddings / embeddings.norm(dim=1, keepdim=True)).double()
    pairs = [(i, j) for i in range(40) for j in range(40) if i < j]
    distances = {pair: (points[pair[0]] - points[pair[1]]).square().sum().item() for pair in pairs}
    same = [distances[i, j] for i, j in pairs if target[i] == target[j]]
    assert geometry.alignment(embeddings, target) == pytest.approx(np.mean(same), rel=1e-5)
    expected = np.log(np.mean([np.exp(-2 * distance) for distance in distances.values()]))
    assert geometry.uniformity(embeddings) == pytest.approx(expected, rel=1e-5)
    large = torch.randn(1500, 4)  # computed in several tiles
    expected = torch.pdist(F.normalize(large.double())).square().mul(-2).exp().mean().log().item()
    assert geometry.uniformity(large) == pytest.approx(expected)


def test_compactness():
    target = torch.tensor([0, 0, 1, 1])
    points = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    assert geometry.compactness(points, target) == (pytest.approx(0), {0: 0, 1: 0})
    ratio, by_class = geometry.compactness(points, torch.tensor([0, 1, 0, 1]))  # both classes are everywhere
    assert ratio == pytest.approx(1) and by_class == pytest.approx({0: 1, 1: 1})
    embeddings, target = torch.randn(30, 4), torch.randint(2, 4, (30,)) * 2
    points = F.normalize(embeddings.double())
    within = {k: (points[target == k] - points[target == k].mean(0)).square().sum(1) for k in (4, 6)}
    overall = (points - points.mean(0)).square().sum(1)
    ratio, by_class = geometry.compactness(embeddings, target)
    assert ratio == pytest.approx((sum(w.sum() for w in within.values()) / overall.sum()).item())
    assert by_class == pytest.approx({k: (w.mean() / overall.mean()).item() for k, w in within.items()})


def test_geometry_sees_directions_only():
    embeddings, target = torch.randn(30, 4), torch.arange(30) % 3
    scaled = embeddings * torch.rand(30, 1).add(0.1)
    for measure in (geometry.alignment, lambda *args: geometry.compactness(*args)[0]):
        assert measure(scaled, target) == pytest.approx(measure(embeddings, target), rel=1e-5)


@pytest.mark.parametrize('shape', [(4, 1), (20, 3), (100, 8)])
def test_picture_keeps_neighbours(shape):
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(max(shape[1], 2))[:2, :shape[1]]
    embeddings = centers[torch.arange(shape[0]) % 2] + 0.05 * torch.randn(shape, generator=generator)
    points = geometry.project(embeddings)
    assert points.shape == (shape[0], 2) and points.isfinite().all()
    if shape[0] == 100:
        distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
        assert (distances.argmin(1) % 2 == torch.arange(100) % 2).all()


# between images

def test_pairs_are_of_different_classes():
    target = torch.tensor([0] * 50 + [1, 2])
    pairs = geometry.sample_pairs(target, 200)
    assert pairs.shape == (200, 2) and (target[pairs[:, 0]] != target[pairs[:, 1]]).all()
    assert torch.equal(pairs, geometry.sample_pairs(target, 200)) and pairs.unique().numel() > 40
    assert geometry.sample_pairs(torch.zeros(9).long(), 5).shape == (0, 2)


def test_confidence_and_entropy_of_known_distributions():
    logits = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    assert geometry.confidence_and_entropy(logits) == pytest.approx(
        ((0.5 + 1 / 3) / 2, (1.5 * math.log(2) + math.log(3)) / 2))
    assert geometry.confidence_and_entropy(torch.tensor([[0.0, -200.0]])) == pytest.approx((1, 0))


def test_counts_of_a_third_class():
    targets = torch.tensor([[0, 1], [1, 2], [0, 1], [2, 1]])
    assert geometry.count_third_class(torch.tensor([1, 0, 2, 2]), targets) == 2


def test_intrusions_of_a_hand_made_plane():
    """Class 2 lies between classes 0 and 1, so their middle is an intrusion. No class lies between 0 and 2."""
    real = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pairs = torch.tensor([[0, 1], [0, 2]] * 3)
    mixed = torch.stack([
        torch.lerp(real[j], real[i], share)
        for share, (i, j) in zip((0.1, 0.1, 0.5, 0.5, 0.9, 0.9), pairs.tolist(), strict=True)])
    for scale in (1, 5):
        assert geometry.count_third_class(geometry.nearest_classes(scale * mixed, real, torch.arange(3)), pairs) == 1
    nearest = geometry.nearest_classes(mixed, real, torch.tensor([0, 1, 1]))
    assert geometry.count_third_class(nearest, pairs.clamp(max=1)) == 0
