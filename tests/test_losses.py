
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import (
    LOSSES,
    PAPERS_ALPHA,
    gradient,
    literal,
    literal_gradient,
    peak_memory,
    problem,
    relative_error,
)

from timm_multimix import (
    MultiMixLoss,
    attend,
    manifold_mixup_weights,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.losses import (
    reference,
)

shapes = st.fixed_dictionaries(dict(
    b=st.integers(1, 9), r=st.integers(1, 5), c=st.integers(1, 8), n=st.integers(1, 40), soft=st.booleans()))


@given(shape=shapes, kind=st.sampled_from(list(LOSSES)), balance=st.booleans(), tile=st.none() | st.integers(1, 9))
def test_value_and_gradient_match_the_reference(shape, kind, balance, tile):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(**shape)
    def fused(logits):
        return function(logits, target, weights, balance=balance, tile_size=tile)
    torch.testing.assert_close(fused(logits), literal(logits, y, weights, loss))
    expected = literal_gradient(logits, y, weights, loss, balance)
    torch.testing.assert_close(gradient(fused, logits)[0], expected, rtol=1e-6, atol=1e-9)


@given(shape=shapes, kind=st.sampled_from(list(LOSSES)), tile=st.none() | st.integers(1, 9))
def test_gradient_through_classifier_embeddings_and_attention(shape, kind, tile):
    function, loss = LOSSES[kind]
    b, r, c, n = (shape[k] for k in 'brcn')
    _, target, y, _ = problem(**shape)
    z, classifier = torch.randn(b, r, 4).double(), torch.randn(c, 4).double()
    raw, attention = sample_weights(n, b, r).double(), torch.rand(b, r).double() + 0.01

    def fused(z, classifier, attention):
        return function(
            z @ classifier.T, target, attend(raw, attention), balance=False, attention_grad=True, tile_size=tile)

    def expected(z, classifier, attention):
        return reference.dense_multimix(z, y, raw, attention, lambda z: z @ classifier.T, loss)

    inputs = z, classifier, attention
    for actual, wanted in zip(gradient(fused, *inputs), gradient(expected, *inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


def test_gradient_through_the_weights_is_off_by_default():
    logits, target, _, weights = problem(4, 2, 3, 10)
    logits.requires_grad_()
    weights.requires_grad_()
    multimix_cross_entropy(logits, target, weights).backward()
    assert weights.grad is None and logits.grad is not None


@given(shape=shapes, kind=st.sampled_from(list(LOSSES)))
def test_pooled_is_the_case_of_one_position(shape, kind):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(**{**shape, 'r': 1})
    actual = function(logits[:, 0], target, weights[0])
    torch.testing.assert_close(actual, reference.pooled_multimix(logits[:, 0], y, weights[0], lambda z: z, loss))


@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('balance', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('b, r, c, n, scale', [(16, 3, 10, 300, 1), (64, 1, 200, 1000, 5), (32, 4, 3, 100, 20)])
@pytest.mark.parametrize('alpha', [PAPERS_ALPHA, None])
def test_error_is_within_that_of_the_naive_computation(kind, balance, dtype, b, r, c, n, scale, alpha):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(b, r, c, n, scale=scale, alpha=alpha)
    logits, weights = logits.to(dtype), weights.float()  # inputs of both computations
    truth_value = literal(logits.double(), y, weights.double(), loss)
    truth = literal_gradient(logits.double(), y, weights.double(), loss, balance)
    naive_value, naive = literal(logits, y, weights, loss), literal_gradient(logits, y, weights, loss, balance)

    value = function(logits, target, weights, balance=balance)
    grad, = gradient(lambda logits: function(logits, target, weights, balance=balance), logits)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    # The naive computation can be exact by chance. The bound then allows a few roundings, for example of the covariance
    # of the rows, whose large elements are sums of n squares.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert (value.double() - truth_value).abs() <= 2 * (naive_value.double() - truth_value).abs() + (
        rounding * logits.double().abs().max())
    last_rounding = torch.finfo(dtype).eps if dtype != torch.float32 else rounding
    assert relative_error(grad, truth) <= 2 * relative_error(naive, truth) + last_rounding


@pytest.mark.parametrize('balance', [False, True])
def test_identity_weights_give_plain_cross_entropy(balance):
    logits, target, _, _ = problem(12, 1, 7, 1)
    logits = logits[:, 0]
    torch.testing.assert_close(
        multimix_cross_entropy(logits, target, torch.eye(12), balance=balance), F.cross_entropy(logits, target))
    grad, = gradient(lambda x: multimix_cross_entropy(x, target, torch.eye(12), balance=balance), logits)
    torch.testing.assert_close(grad, gradient(lambda x: F.cross_entropy(x, target), logits)[0])


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('kind', LOSSES)
def test_smoothing_equals_that_of_timm(kind, smoothing):
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
    criterion = {'ce': LabelSmoothingCrossEntropy, 'bce': BinaryCrossEntropy}[kind](smoothing=smoothing)
    logits, target, _, _ = problem(6, 1, 5, 1)
    actual = LOSSES[kind][0](logits[:, 0], target, torch.eye(6), smoothing=smoothing)
    torch.testing.assert_close(actual, criterion(logits[:, 0], target))
    clean = MultiMixLoss(clean_weight=1.0, smoothing=smoothing, loss_type=kind)
    torch.testing.assert_close(clean(logits[:, 0], target), criterion(logits[:, 0], target))


def test_sum_over_classes_equals_that_of_timm():
    from timm.loss import BinaryCrossEntropy
    logits, target, _, _ = problem(6, 1, 5, 1)
    actual = multimix_binary_cross_entropy(logits[:, 0], target, torch.eye(6), sum_classes=True)
    torch.testing.assert_close(actual, BinaryCrossEntropy(smoothing=0, sum_classes=True)(logits[:, 0], target))


@pytest.mark.parametrize('b, r, c, n, length', [
    (1, 3, 4, 20, None), (8, 3, 4, 1, None), (8, 1, 4, 20, None), (8, 3, 4, 20, 1), (8, 3, 4, 20, 2), (8, 3, 4, 20, 8),
    (8, 3, 1, 20, None), (1, 1, 1, 1, 1),
])
@pytest.mark.parametrize('kind', LOSSES)
def test_special_cases(kind, b, r, c, n, length):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(b, r, c, n, length)
    expected = literal_gradient(logits, y, weights, loss, balance=True)
    actual, = gradient(lambda logits: function(logits, target, weights), logits)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('kind', LOSSES)
def test_huge_logits(kind, dtype):
    function, loss = LOSSES[kind]
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0], [1e4, 1e4, -1e4]], dtype=dtype)
    target = torch.tensor([0, 0, 2])
    weights = sample_weights(50, 3)
    truth = literal(logits.double()[:, None], reference.one_hot(target, 3, torch.float64), weights[None], loss)
    value = function(logits, target, weights)
    grad, = gradient(lambda logits: function(logits, target, weights), logits)
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)


