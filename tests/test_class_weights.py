"""Class weights and positive weights of the losses."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import LOSSES, gradient, problem
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    attend,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.build.criteria import loss_options
from timm_multimix.losses import reference


def _class_weights(c, kind):
    names = ['weight'] if kind == 'ce' else ['weight', 'pos_weight']
    return {name: torch.rand(c).double() + 0.1 for name in names}


@given(
    b=st.integers(1, 8), c=st.integers(2, 6), kind=st.sampled_from(list(LOSSES)), soft=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
def test_identity_weights_give_the_losses_of_pytorch(b, c, kind, soft, smoothing, seed):
    torch.manual_seed(seed)
    logits, given_weights = torch.randn(b, c).double(), _class_weights(c, kind)
    target = torch.rand(b, c).double() if soft else torch.randint(c, (b,))

    def expected(logits):
        if kind == 'ce':
            return F.cross_entropy(logits, target, label_smoothing=0.0 if soft else smoothing, **given_weights)
        return BinaryCrossEntropy(smoothing=smoothing, **given_weights)(logits, target)

    def fused(logits):
        return LOSSES[kind][0](logits, target, torch.eye(b).double(), smoothing=smoothing, **given_weights)

    def clean(logits):
        loss = MultiMixLoss(clean_weight=1.0, loss_type=kind, smoothing=smoothing, **given_weights)
        return loss(logits, target)

    for actual in (fused, clean):
        torch.testing.assert_close(actual(logits), expected(logits), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(gradient(actual, logits), gradient(expected, logits), rtol=1e-6, atol=1e-8)


@given(
    b=st.integers(1, 7), r=st.integers(1, 4), c=st.integers(2, 5), n=st.integers(1, 30),
    kind=st.sampled_from(list(LOSSES)), soft=st.booleans(), balance=st.booleans(), tile=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99))
def test_mixed_targets_match_the_reference(b, r, c, n, kind, soft, balance, tile, seed):
    torch.manual_seed(seed)
    logits, target, y, _ = problem(b, r, c, n, soft=soft)
    given_weights = _class_weights(c, kind)
    raw, attention = sample_weights(n, b, r).double(), torch.rand(b, r).double() + 0.01
    divides = kind == 'ce' and not soft

    def actual(logits, attention, balance=balance):
        return LOSSES[kind][0](
            logits, target, attend(raw, attention), balance=balance, attention_grad=True, tile_size=tile,
            **given_weights)

    def expected(logits, attention):
        return reference.dense_multimix(
            logits, y, raw, attention, lambda z: z, lambda x, y: LOSSES[kind][1](x, y, **given_weights),
            weight=given_weights['weight'][target] if divides else None)

    torch.testing.assert_close(actual(logits, attention), expected(logits, attention), rtol=1e-6, atol=1e-9)
    grads, wanted = gradient(actual, logits, attention), gradient(expected, logits, attention)
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-5, atol=1e-9)
    if balance:
        m = attend(raw, attention)
        wanted = [torch.stack([reference.balance_gradient(wanted[0][:, j], m[j]) for j in range(r)], dim=1)]
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_teacher_is_weighted_like_soft_targets(kind, temperature):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 4).double()
    target, given_weights = torch.randint(4, (5,)), _class_weights(4, kind)
    options = dict(distill_weight=0.3, distill_temperature=temperature)
    loss = LOSSES[kind][1]
    predict = reference.softmax if kind == 'ce' else torch.sigmoid

    def expected(logits):
        y = reference.one_hot(target, 4, torch.float64)
        classified = loss(logits, y, **given_weights)
        distilled = temperature ** 2 * loss(logits / temperature, predict(teacher / temperature), **given_weights)
        divisor = given_weights['weight'][target].sum() if kind == 'ce' else 5
        return (0.7 * classified + 0.3 * distilled).sum() / divisor

    def fused(logits):
        return LOSSES[kind][0](
            logits, target, torch.eye(5).double(), teacher_logits=teacher, **options, **given_weights)

    def clean(logits):
        return MultiMixLoss(clean_weight=1.0, loss_type=kind, **given_weights)(logits, target, teacher, **options)

    for actual in (fused, clean):
        torch.testing.assert_close(actual(logits), expected(logits))
        torch.testing.assert_close(gradient(actual, logits), gradient(expected, logits))


@pytest.mark.parametrize('kind', LOSSES)
def test_weights_of_1_change_nothing(kind):
    output = MultiMixOutput(torch.randn(6, 4).double(), torch.randn(6, 9, 4).double(), torch.rand(6, 9))
    target = torch.randint(4, (6,))
    ones = {name: torch.ones(4) for name in _class_weights(4, kind)}

    def loss(**weights):
        return MultiMixLoss(
            20, loss_type=kind, clean_weight=0.1, generator=torch.Generator().manual_seed(0), **weights)(output, target)

    torch.testing.assert_close(loss(**ones), loss(), rtol=1e-6, atol=0)


def test_class_weights_move_with_the_module():
    loss = MultiMixLoss(weight=torch.ones(3), loss_type='bce', pos_weight=torch.tensor(2.0))
    assert {'weight', 'pos_weight'} == loss.state_dict().keys()
    assert loss.to('meta').weight.device.type == 'meta'


@pytest.mark.parametrize('options, message', [
    (dict(weight=torch.ones(4)), r'weight must have shape \(c,\) = \(3,\), got \(4,\)'),
    (dict(pos_weight=torch.ones(3)), 'pos_weight is for binary cross-entropy'),
    (dict(pos_weight=torch.ones(2), loss_type='bce'), r'pos_weight must have shape \(c,\) = \(3,\), got \(2,\)'),
])
def test_bad_class_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiMixLoss(10, **options)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


def test_functional_losses_refuse_bad_class_weights():
    logits, target, weights = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.eye(4)
    for function in (multimix_cross_entropy, multimix_binary_cross_entropy):
        with pytest.raises(ValueError, match=r'weight must have shape \(c,\) = \(3,\), got \(4,\)'):
            function(logits, target, weights, weight=torch.ones(4))


@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.3])),
    BinaryCrossEntropy(smoothing=0, weight=torch.tensor([1.0, 2.0, 0.3]), pos_weight=torch.tensor([3.0, 1.0, 0.5])),
    BinaryCrossEntropy(smoothing=0, pos_weight=2.0),
], ids=['ce', 'bce', 'scalar'])
def test_class_weights_of_a_criterion(criterion):
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 2, 0])
    loss = MultiMixLoss(clean_weight=1.0, **loss_options(criterion))
    torch.testing.assert_close(loss(logits, target), criterion(logits, target))


@pytest.mark.parametrize('name', ['weight', 'pos_weight'])
@pytest.mark.parametrize('value', [-1.0, float('nan'), float('inf')])
def test_invalid_class_weights(name, value):
    with pytest.raises(ValueError, match=f'^{name} must be finite and not negative'):
        MultiMixLoss(loss_type='bce', **{name: torch.tensor([1.0, value])})
