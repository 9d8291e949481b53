import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from timm_multimix import attend, manifold_mixup_weights, sample_weights
from timm_multimix.losses.reference import attention_weights
from timm_multimix.losses.weights import _draw_log_gamma, _sample_log_gamma


@given(
    num_mixes=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    num_positions=st.none() | st.integers(1, 5),
    low=st.sampled_from([1e-3, 0.1, 0.5, 1.0, 50.0]),
    width=st.sampled_from([0.0, 1.5]),
    data=st.data(),
)
def test_rows_lie_on_the_simplex(num_mixes, batch_size, num_positions, low, width, data):
    length = data.draw(st.none() | st.integers(1, batch_size))
    weights = sample_weights(num_mixes, batch_size, num_positions, alpha=(low, low + width), tuple_length=length)
    shape = (num_mixes, batch_size) if num_positions is None else (num_positions, num_mixes, batch_size)
    assert weights.shape == shape and weights.dtype == torch.float32
    assert weights.isfinite().all() and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))
    assert ((weights > 0).sum(-1) <= (length or batch_size)).all()


@pytest.mark.parametrize('alpha', [0.2, 1.0, 5.0])
def test_fixed_alpha_has_the_moments_of_the_dirichlet(alpha):
    b = 6
    weights = sample_weights(40_000, b, alpha=alpha).double()
    mean, variance = 1 / b, (b - 1) / (b * b * (alpha * b + 1))
    torch.testing.assert_close(weights.mean(0), torch.full((b,), mean).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((b,), variance).double(), rtol=0.06, atol=0)
    covariance = torch.cov(weights.T)[0, 1]
    assert covariance.item() == pytest.approx(-variance / (b - 1), rel=0.1)