def test_rows_on_one_example_give_plain_cross_entropy_of_those_examples():
    logits, target, _, _ = problem(5, 1, 4, 1)
    chosen = torch.tensor([3, 3, 0, 4])
    weights = F.one_hot(chosen, 5).double()
    expected = F.cross_entropy(logits[chosen, 0], target[chosen])
    torch.testing.assert_close(multimix_cross_entropy(logits[:, 0], target, weights), expected)


def test_manifold_mixup_is_a_special_case():
    z, y = torch.randn(6, 4).double(), torch.rand(6, 3).double()
    classifier = torch.nn.Linear(4, 3).double()
    weights = manifold_mixup_weights(6, generator=torch.Generator().manual_seed(3)).double()
    generator = torch.Generator().manual_seed(3)
    lam = sample_weights(1, 2, alpha=1.0, generator=generator)[0, 0].double()
    partners = torch.randperm(6, generator=generator)
    torch.testing.assert_close(
        multimix_cross_entropy(classifier(z), y, weights),
        reference.manifold_mixup(z, y, lam, partners, classifier),
        rtol=1e-6, atol=1e-7)


def test_kappa_of_the_dirichlet_is_alpha_b_plus_one():
    b, alpha = 32, 1.0
    logits, _, y, _ = problem(b, 1, 5, 1)
    weights = sample_weights(50_000, b, 1, alpha=alpha).double()
    literal_grad, balanced = (literal_gradient(logits, y, weights, balance=flag)[:, 0] for flag in (False, True))
    w = weights[0].mean(0)
    together = torch.outer(w, literal_grad.sum(0))
    kappa = ((balanced - together) / (literal_grad - together)).median()
    assert kappa.item() == pytest.approx(alpha * b + 1, rel=0.02)


