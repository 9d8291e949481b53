"""Padding masks and targets at every position."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import LOSSES, gradient

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    SelfDistillationLoss,
    attend,
    attention_map,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.losses import reference

B, R, C, D, N = 4, 5, 3, 6, 20
LENGTHS = (5, 2, 3, 1)
OPTIONS = {
    'default': {},
    'literal': dict(balance=False),
    'tuples of two': dict(tuple_length=2),
    'single examples': dict(tuple_length=1),
    'shared weights': dict(tuple_length=2, shared_weights=True),
    'uniform': dict(attention='uniform', tuple_length=2),
    'cam relu': dict(attention='cam', tuple_length=2),
    'cam softmax': dict(attention='cam', attention_norm='softmax', attention_grad=True),
    'attention gradient': dict(attention_grad=True, tuple_length=2),
    'bce': dict(loss_type='bce', tuple_length=2),
    'class weights': dict(weight=torch.tensor([1.0, 2.0, 0.5]), tuple_length=2, attention_grad=True),
    'scale': dict(logit_scale=2.0, smoothing=0.1, tile_size=7),
    'all terms': dict(pooled_weight=0.5, clean_weight=0.2),
}


@pytest.fixture
def mask():
    return torch.arange(R) < torch.tensor(LENGTHS).unsqueeze(1)


@pytest.fixture
def target():
    return torch.tensor([0, 2, 1, 1])


@pytest.fixture
def output():
    torch.manual_seed(0)
    return MultiMixOutput(torch.randn(B, C).double(), torch.randn(B, R, C).double(), torch.rand(B, R).double())


def step(output, target, teacher=None, pooled_weight=0.0, mask=None, dense_target=None, **options):
    """Return the loss, and its gradients for dense logits and attention."""
    dense, attention = (
        None if tensor is None else tensor.detach().requires_grad_() for tensor in output[1:])
    criterion = MultiMixLoss(
        N, pooled_weight=pooled_weight, generator=torch.Generator().manual_seed(0), **options)
    loss = criterion(
        MultiMixOutput(output.logits, dense, attention), target, teacher, mask=mask, dense_target=dense_target)
    leaves = [leaf for leaf in (dense, attention) if leaf is not None]
    return loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)


def polluted(output, mask, value):
    """Return the output with this value in dense logits and attention at padding."""
    return output._replace(
        dense_logits=output.dense_logits.masked_fill(~mask.unsqueeze(2), value),
        attention=None if output.attention is None else output.attention.masked_fill(~mask, value))


@pytest.mark.parametrize('options, value', [
    *((options, torch.nan) for options in OPTIONS.values()), ({}, torch.inf), (OPTIONS['cam softmax'], -torch.inf)])
@pytest.mark.parametrize('teacher', [False, True])
def test_result_does_not_depend_on_padding(output, target, mask, options, value, teacher):
    teachers = [polluted(output, ~mask, 0.5)] if teacher else []
    expected = step(polluted(output, mask, 0.0), target, *teachers, mask=mask, **options)
    actual = step(
        polluted(output, mask, value), target, *(polluted(each, mask, value) for each in teachers), mask=mask,
        **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for grad in actual[1:]:
        if grad is not None:
            assert grad.isfinite().all() and not grad[~mask].any()
    assert actual[1][mask].any()


@pytest.mark.parametrize('attended', [False, True])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_mask_without_padding_changes_nothing(output, target, mask, options, attended):
    output = output if attended else output._replace(attention=None)
    masked = step(output, target, mask=torch.ones_like(mask), **options)
    torch.testing.assert_close(masked, step(output, target, **options), rtol=0, atol=0)


@pytest.mark.parametrize('options', [
    options for options in OPTIONS.values() if 'attention' not in options and 'attention_grad' not in options])
def test_padding_is_attention_0(output, target, mask, options):
    output = polluted(output, mask, torch.nan)
    without = output._replace(attention=output.attention.masked_fill(~mask, 0))
    torch.testing.assert_close(
        step(without, target, **options)[:2], step(output, target, mask=mask, **options)[:2], rtol=0, atol=0)


def test_integer_mask_is_cast(output, target, mask):
    torch.testing.assert_close(step(output, target, mask=mask.long()), step(output, target, mask=mask))


@given(
    b=st.integers(1, 6), r=st.integers(1, 4), c=st.integers(2, 5), length=st.none() | st.integers(1, 3),
    kind=st.sampled_from(list(LOSSES)), balance=st.booleans(), dense=st.booleans(), attended=st.booleans(),
    seed=st.integers(0, 99))
def test_padding_and_dense_targets_match_the_reference(b, r, c, length, kind, balance, dense, attended, seed):
    torch.manual_seed(seed)
    logits, mask = torch.randn(b, r, c).double(), torch.rand(b, r) < 0.6
    attention = torch.rand(b, r).double() if attended else None
    target = torch.randint(c, (b, r) if dense else (b,))
    weights = sample_weights(
        N, b, r, tuple_length=None if length is None else min(length, b),
        generator=torch.Generator().manual_seed(0)).double()
    y, uniform = reference.one_hot(target, c, torch.float64), torch.ones(b, r).double()

    def expected(logits, attention):
        return reference.dense_multimix(logits, y, weights, attention, lambda z: z, LOSSES[kind][1], mask=mask)

    def actual(logits, attention):
        criterion = MultiMixLoss(
            N, tuple_length=length, loss_type=kind, balance=balance, pooled_weight=0.0, attention_grad=attended,
            generator=torch.Generator().manual_seed(0))
        targets = dict(target=None, dense_target=target) if dense else dict(target=target)
        return criterion(MultiMixOutput(None if dense else logits[:, 0], logits, attention), mask=mask, **targets)

    value = actual(logits, attention)
    if not mask.any():
        assert value == 0 and not gradient(lambda logits: actual(logits, attention), logits)[0].any()
        return
    given = uniform if attention is None else attention
    torch.testing.assert_close(value, expected(logits, given), rtol=1e-6, atol=1e-9)
    grad, = gradient(lambda logits: actual(logits, attention), logits)
    wanted, = gradient(lambda logits: expected(logits, given), logits)
    if balance:
        m = reference.attention_weights(weights, given, mask)
        wanted = torch.stack([reference.balance_gradient(wanted[:, j], m[j]) for j in range(r)], dim=1)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-9)
    if attended:
        grads = [gradient(lambda a, f=f: f(logits, a), attention)[0] for f in (actual, expected)]
        torch.testing.assert_close(grads[0][mask], grads[1][mask], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('norm', ['relu', 'softmax'])
@pytest.mark.parametrize('query', ['uniform', 'gap', 'token', 'cam'])
def test_attention_of_padded_examples_equals_that_of_single_examples(mask, target, query, norm):
    torch.manual_seed(0)
    features, token, logits = torch.randn(B, R, D).double(), torch.randn(B, D).double(), torch.randn(B, R, C).double()
    options = dict(query=query, norm=norm)

    def padded(tensor):
        return tensor.masked_fill(~mask.unsqueeze(2), torch.nan).requires_grad_()

    features_padded, logits_padded = padded(features), padded(logits)
    attention = attention_map(features_padded, logits_padded, target, token=token, mask=mask, **options)
    for i, length in enumerate(LENGTHS):
        one = slice(i, i + 1)
        alone = attention_map(
            features[one, :length], logits[one, :length], target[one], token=token[one], **options)
        torch.testing.assert_close(attention[one, :length], alone)
    assert not attention[~mask].any()
    if query != 'uniform':
        attention.square().sum().backward()
        grad = (logits_padded if query == 'cam' else features_padded).grad
        assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()
    everywhere = attention_map(features, logits, target, token=token, mask=torch.ones_like(mask), **options)
    assert torch.equal(everywhere, attention_map(features, logits, target, token=token, **options))
    nowhere = attention_map(features, logits, target, token=token, mask=torch.zeros_like(mask), **options)
    assert torch.equal(nowhere, torch.zeros(B, R).double())


def test_relu_without_positive_scores_is_uniform_over_valid_positions(mask):
    attention = attention_map(torch.ones(B, R, D), query='token', token=-torch.ones(B, D), mask=mask)
    torch.testing.assert_close(attention, mask / mask.sum(1, keepdim=True))


def test_attend_with_a_mask_gives_no_weight_to_padding(mask):
    weights, attention = sample_weights(N, B, R, tuple_length=2).double(), torch.rand(B, R).double()
    attention[0] = 0
    attended = attend(weights, attention, mask)
    torch.testing.assert_close(attended, reference.attention_weights(weights, attention, mask))
    is_padding = (weights * mask.T.unsqueeze(1)).sum(-1) == 0
    torch.testing.assert_close(attended.sum(-1), (~is_padding).double())
    assert is_padding.any() and not attended[(~mask.T).unsqueeze(1).expand_as(attended)].any()
    # The losses leave these rows out.
    logits, target = torch.randn(B, R, C).double(), torch.randint(C, (B,))
    y = reference.one_hot(target, C, torch.float64)
    expected = reference.dense_multimix(logits, y, weights, attention, lambda z: z, mask=mask)
    torch.testing.assert_close(multimix_cross_entropy(logits, target, attended), expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('weight', [None, torch.tensor([1.0, 3.0, 0.2]).double()])
@pytest.mark.parametrize('ignore_index', [-100, 2])
def test_dense_targets_of_one_example_give_the_loss_of_pytorch(smoothing, weight, ignore_index):
    torch.manual_seed(0)
    dense = torch.randn(1, 9, C).double()
    dense_target = torch.tensor([[0, 1, 2, ignore_index, 1, 0, 0, ignore_index, 1]])
    options = dict(weight=weight, ignore_index=ignore_index)

    def actual(dense):
        loss = MultiMixLoss(N, smoothing=smoothing, **options)
        return loss(MultiMixOutput(None, dense), dense_target=dense_target)

    def expected(dense):
        return F.cross_entropy(dense.mT, dense_target, label_smoothing=smoothing, **options)

    torch.testing.assert_close(actual(dense), expected(dense), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(actual, dense), gradient(expected, dense), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.int64])
def test_multi_label_dense_targets(dtype):
    torch.manual_seed(0)
    dense, dense_target = torch.randn(1, 9, C).double(), torch.randint(2, (1, 9, C)).to(dtype)
    pos_weight = torch.tensor([1.0, 3.0, 0.2]).double()
    loss = MultiMixLoss(N, loss_type='bce', pos_weight=pos_weight)
    expected = F.binary_cross_entropy_with_logits(dense, dense_target.double(), pos_weight=pos_weight)
    torch.testing.assert_close(loss(MultiMixOutput(None, dense), dense_target=dense_target), expected)


def test_dense_targets_replace_the_target_in_the_dense_term_only(output, target):
    dense_target = torch.randint(C, (B, R))
    loss = MultiMixLoss(N, clean_weight=0.2)

    def terms(*targets, **options):
        torch.manual_seed(0)
        return loss.terms(output, *targets, **options)

    both, image, dense = terms(target, dense_target=dense_target), terms(target), terms(dense_target=dense_target)
    assert list(dense) == ['loss', 'dense'] and dense['loss'] == dense['dense'] == both['dense'] != image['dense']
    assert both['pooled'] == image['pooled'] and both['clean'] == image['clean']
    soft = terms(dense_target=F.one_hot(dense_target, C).double())
    torch.testing.assert_close(soft['dense'], dense['dense'])


def test_ignored_positions_are_padding(output, target, mask):
    dense_target = target.unsqueeze(1).repeat(1, R)
    ignored = step(output, None, dense_target=dense_target.masked_fill(~mask, -100), tuple_length=2)
    torch.testing.assert_close(ignored, step(output, target, mask=mask, tuple_length=2))


def test_distillation_loss_takes_masks_and_dense_targets(output, mask):
    teacher, dense_target = output._replace(dense_logits=torch.randn(B, R, C).double()), torch.randint(C, (B, R))
    criterion = SelfDistillationLoss(MultiMixLoss(N, tuple_length=2), distill_weight=0.5)

    def loss(value):
        torch.manual_seed(0)
        return criterion(
            polluted(output, mask, value), None, polluted(teacher, mask, value), mask=mask, dense_target=dense_target)

    assert loss(torch.nan) == loss(0.0)


@pytest.mark.parametrize('arguments, message', [
    (dict(), 'requires target, dense_target or both'),
    (dict(dense_target=torch.zeros(B, R - 1).long()), r'dense_target must be int64 .* \(b, r\) = \(4, 5\)'),
    (dict(dense_target=torch.zeros(B, R).int()), 'got torch.int32'),
    (dict(dense_target=torch.zeros(B, R, C + 1)), r'floating point with shape \(4, 5, 3\)'),
    (dict(dense_target=torch.full((B, R), C)), r'must be in \[0, 2\] for 3 classes, got values from 3'),
    (dict(dense_target=torch.full((B, R, C), -1.0)), 'must not be negative'),
    (dict(target=torch.zeros(B).long(), mask=torch.ones(B, R)), 'mask must be boolean'),
    (dict(target=torch.zeros(B).long(), mask=torch.ones(B, C).bool()), r'\(b, r\) = \(4, 5\), .* shape \(4, 3\)'),
])
def test_bad_masks_and_targets_are_refused(output, arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiMixLoss(N)(output, **arguments)


def test_masks_and_dense_targets_require_dense_logits(output, target):
    for options in (dict(dense_target=torch.zeros(B, R).long()), dict(mask=torch.ones(B, R).bool())):
        with pytest.raises(ValueError, match='require logits at every position'):
            MultiMixLoss(N)(output.logits, target, **options)
    with pytest.raises(ValueError, match='expects logits'):
        MultiMixLoss(N)(MultiMixOutput(None, output.dense_logits), target)
