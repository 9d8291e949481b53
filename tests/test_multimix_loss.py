import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from loss_helpers import drawn, gradient, peak_memory

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    attend,
    attention_map,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.losses import (
    reference,
)


@pytest.fixture
def output():
    dense = torch.randn(6, 9, 4, dtype=torch.float64)
    return MultiMixOutput(dense.mean(1), dense, torch.rand(6, 9))


def test_drawn_weights_give_the_loss_of_the_same_weights(output):
    target = torch.randint(4, (6,))
    weights = sample_weights(50, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    loss, grads = drawn(output, target, num_mixes=50, pooled_weight=0.0, logit_scale=1.0)
    attended = attend(weights, output.attention.double())
    torch.testing.assert_close(loss, multimix_cross_entropy(output.dense_logits, target, attended))
    expected, = gradient(lambda x: multimix_cross_entropy(x, target, attended), output.dense_logits)
    torch.testing.assert_close(grads[1], expected)


@pytest.mark.parametrize('tile_size', [7, 10_000])
def test_result_does_not_depend_on_the_tile_size(tile_size):
    num_mixes = 1800
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    output = MultiMixOutput(dense[:, 0], dense)
    torch.testing.assert_close(
        drawn(output, target, num_mixes=num_mixes), drawn(output, target, num_mixes=num_mixes, tile_size=tile_size))


def test_tile_size_bounds_memory():
    logits, target = torch.randn(16, 100), torch.randint(100, (16,))
    def step(tile_size):
        return lambda: MultiMixLoss(4096, tile_size=tile_size)(logits, target)
    assert peak_memory(step(64)) < 0.5 * peak_memory(step(4096))


@pytest.mark.parametrize('shared_weights', [False, True])
def test_attention_gradient_equals_finite_differences(shared_weights):
    num_mixes = 1800
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    attention = torch.rand(300, 3, dtype=torch.float64).add_(0.1).requires_grad_()
    def loss(attention):
        criterion = MultiMixLoss(
            num_mixes, pooled_weight=0.0, attention_grad=True, logit_scale=1.0, shared_weights=shared_weights,
            generator=torch.Generator().manual_seed(0))
        return criterion(MultiMixOutput(dense[:, 0], dense, attention), target)
    direction = torch.randn(300, 3, dtype=torch.float64)
    grad, = torch.autograd.grad(loss(attention), attention)
    with torch.no_grad():
        expected = (loss(attention + 1e-6 * direction) - loss(attention - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize('options', [
    dict(), dict(attention_grad=True), dict(loss_type='bce'),
    *(pytest.param(options, marks=pytest.mark.slow) for options in (
        dict(attention='cam'), dict(tuple_length=2), dict(clean_weight=0.5), dict(shared_weights=True))),
])
def test_compiles_without_a_graph_break(output, options):
    logits, dense, attention = (tensor.float() for tensor in output)
    target, loss = torch.randint(4, (6,)), MultiMixLoss(20, **options)

    def step(dense, attention):
        return loss(MultiMixOutput(logits, dense, attention), target)

    def run(step):
        torch.compiler.reset()  # each of these tests compiles the same functions
        torch.manual_seed(1)
        return gradient(step, dense, attention) if options.get('attention_grad') else gradient(
            lambda dense: step(dense, attention), dense)

    # The graph as traced. Code that is not compiled draws other weights on a CPU.
    expected = run(torch.compile(step, backend='eager', fullgraph=True))
    torch.testing.assert_close(run(torch.compile(step, backend='aot_eager', fullgraph=True)), expected)


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
    loss = MultiMixLoss(20, logit_scale=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(logits, target), multimix_cross_entropy(logits, target, weights))


@pytest.mark.parametrize('attended', [False, True])
def test_shared_weights_are_one_draw_for_all_positions(attended):
    num_mixes = 1800
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    attention = torch.rand(300, 3) if attended else None
    weights = sample_weights(num_mixes, 300, generator=torch.Generator().manual_seed(0)).double()
    expected = attend(weights, attention.double()) if attended else weights.expand(3, -1, -1)

    def drawn_once(dense):
        loss = MultiMixLoss(
            num_mixes, pooled_weight=0.0, shared_weights=True, generator=torch.Generator().manual_seed(0))
        return loss(MultiMixOutput(dense[:, 0], dense, attention), target)

    def given(dense):
        return multimix_cross_entropy(dense, target, expected)

    torch.testing.assert_close(drawn_once(dense), given(dense))
    torch.testing.assert_close(gradient(drawn_once, dense), gradient(given, dense))


def test_uniform_attention_equals_no_attention(output):
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
            50, pooled_weight=0.0, attention_grad=attention_grad, logit_scale=1.0,
            generator=torch.Generator().manual_seed(0))
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


def test_loss_is_copied_and_pickled():
    loss = MultiMixLoss(num_mixes=7, alpha=1.0)
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(clone) == repr(loss) and clone.num_mixes == 7


def test_memory_grows_by_the_weights_of_one_position_only():
    target = torch.randint(50, (16,))
    def step(num_mixes, num_positions):
        dense = torch.randn(16, num_positions, 50, requires_grad=True)
        output = MultiMixOutput(dense.mean(1), dense, torch.rand(16, num_positions))
        return lambda: MultiMixLoss(num_mixes)(output, target).backward()
    few, many = peak_memory(step(1000, 4)), peak_memory(step(50_000, 4))
    assert few > 0 and many <= few + 10 * 4 * 50_000 * 16
    assert peak_memory(step(50_000, 16)) <= 1.1 * many


@pytest.mark.parametrize('options, message', [
    (dict(num_mixes=0), 'num_mixes must be at least 1, got 0'),
    (dict(num_mixes=1e3), 'num_mixes must be a whole number, got 1000.0'),
    (dict(tile_size=-1), 'tile_size must be at least 1, got -1'),
    (dict(alpha=0.0), 'alpha must be a positive number'),
    (dict(tuple_length=0), 'tuple_length must be at least 1'),
    (dict(attention='gap'), r'queries to attach\(\)'),
    (dict(attention='cam', attention_norm='l2'), 'attention norm must be one of'),
    (dict(pooled_weight=1.5), 'pooled_weight must be in'),
    (dict(clean_weight=-0.1), 'clean_weight must be in'),
    (dict(logit_scale=0), 'logit_scale must be a positive number, got 0'),
    (dict(logit_scale='auto'), "logit_scale must be a positive number, got 'auto'"),
    (dict(smoothing=1.0), 'smoothing must be in'),
    (dict(loss_type='mse'), "must be one of ce, bce, got 'mse'"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiMixLoss(**options)


def test_bad_attention_and_logits_are_refused(output):
    target, loss = torch.randint(4, (6,)), MultiMixLoss(10)
    with pytest.raises(ValueError, match='attention must not be negative'):
        loss(output._replace(attention=-output.attention), target)
    with pytest.raises(ValueError, match=r'attention must have shape \(b, r\) = \(6, 9\), got \(6, 8\)'):
        loss(output._replace(attention=torch.ones(6, 8)), target)
    with pytest.raises(ValueError, match=r'expects logits .* got logits of shape \(6, 9, 4\).* multimix_cross_entropy'):
        loss(output.dense_logits, target)


@pytest.mark.parametrize('shape', [(6, 4, 9), (5, 9, 4), (6, 9, 3), (6, 9), (6, 0, 4), (6, 3, 3, 4)])
def test_dense_logits_that_do_not_fit_are_refused(output, shape):
    with pytest.raises(ValueError, match=r'dense_logits must have shape \(b, r, c\)'):
        MultiMixLoss(10)(MultiMixOutput(output.logits, torch.randn(shape)), torch.randint(4, (6,)))


@pytest.mark.parametrize('options', [dict(), dict(tuple_length=2, alpha=(0.5, 2.0))])
def test_compiled_loss_accepts_batches_of_other_sizes(options):
    torch.compiler.reset()
    loss = torch.compile(MultiMixLoss(20, **options), backend='aot_eager', fullgraph=True)
    for batch_size in (8, 5, 8, 3):
        logits = torch.randn(batch_size, 4, requires_grad=True)
        loss(logits, torch.randint(4, (batch_size,))).backward()
        assert logits.grad.isfinite().all() and logits.grad.any()


@pytest.mark.parametrize('tuple_length', [4, 7, 100])
def test_tuples_are_not_longer_than_the_batch(output, tuple_length):
    """The last batch of an epoch can be smaller than tuple_length."""
    target = torch.randint(4, (6,))
    limited, _ = drawn(output, target, num_mixes=20, tuple_length=tuple_length)
    expected, _ = drawn(output, target, num_mixes=20, tuple_length=min(tuple_length, 6))
    assert torch.equal(limited, expected)
    assert MultiMixLoss(20, tuple_length=tuple_length)(output.logits[:1], target[:1]).isfinite()


@pytest.mark.parametrize('wrong', [
    lambda output: tuple(output), lambda output: output[:2], lambda output: [output.logits],
    lambda output: {'logits': output.logits}, lambda output: None, lambda output: output.logits.numpy()])
def test_outputs_of_other_types_are_refused(output, wrong):
    target = torch.randint(4, (6,))
    with pytest.raises(TypeError, match=r'expects logits \(b, c\) or the MultiMixOutput .* pass its logits'):
        MultiMixLoss(10)(wrong(output), target)
    if wrong(output) is not None:
        with pytest.raises(TypeError, match='The teacher of MultiMixLoss expects logits'):
            MultiMixLoss(10).terms(output, target, wrong(output))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match='no examples'):
        MultiMixLoss(10)(torch.randn(0, 3), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_integer_multi_hot_targets(output, dtype):
    target = torch.rand(6, 4).round()
    options = dict(num_mixes=20, loss_type='bce', clean_weight=0.3, attention='cam')
    expected, _ = drawn(output, target, **options)
    assert torch.equal(drawn(output, target.to(dtype), **options)[0], expected)
    weights = sample_weights(20, 6).double()
    assert torch.equal(
        multimix_binary_cross_entropy(output.logits, target.to(dtype), weights),
        multimix_binary_cross_entropy(output.logits, target, weights))
    with pytest.raises(ValueError, match='target must be int64 class indices'):
        MultiMixLoss(10)(output, target.to(dtype))


@pytest.mark.parametrize('target', [torch.zeros(6, dtype=torch.int64), torch.ones(6, 1)])
def test_cross_entropy_of_a_single_logit_is_refused(target):
    logits = torch.randn(6, 1)
    for loss in (MultiMixLoss(20), MultiMixLoss(20, clean_weight=1.0)):
        with pytest.raises(ValueError, match='bce'):
            loss(logits, target)
    assert MultiMixLoss(20, loss_type='bce')(logits, target).isfinite()