def test_balancing_does_not_change_the_value():
    logits, target, _, weights = problem(6, 2, 4, 30)
    torch.testing.assert_close(
        multimix_cross_entropy(logits, target, weights, balance=True),
        multimix_cross_entropy(logits, target, weights, balance=False))


def test_logit_scale_is_a_factor_on_the_logits():
    logits, target, _, weights = problem(6, 2, 4, 30)
    for balance in (True, False):
        def scaled(logits, balance=balance):
            return multimix_cross_entropy(logits, target, weights, logit_scale=2.5, balance=balance)
        def reference_scaled(logits, balance=balance):
            return multimix_cross_entropy(2.5 * logits, target, weights, balance=balance)
        torch.testing.assert_close(scaled(logits), reference_scaled(logits))
        torch.testing.assert_close(gradient(scaled, logits), gradient(reference_scaled, logits))


def test_second_derivatives_are_refused():
    logits, target, _, weights = problem(6, 2, 4, 30)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(multimix_cross_entropy(logits, target, weights), logits, create_graph=True)


def test_autocast_changes_nothing():
    logits, target, _, weights = problem(6, 2, 4, 30)
    logits = logits.bfloat16()
    expected = multimix_cross_entropy(logits, target, weights)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(multimix_cross_entropy(logits, target, weights), expected, rtol=0, atol=0)


def test_float16_gradient_is_scaled_before_it_is_cast():
    logits = torch.randn(256, 49, 10).half().requires_grad_()  # gradients near the smallest of float16
    target, weights = torch.randint(10, (256,)), sample_weights(100, 256, 49)
    (multimix_cross_entropy(logits, target, weights, balance=False) * 2 ** 16).backward()
    expected = literal_gradient(
        logits.detach().double(), reference.one_hot(target, 10, torch.float64), weights.double()) * 2 ** 16
    assert relative_error(logits.grad, expected) < 2e-3


def test_memory_grows_by_the_weights_of_one_position_only():
    b, c, n = 16, 50, 100_000
    def step(r, n):
        logits, target = torch.randn(b, r, c, requires_grad=True), torch.randint(c, (b,))
        weights = sample_weights(n, b, r)
        return lambda: multimix_cross_entropy(logits, target, weights, tile_size=1000).backward()
    one = peak_memory(step(1, n))
    assert one <= peak_memory(step(1, 1000)) + 6 * 4 * n * b
    assert peak_memory(step(4, n)) <= 1.1 * one


GOOD = dict(logits=torch.zeros(4, 3), target=torch.zeros(4).long(), weights=torch.full((5, 4), 0.25))


@pytest.mark.parametrize('change, message', [
    (dict(weights=torch.full((5, 3), 1 / 3)), r'logits \(4, 3\) and weights \(5, 3\)'),
    (dict(weights=torch.full((2, 5, 4), 0.25)), r'logits \(4, 3\) and weights \(2, 5, 4\)'),
    (dict(weights=torch.full((0, 4), 0.25)), r'weights \(0, 4\)'),
    (dict(logits=torch.zeros(4, 2, 3)), r'logits \(4, 2, 3\) and weights \(5, 4\)'),
    (dict(logits=torch.zeros(4)), 'Expected logits'),
    (dict(weights=torch.full((5, 4), 0.5)), 'sum to 1'),
    (dict(weights=torch.tensor([[1.5, -0.5, 0, 0]])), 'non-negative'),
    (dict(weights=torch.full((5, 4), torch.nan)), 'finite'),
    (dict(target=torch.tensor([0, 1, 2, 3])), r'be in \[0, 2\] for 3 classes, got values from 0 to 3'),
    (dict(target=torch.tensor([-1, 1, 2, 0])), 'got values from -1'),
    (dict(target=torch.zeros(4).int()), 'must be int64'),
    (dict(target=torch.zeros(5).long()), r'shape \(b,\) = \(4,\)'),
    (dict(target=torch.zeros(4, 2)), r'floating point with shape \(4, 3\), got torch.float32 with shape \(4, 2\)'),
    (dict(target=-torch.ones(4, 3)), 'must not be negative'),
    (dict(target=torch.full((4, 3), torch.nan)), 'must not be negative'),
    (dict(logits=torch.zeros(0, 3), target=torch.zeros(0).long(), weights=torch.zeros(5, 0)), 'logits'),
    (dict(smoothing=1.0), r'smoothing must be in \[0, 1\), got 1.0'),
])
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        multimix_cross_entropy(**{**GOOD, **change})
