import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import timm_multimix
from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    attend,
    attention_map,
    manifold_mixup_weights,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    reference,
    sample_weights,
)

LOSSES = {
    'ce': (multimix_cross_entropy, reference.cross_entropy),
    'bce': (multimix_binary_cross_entropy, reference.binary_cross_entropy),
}


def literal(logits, y, weights, loss=reference.cross_entropy):
    """The equations on logits (b, r, c), attended weights (r, n, b), rows y (b, c): a free classifier, d = c."""
    uniform = torch.ones(logits.shape[:2], dtype=logits.dtype)
    return reference.dense_multimix(logits, y.to(logits.dtype), weights.to(logits.dtype), uniform, lambda z: z, loss)


def literal_gradient(logits, y, weights, loss=reference.cross_entropy, balance=False):
    """Gradient of the literal loss with respect to logits (b, r, c), balanced by the formula if asked."""
    logits = logits.detach().requires_grad_()
    grad, = torch.autograd.grad(literal(logits, y, weights, loss), logits)
    if balance:
        grad = torch.stack(
            [reference.balance_gradient(grad[:, j], m.to(grad.dtype)) for j, m in enumerate(weights)], dim=1)
    return grad


def gradient(loss, *inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def problem(b, r, c, n, length=None, soft=False, scale=1.0):
    """Logits (b, r, c), target, rows y (b, c) and attended weights (r, n, b), in float64."""
    logits = scale * torch.randn(b, r, c, dtype=torch.float64)
    target = torch.rand(b, c, dtype=torch.float64) if soft else torch.randint(c, (b,))
    weights = sample_weights(n, b, r, tuple_length=length).double()
    weights = attend(weights / weights.sum(-1, keepdim=True), torch.rand(b, r, dtype=torch.float64) + 0.01)
    return logits, target, reference.one_hot(target, c, torch.float64), weights


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
def test_error_is_within_that_of_the_naive_computation(kind, balance, dtype, b, r, c, n, scale):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(b, r, c, n, scale=scale)
    logits, weights = logits.to(dtype), weights.float()  # what both computations are given
    truth_value = literal(logits.double(), y, weights.double(), loss)
    truth = literal_gradient(logits.double(), y, weights.double(), loss, balance)
    naive_value, naive = literal(logits, y, weights, loss), literal_gradient(logits, y, weights, loss, balance)

    value = function(logits, target, weights, balance=balance)
    grad, = gradient(lambda logits: function(logits, target, weights, balance=balance), logits)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    # Where the naive computation is exact by luck, a few roundings of our own remain.
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
def test_smoothing_is_that_of_timm(kind, smoothing):
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
    criterion = {'ce': LabelSmoothingCrossEntropy, 'bce': BinaryCrossEntropy}[kind](smoothing=smoothing)
    logits, target, _, _ = problem(6, 1, 5, 1)
    actual = LOSSES[kind][0](logits[:, 0], target, torch.eye(6), smoothing=smoothing)
    torch.testing.assert_close(actual, criterion(logits[:, 0], target))
    clean = MultiMixLoss(clean_weight=1.0, smoothing=smoothing, loss_type=kind)
    torch.testing.assert_close(clean(logits[:, 0], target), criterion(logits[:, 0], target))


def test_sum_over_classes_is_that_of_timm():
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


def test_balancing_leaves_the_value_alone():
    logits, target, _, weights = problem(6, 2, 4, 30)
    torch.testing.assert_close(
        multimix_cross_entropy(logits, target, weights, balance=True),
        multimix_cross_entropy(logits, target, weights, balance=False))


def test_logit_scale_is_a_factor_on_the_logits():
    logits, target, _, weights = problem(6, 2, 4, 30)
    def scaled(logits):
        return multimix_cross_entropy(logits, target, weights, logit_scale=2.5)
    def reference_scaled(logits):
        return multimix_cross_entropy(2.5 * logits, target, weights)
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


# MultiMixLoss


def drawn(output, target, **options):
    """Loss and gradient of MultiMixLoss with seeded draws."""
    generator = torch.Generator().manual_seed(0)
    logits = [tensor.detach().requires_grad_() for tensor in output[:2] if tensor is not None]
    loss = MultiMixLoss(generator=generator, **options)(MultiMixOutput(*logits, *output[len(logits):]), target)
    return loss, torch.autograd.grad(loss, logits, allow_unused=True)


@pytest.fixture
def output():
    dense = torch.randn(6, 9, 4, dtype=torch.float64)
    return MultiMixOutput(dense.mean(1), dense, torch.rand(6, 9))


def test_drawn_weights_give_the_loss_of_the_same_weights(output):
    target = torch.randint(4, (6,))
    weights = sample_weights(50, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    loss, grads = drawn(output, target, num_mixes=50, pooled_weight=0.0)
    attended = attend(weights, output.attention.double())
    torch.testing.assert_close(loss, multimix_cross_entropy(output.dense_logits, target, attended))
    expected, = gradient(lambda x: multimix_cross_entropy(x, target, attended), output.dense_logits)
    torch.testing.assert_close(grads[1], expected)


@pytest.mark.parametrize('tile_size', [1, 7, 64, 10_000])
def test_result_does_not_depend_on_the_tile_size(tile_size):
    # Large enough that weights are drawn in several blocks, of positions and of rows.
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    output = MultiMixOutput(dense[:, 0], dense)
    torch.testing.assert_close(
        drawn(output, target, num_mixes=1500), drawn(output, target, num_mixes=1500, tile_size=tile_size))


def test_tile_size_bounds_memory():
    logits, target = torch.randn(16, 100), torch.randint(100, (16,))
    def step(tile_size):
        return lambda: MultiMixLoss(4096, tile_size=tile_size)(logits, target)
    assert peak_memory(step(64)) < 0.5 * peak_memory(step(4096))


def test_attention_gradient_is_that_of_all_blocks():
    # Large enough that weights are drawn in several blocks, of positions and of rows.
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    attention = torch.rand(300, 3, dtype=torch.float64).add_(0.1).requires_grad_()
    def loss(attention):
        criterion = MultiMixLoss(
            1500, pooled_weight=0.0, attention_grad=True, generator=torch.Generator().manual_seed(0))
        return criterion(MultiMixOutput(dense[:, 0], dense, attention), target)
    direction = torch.randn(300, 3, dtype=torch.float64)
    grad, = torch.autograd.grad(loss(attention), attention)
    with torch.no_grad():
        expected = (loss(attention + 1e-6 * direction) - loss(attention - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize('options', [
    dict(), dict(attention='cam'), dict(attention_grad=True), dict(tuple_length=2), dict(clean_weight=0.5),
    dict(loss_type='bce'),
])
def test_compiles_without_a_graph_break(output, options, monkeypatch):
    def sample(concentration, size, generator):
        return torch._standard_gamma(concentration.expand(size)).log_()
    monkeypatch.setattr(timm_multimix.weights, '_sample_log_gamma', sample)  # compiled code does not reject and retry
    logits, dense, attention = (tensor.float() for tensor in output)
    target, loss = torch.randint(4, (6,)), MultiMixLoss(20, **options)

    def step(dense, attention):
        return loss(MultiMixOutput(logits, dense, attention), target)

    def run(step):
        torch.manual_seed(1)
        return gradient(step, dense, attention) if options.get('attention_grad') else gradient(
            lambda dense: step(dense, attention), dense)

    compiled = torch.compile(step, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(run(compiled), run(step))


def test_attention_gradient_is_finite_where_attention_vanishes(output):
    attention = torch.zeros(6, 9, dtype=torch.float64, requires_grad=True)
    loss = MultiMixLoss(20, attention_grad=True)
    loss(output._replace(attention=attention), torch.randint(4, (6,))).backward()
    assert attention.grad.isfinite().all()


def test_terms_are_combined_by_their_weights(output):
    target = torch.randint(4, (6,))
    loss = MultiMixLoss(num_mixes=20, pooled_weight=0.25, clean_weight=0.2)
    terms = loss.terms(output, target)
    assert list(terms) == ['loss', 'dense', 'pooled', 'clean']
    expected = 0.8 * (0.75 * terms['dense'] + 0.25 * terms['pooled']) + 0.2 * terms['clean']
    torch.testing.assert_close(terms['loss'], expected)
    torch.testing.assert_close(terms['clean'], F.cross_entropy(output.logits, target))
    assert list(loss.terms(output.logits, target)) == ['loss', 'pooled', 'clean']
    assert list(MultiMixLoss(pooled_weight=0.0).terms(output, target)) == ['loss', 'dense']
    assert list(MultiMixLoss(clean_weight=1.0).terms(output, target)) == ['loss', 'clean']


def test_plain_logits_give_pooled_multimix():
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    weights = sample_weights(20, 6, generator=torch.Generator().manual_seed(0)).double()
    loss = MultiMixLoss(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(logits, target), multimix_cross_entropy(logits, target, weights))


def test_uniform_attention_is_no_attention(output):
    target = torch.randint(4, (6,))
    uniform = attention_map(output.dense_logits, query='uniform')
    expected = drawn(output._replace(attention=uniform), target)
    torch.testing.assert_close(drawn(output._replace(attention=None), target), expected)
    torch.testing.assert_close(drawn(output, target, attention='uniform'), expected)


@pytest.mark.parametrize('norm', ['relu', 'softmax'])
def test_cam_attention_is_computed_from_the_target(output, norm):
    target = torch.randint(4, (6,))
    cam = attention_map(None, output.dense_logits, target, query='cam', norm=norm)
    torch.testing.assert_close(
        drawn(output, target, attention='cam', attention_norm=norm), drawn(output._replace(attention=cam), target))


def test_attention_gradient(output):
    target = torch.randint(4, (6,))
    weights = sample_weights(50, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    attention = output.attention.double().requires_grad_()
    def run(attention_grad):
        loss = MultiMixLoss(
            50, pooled_weight=0.0, attention_grad=attention_grad, generator=torch.Generator().manual_seed(0))
        return loss(output._replace(attention=attention), target)
    assert not run(False).requires_grad
    y = reference.one_hot(target, 4, torch.float64)
    expected = reference.dense_multimix(output.dense_logits, y, weights, attention, lambda z: z)
    torch.testing.assert_close(run(True), expected)
    torch.testing.assert_close(
        torch.autograd.grad(run(True), attention), torch.autograd.grad(expected, attention))


def test_multi_label_targets(output):
    target = torch.randint(2, (6, 4)).double()
    weights = sample_weights(20, 6, generator=torch.Generator().manual_seed(0)).double()
    loss = MultiMixLoss(20, loss_type='bce', generator=torch.Generator().manual_seed(0))
    expected = multimix_binary_cross_entropy(output.logits, target, weights)
    torch.testing.assert_close(loss(output.logits, target), expected)


def test_draws_differ_from_step_to_step_and_are_reproduced_by_the_seed(output):
    target, loss = torch.randint(4, (6,)), MultiMixLoss(20)
    torch.manual_seed(1)
    first, second = loss(output, target), loss(output, target)
    torch.manual_seed(1)
    assert first != second and loss(output, target) == first


def test_is_copied_and_pickled():
    loss = MultiMixLoss(num_mixes=7, alpha=1.0)
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(clone) == repr(loss) and clone.num_mixes == 7


def peak_memory(function):
    """Peak of memory that PyTorch's CPU allocator holds while function runs, above what it held before, in bytes."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    changes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(torch.tensor(changes).cumsum(0))


def test_memory_does_not_grow_with_the_number_of_mixes():
    dense, target = torch.randn(16, 8, 50, requires_grad=True), torch.randint(50, (16,))
    output = MultiMixOutput(dense.mean(1), dense, torch.rand(16, 8))
    def step(num_mixes):
        return lambda: MultiMixLoss(num_mixes)(output, target).backward()
    step(10)()
    few, many = peak_memory(step(50_000)), peak_memory(step(400_000))
    assert few > 0 and many <= 1.02 * few
    # The probe sees what does grow.
    assert peak_memory(lambda: sample_weights(400_000, 16)) > 7 * peak_memory(lambda: sample_weights(50_000, 16))


def test_memory_of_given_weights_does_not_grow_with_their_number():
    logits, target = torch.randn(16, 50, requires_grad=True), torch.randint(50, (16,))
    few, many = sample_weights(50_000, 16), sample_weights(400_000, 16)
    def step(weights):
        return lambda: multimix_cross_entropy(logits, target, weights, tile_size=1000).backward()
    assert peak_memory(step(many)) <= 1.02 * peak_memory(step(few))


# Bad input


GOOD = dict(logits=torch.zeros(4, 3), target=torch.zeros(4).long(), weights=torch.full((5, 4), 0.25))


@pytest.mark.parametrize('change, message', [
    (dict(weights=torch.full((5, 3), 1 / 3)), r'logits \(4, 3\) and weights \(5, 3\)'),
    (dict(weights=torch.full((2, 5, 4), 0.25)), r'logits \(4, 3\) and weights \(2, 5, 4\)'),
    (dict(weights=torch.full((0, 4), 0.25)), r'weights \(0, 4\)'),
    (dict(logits=torch.zeros(4, 2, 3)), r'logits \(4, 2, 3\) and weights \(5, 4\)'),
    (dict(logits=torch.zeros(4)), 'Takes logits'),
    (dict(weights=torch.full((5, 4), 0.5)), 'sum to 1'),
    (dict(weights=torch.tensor([[1.5, -0.5, 0, 0]])), 'non-negative'),
    (dict(weights=torch.full((5, 4), torch.nan)), 'finite'),
    (dict(target=torch.tensor([0, 1, 2, 3])), r'lie in \[0, 2\] for 3 classes, got values from 0 to 3'),
    (dict(target=torch.tensor([-1, 1, 2, 0])), 'got values from -1'),
    (dict(target=torch.zeros(4).int()), 'must be int64'),
    (dict(target=torch.zeros(5).long()), r'shape \(b,\) = \(4,\)'),
    (dict(target=torch.zeros(4, 2)), r'\(b, c\) = \(4, 3\), got \(4, 2\)'),
    (dict(target=-torch.ones(4, 3)), 'must not be negative'),
    (dict(target=torch.full((4, 3), torch.nan)), 'must not be negative'),
    (dict(logits=torch.zeros(0, 3), target=torch.zeros(0).long(), weights=torch.zeros(5, 0)), 'logits'),
    (dict(smoothing=1.0), r'smoothing must lie in \[0, 1\), got 1.0'),
])
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        multimix_cross_entropy(**{**GOOD, **change})


@pytest.mark.parametrize('options, message', [
    (dict(num_mixes=0), 'num_mixes must be at least 1, got 0'),
    (dict(alpha=0.0), 'alpha must be a positive number'),
    (dict(tuple_length=0), 'tuple_length must be at least 1'),
    (dict(attention='gap'), r'pass them to attach\(\)'),
    (dict(attention='cam', attention_norm='l2'), 'attention norm must be one of'),
    (dict(pooled_weight=1.5), 'pooled_weight is a share'),
    (dict(clean_weight=-0.1), 'clean_weight is a share'),
    (dict(logit_scale=0), 'logit_scale must be positive'),
    (dict(smoothing=1.0), 'smoothing must lie'),
    (dict(loss_type='mse'), "must be one of ce, bce, got 'mse'"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiMixLoss(**options)


def test_bad_attention_and_logits_are_refused(output):
    target, loss = torch.randint(4, (6,)), MultiMixLoss(10)
    with pytest.raises(ValueError, match='attention must be non-negative and finite'):
        loss(output._replace(attention=torch.full((6, 9), torch.nan)), target)
    with pytest.raises(ValueError, match=r'attention must have shape \(b, r\) = \(6, 9\), got \(6, 8\)'):
        loss(output._replace(attention=torch.ones(6, 8)), target)
    with pytest.raises(ValueError, match='takes logits'):
        loss(output.dense_logits, target)
    with pytest.raises(ValueError, match='between 1 and the batch size 6, got 7'):
        MultiMixLoss(10, tuple_length=7)(output, target)
