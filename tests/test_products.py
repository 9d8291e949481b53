"""Products give what PyTorch's give, whoever forms them."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_multimix import products


@pytest.mark.parametrize('positions', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_product(positions, dtype):
    a, b = torch.randn(positions, 6, 5, dtype=dtype), torch.randn(positions, 5, 7, dtype=dtype)
    expected = torch.einsum('pik,pkj->pij', a.double(), b.double())
    for left, right in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
        torch.testing.assert_close(products.product(left, right).double(), expected, rtol=1e-5, atol=1e-5)


def test_matrices_with_gaps_are_packed():
    """oneDNN is a hundred times slower on them."""
    matrix = torch.randn(4, 3, 5)
    for packed in (matrix[0], matrix[0].mT):
        assert products._packed(packed).data_ptr() == packed.data_ptr()
    for gapped in (matrix[:, 0], matrix[..., 0], matrix[:, 0].mT):
        assert products._packed(gapped).is_contiguous()


@pytest.fixture(params=['oneDNN', 'PyTorch'])
def library(request, monkeypatch):
    if request.param == 'PyTorch':
        monkeypatch.setattr(products, 'HAS_ONEDNN', False)
    elif not products.HAS_ONEDNN:
        pytest.skip('this PyTorch has no oneDNN')


@pytest.mark.parametrize('shape', [(3, 4, 6), (1, 1, 6), (5, 6)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.usefixtures('library')
def test_linear_and_its_gradients(shape, bias):
    layer = nn.Linear(6, 5, bias)
    inputs = [torch.randn(shape).requires_grad_(), *layer.parameters()]
    def grads(function):
        return torch.autograd.grad(function(inputs[0]).square().sum(), inputs)
    torch.testing.assert_close(products.linear(inputs[0], layer), layer(inputs[0]))
    torch.testing.assert_close(grads(lambda x: products.linear(x, layer)), grads(layer))


@pytest.mark.usefixtures('library')
def test_linear_takes_positions_as_they_lie():
    layer, maps = nn.Linear(6, 5), torch.randn(3, 6, 2, 2)
    for given in (maps, maps.to(memory_format=torch.channels_last)):
        positions = given.flatten(2).mT
        torch.testing.assert_close(products.linear(positions, layer), F.linear(positions, layer.weight, layer.bias))


@pytest.mark.usefixtures('library')
def test_linear_is_differentiated_twice():
    layer, x = nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3).requires_grad_()
    def second(function):
        first, = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(second(lambda x: products.linear(x, layer)), second(layer))


def test_linear_follows_autocast_and_dtypes():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    with torch.autocast('cpu', torch.bfloat16):
        assert products.linear(x, layer).dtype == torch.bfloat16
    assert products.linear(x.double(), layer.double()).dtype == torch.float64


def test_what_is_not_differentiated_is_not_computed(monkeypatch):
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(4, 6).requires_grad_()
    out = products.linear(x, layer)
    calls = []
    original = products._matmul
    monkeypatch.setattr(products, '_matmul', lambda *args: calls.append(args) or original(*args))
    out.sum().backward()
    assert len(calls) == products.HAS_ONEDNN