@pytest.mark.parametrize('alpha', [0.05, 0.5, 2.0, 100.0])
def test_weights_follow_the_beta_distribution(alpha):
    b = 5
    marginal = sample_weights(20_000, b, alpha=alpha)[:, 0].numpy()
    assert stats.kstest(marginal, stats.beta(alpha, (b - 1) * alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize('length', [6, 3])
def test_concentrations_sum_to_one_by_default(length):
    weights = sample_weights(20_000, 6, tuple_length=length)
    drawn = weights[weights[:, 0] > 0, 0].numpy()  # of mixes that have the first example
    assert stats.kstest(drawn, stats.beta(1 / length, 1 - 1 / length).cdf).pvalue > 1e-3


@pytest.mark.parametrize('a', [0.1, 0.5, 1.0, 2.0, 30.0])
@pytest.mark.parametrize('sample', [_sample_log_gamma, _draw_log_gamma])
def test_gamma_variables_follow_their_distribution(sample, a):
    drawn = sample(torch.full((50_000, 1), a), torch.Size((50_000, 4)), None).exp()
    assert stats.kstest(drawn.flatten().numpy(), stats.gamma(a).cdf).pvalue > 1e-3


def test_rejected_variables_are_drawn_with_the_concentration_of_their_row():
    a = torch.tensor([0.1, 30.0]).repeat(50_000).unsqueeze(1)
    drawn = _sample_log_gamma(a, torch.Size((100_000, 4)), None)[::2].exp()
    assert stats.kstest(drawn.flatten().numpy(), stats.gamma(0.1).cdf).pvalue > 1e-3


def test_compiled_code_draws_without_a_graph_break():
    draw = torch.compile(lambda: sample_weights(20, 4, 2), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(draw().sum(-1), torch.ones(2, 20))


def test_each_row_draws_its_own_concentration():
    low, high, b = 0.5, 2.0, 8
    weights = sample_weights(40_000, b, alpha=(low, high))
    # E[sum of squares] = (a + 1) / (a b + 1), averaged over a ~ U[low, high].
    expected = 1 / b + (1 - 1 / b) / (b * (high - low)) * math.log((high * b + 1) / (low * b + 1))
    assert weights.square().sum(-1).mean().item() == pytest.approx(expected, rel=0.02)
    assert sample_weights(100, 50, alpha=(1e-3, 1e3)).amax(-1).min() < 0.1


def test_small_concentrations_choose_one_example_fairly():
    weights = sample_weights(4000, 4, alpha=1e-3)
    assert (weights.amax(-1) > 0.999).float().mean() > 0.98
    counts = weights.argmax(-1).bincount(minlength=4)
    assert (counts > 850).all()


@pytest.mark.parametrize('length', [1, 2, 5])
def test_tuples_are_distinct_examples_chosen_evenly(length):
    weights = sample_weights(20_000, 6, tuple_length=length)
    assert ((weights > 0).sum(-1) == length).all()
    torch.testing.assert_close((weights > 0).float().mean(0), torch.full((6,), length / 6), atol=0.02, rtol=0)


def test_positions_draw_their_own_rows():
    weights = sample_weights(10, 4, 3)
    assert not torch.equal(weights[0], weights[1])


def test_generator_reproduces_the_draw():
    def draw(seed):
        return sample_weights(10, 5, 2, tuple_length=3, generator=torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(state, torch.get_rng_state())  # the default generator does not change


def test_manifold_mixup_weights_pair_every_example_with_one_lambda():
    weights = manifold_mixup_weights(6, alpha=1.0)
    lam = weights.diagonal().min()
    assert weights.shape == (6, 6)
    torch.testing.assert_close(weights.sum(0), torch.ones(6))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    values = torch.cat([weights[weights > 0], 1 - weights[weights > 0]])
    assert all(min(abs(v - lam), abs(v - 1 + lam), v, abs(1 - v)) < 1e-6 for v in values)


@given(n=st.integers(1, 6), b=st.integers(1, 5), r=st.integers(1, 4), shared=st.booleans())
def test_attend_matches_the_reference(n, b, r, shared):
    weights = sample_weights(n, b, None if shared else r).double()
    attention = torch.rand(b, r).double()
    attention[:, 0] = 0  # no attention at the first position
    expected = attention_weights(weights.expand(r, n, b), attention)
    torch.testing.assert_close(attend(weights, attention), expected)
    torch.testing.assert_close(attend(weights, attention).sum(-1), torch.ones(r, n).double())


def test_attend_gradient_is_finite_where_attention_vanishes():
    attention = torch.rand(3, 2)
    attention[:, 0] = 0
    attention.requires_grad_()
    attend(sample_weights(4, 3), attention).square().sum().backward()
    assert attention.grad.isfinite().all()


@pytest.mark.parametrize('arguments, message', [
    (dict(num_mixes=0, batch_size=4), 'num_mixes must be at least 1, got 0'),
    (dict(num_mixes=4, batch_size=0), 'batch_size must be at least 1'),
    (dict(num_mixes=4, batch_size=4, num_positions=0), 'num_positions must be at least 1'),
    (dict(num_mixes=4, batch_size=4, alpha=0), 'alpha must be a positive number'),
    (dict(num_mixes=4, batch_size=4, alpha=(2.0, 0.5)), 'alpha must be a positive number'),
    (dict(num_mixes=4, batch_size=4, alpha=(-1.0, 0.5)), 'alpha must be a positive number'),
    (dict(num_mixes=4, batch_size=4, alpha=math.nan), 'alpha must be a positive number'),
    (dict(num_mixes=4, batch_size=4, alpha='1'), 'alpha must be a positive number'),
    (dict(num_mixes=4, batch_size=4, tuple_length=5), 'between 1 and the batch size 4, got 5'),
    (dict(num_mixes=4, batch_size=4, tuple_length=0), 'between 1 and the batch size 4, got 0'),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_weights(**arguments)


@pytest.mark.parametrize('weights, attention', [((5, 3), (4, 2)), ((3, 5, 4), (4, 2)), ((5,), (5, 2)), ((5, 4), (4,))])
def test_attend_refuses_shapes_that_do_not_fit(weights, attention):
    with pytest.raises(ValueError, match='attend expects weights'):
        attend(torch.ones(weights), torch.ones(attention))
