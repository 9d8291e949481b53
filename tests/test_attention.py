import pytest
import torch

from timm_multimix import attention_map

B, R, D, C = 3, 5, 4, 6


def _scores(features, query):
    return torch.stack([z @ u for z, u in zip(features, query, strict=True)])


@pytest.mark.parametrize('norm', ['relu', 'softmax'])
@pytest.mark.parametrize('query', ['gap', 'token', 'cam'])
def test_matches_equation_9(query, norm):
    features, token = torch.randn(B, R, D).double(), torch.randn(B, D).double()
    classifier = torch.randn(C, D).double()
    target = torch.tensor([1, 5, 0])
    u = {'gap': features.mean(1), 'token': token, 'cam': classifier[target]}[query]
    scores = _scores(features, u)
    expected = scores.softmax(1) if norm == 'softmax' else scores.relu() / scores.relu().sum(1, keepdim=True)
    actual = attention_map(features, features @ classifier.T, target, query=query, norm=norm, token=token)
    torch.testing.assert_close(actual, expected)


def test_uniform():
    torch.testing.assert_close(attention_map(torch.randn(B, R, D), query='uniform'), torch.full((B, R), 1 / R))


def test_soft_target_takes_the_expected_logit():
    logits, target = torch.randn(B, R, C), torch.rand(B, C).softmax(1)
    expected = (logits * target[:, None]).sum(-1).softmax(1)
    torch.testing.assert_close(attention_map(None, logits, target, query='cam', norm='softmax'), expected)


def test_rows_that_relu_empties_are_uniform_with_finite_gradient():
    features = torch.ones(B, R, D)
    token = -torch.ones(B, D)
    token[0] = 1
    features.requires_grad_()
    attention = attention_map(features, query='token', token=token)
    torch.testing.assert_close(attention, torch.full((B, R), 1 / R))
    attention.square().sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    features = (300 * torch.randn(B, R, D)).to(dtype)  # scores overflow float16
    attention = attention_map(features)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, attention_map(features.float()))
    with torch.autocast('cpu', dtype=dtype):
        torch.testing.assert_close(attention_map(features.float()), attention)


@pytest.mark.parametrize('arguments, message', [
    (dict(query='mean'), "must be one of uniform, gap, token, cam, got 'mean'"),
    (dict(norm='l2'), "must be one of relu, softmax, got 'l2'"),
    (dict(query='token'), r"'token' requires features \(b, r, d\) and token"),
    (dict(query='cam'), r"'cam' requires logits \(b, r, c\) and target"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_map(torch.randn(B, R, D), **arguments)


@pytest.mark.parametrize('features', [None, torch.randn(B, D)])
def test_missing_or_misshapen_features_are_refused(features):
    with pytest.raises(ValueError, match=r'\(b, r, d\)'):
        attention_map(features)
