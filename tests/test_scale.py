"""The scale of mixed logits."""
import math

import pytest
import torch
import torch.nn.functional as F

from timm_multimix import MultiMixLoss, sample_weights
from timm_multimix.scale import fitting_gap, fitting_scale

ALPHA = (0.5, 2.0)


@pytest.mark.parametrize(
    ('num_classes', 'batch_size', 'length'), [(3, 20, 20), (10, 50, 50), (36, 50, 4), (200, 30, 30)])
def test_gap_fits_mixes_best(num_classes, batch_size, length):
    """Gaps to either side have a higher mean cross-entropy, on other batches and mixes."""
    generator = torch.Generator().manual_seed(1)
    gap = fitting_gap(num_classes, length, ALPHA)

    def loss(gap):
        total = 0
        for _ in range(40):
            target = F.one_hot(torch.randint(num_classes, (batch_size,), generator=generator), num_classes).double()
            weights = sample_weights(
                100, batch_size, alpha=ALPHA, tuple_length=length, generator=generator).double()
            total += F.cross_entropy(gap * (weights @ target), weights @ target)
        return total

    losses = []
    for factor in (0.8, 1, 1.25):
        generator.manual_seed(1)
        losses.append(loss(factor * gap))
    assert losses[1] == min(losses)


def test_long_mixes_are_fitted_by_least_squares():
    """With many examples of every class in a mix, the fit is a tangent: the gap is the number of classes."""
    assert fitting_gap(5, 1000, (1.0, 1.0)) == pytest.approx(5, rel=0.05)


def test_scale_makes_certain_examples_confident():
    for num_classes in (2, 10, 1000):
        gap = fitting_gap(num_classes, 64, ALPHA) / fitting_scale(num_classes, 64, ALPHA)
        assert 1 / (1 + (num_classes - 1) * math.exp(-gap)) == pytest.approx(0.999)
    scales = [fitting_scale(c, 64, ALPHA) for c in (2, 10, 100, 1000)]
    assert scales == sorted(scales) and scales[0] < 0.5 and scales[-1] > 4


def test_scale_is_the_same_at_every_call_and_draws_nothing():
    state = torch.get_rng_state()
    first = fitting_scale(7, 11, ALPHA)
    fitting_gap.cache_clear()
    assert fitting_scale(7, 11, ALPHA) == first
    assert (torch.get_rng_state() == state).all()


def test_extreme_concentrations_and_many_classes_have_a_scale():
    for num_classes, length, alpha in ((1000, 2, (1e-4, 1e-4)), (3, 50, (100.0, 1e4)), (21841, 300, ALPHA)):
        assert 0.1 < fitting_scale(num_classes, length, alpha) < 100


@pytest.mark.parametrize(('num_classes', 'length'), [(1, 5), (5, 1)])
def test_nothing_to_scale(num_classes, length):
    assert fitting_scale(num_classes, length, ALPHA) == 1


@pytest.mark.parametrize(
    ('options', 'alpha', 'is_scaled'), [
        ({}, (1 / 12, 1 / 12), True), (dict(alpha=ALPHA), ALPHA, True), (dict(balance=False), None, False),
        (dict(loss_type='bce'), None, False)])
def test_auto_is_the_fitting_scale(options, alpha, is_scaled):
    """Of the value; the gradient keeps its size."""
    logits, target = torch.randn(12, 30), torch.randint(30, (12,))
    scale = fitting_scale(30, 12, alpha) if is_scaled else 1.0
    values, gradients = [], []
    for logit_scale in ('auto', scale):
        torch.manual_seed(0)
        leaf = logits.clone().requires_grad_()
        loss = MultiMixLoss(50, logit_scale=logit_scale, **options)(leaf, target)
        loss.backward()
        values.append(loss.detach())
        gradients.append(leaf.grad)
    assert scale != 1 or not is_scaled
    assert values[0] == values[1]
    torch.testing.assert_close(scale * gradients[0], gradients[1])


@pytest.mark.parametrize('dynamic', [False, True])
def test_auto_compiles_without_a_graph_break(dynamic):
    loss = MultiMixLoss(20, logit_scale='auto', backend='torch')
    compiled = torch.compile(loss, backend='eager', fullgraph=True, dynamic=dynamic)
    for batch_size in (6, 9):
        logits, target = torch.randn(batch_size, 4), torch.randint(4, (batch_size,))
        losses = []
        for function in (loss, compiled):
            torch.manual_seed(0)
            losses.append(function(logits, target))
        assert losses[0].isfinite() and torch.isclose(*losses, rtol=0.2)
