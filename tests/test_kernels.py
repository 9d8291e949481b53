"""The Triton kernel: on a GPU, else by Triton's interpreter (conftest.py), against the reference."""
import os
import subprocess
import sys

import pytest
import torch
from loss_helpers import LOSSES, gradient, literal, literal_gradient, problem, relative_error

import timm_multimix.fused
from timm_multimix import MultiMixLoss, MultiMixOutput, backends, multimix_cross_entropy, reference

pytest.importorskip('triton')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = 1e-3 if DEVICE == 'cuda' else 1e-5


def assert_near(actual, expected):
    """Of the same size up to TOLERANCE, as vectors."""
    actual = actual.detach().double().cpu()
    assert (actual - expected).norm() <= TOLERANCE * expected.norm() + 1e-6


def on_device(*tensors, dtype=torch.float32):
    return [tensor.to(DEVICE, dtype if tensor.is_floating_point() else None) for tensor in tensors]


@pytest.fixture(params=[False, True], ids=['plain', 'anchored'])
def anchored(request, monkeypatch):
    monkeypatch.setattr(timm_multimix.fused, 'are_exact', lambda device: not request.param)


# More rows, classes and examples than one tile of the kernel has; sizes that no tile divides; one of each.
SHAPES = [(37, 1, 70, 90), (5, 2, 7, 70), (3, 2, 1, 5), (1, 1, 4, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize('b, r, c, n', SHAPES)
@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.usefixtures('anchored')
def test_value_and_gradient_match_the_reference(kind, soft, b, r, c, n):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(b, r, c, n, soft=soft)
    given, given_target, given_weights = on_device(logits, target, weights)
    def fused(logits):
        return function(logits, given_target, given_weights, backend='triton')
    assert_near(fused(given), literal(logits, y, weights, loss))
    assert_near(gradient(fused, given)[0], literal_gradient(logits, y, weights, loss, balance=True))


def test_programs_share_the_examples_of_a_large_batch(monkeypatch):
    from timm_multimix import kernels
    monkeypatch.setattr(kernels, 'MOST_OUT', 16)
    test_value_and_gradient_match_the_reference('ce', False, 37, 1, 20, 50)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', LOSSES)
def test_reduced_precision_is_that_of_the_input(kind, dtype):
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(20, 1, 30, 80, scale=3)
    given, given_target = on_device(logits, target, dtype=dtype)
    logits = given.double().cpu()
    given_weights, = on_device(weights)
    def fused(logits):
        return function(logits, given_target, given_weights, backend='triton')
    value, grad = fused(given), gradient(fused, given)[0]
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_near(value, literal(logits, y, weights, loss))
    assert relative_error(grad.cpu(), literal_gradient(logits, y, weights, loss, balance=True)) < torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_reads_every_dtype(dtype):
    from timm_multimix import kernels
    m, logits = on_device(torch.rand(2, 70, 9), torch.randn(2, 9, 11), dtype=dtype)
    slope, share = on_device(torch.randn(2, 9, 11), torch.rand(2, 70))
    mixed = (m.double() @ logits.double()).cpu()
    wanted = slope.cpu() + m.double().mT.cpu() @ (share.cpu().unsqueeze(-1) * mixed.softmax(-1))
    value = kernels.evaluate_rows(m, logits, share, slope)
    assert_near(slope, wanted)
    assert_near(value, (share.cpu() * mixed.logsumexp(-1)).sum())


@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
@pytest.mark.usefixtures('anchored')
def test_the_teacher_takes_part(kind, temperature):
    function, _ = LOSSES[kind]
    logits, target, _, weights = problem(6, 2, 70, 70)
    teacher = torch.randn_like(logits)
    def loss(backend, target, weights, teacher):
        return lambda logits: function(
            logits, target, weights, teacher_logits=teacher, backend=backend,
            distill_weight=0.3, distill_temperature=temperature)
    expected = loss('torch', target, weights, teacher)
    given, *others = on_device(logits, target, weights, teacher)
    fused = loss('triton', *others)
    assert_near(fused(given), expected(logits))
    assert_near(gradient(fused, given)[0], gradient(expected, logits)[0])


def test_huge_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0], [1e4, 1e4, -1e4]])
    target, weights = torch.tensor([0, 0, 2]), torch.eye(3).repeat(5, 1)
    given = on_device(logits, target, weights)
    for function, loss in LOSSES.values():
        truth = literal(logits.double()[:, None], reference.one_hot(target, 3, torch.float64), weights[None], loss)
        def fused(logits, function=function):
            return function(logits, *given[1:], backend='triton')
        assert gradient(fused, given[0])[0].isfinite().all()
        assert_near(fused(given[0]), truth)


def test_the_module_draws_its_weights_for_the_kernel():
    dense, attention, target = on_device(torch.randn(6, 3, 5), torch.rand(6, 3), torch.randint(5, (6,)))
    output = MultiMixOutput(dense.mean(1), dense, attention)
    def loss(backend):
        return MultiMixLoss(40, generator=torch.Generator(DEVICE).manual_seed(0), backend=backend)(output, target)
    torch.testing.assert_close(loss('triton'), loss('torch'))


def test_it_is_the_kernel_that_runs(monkeypatch):
    from timm_multimix import kernels
    calls = []
    monkeypatch.setattr(kernels, 'evaluate_rows', lambda *args, **kwargs: calls.append(args) or torch.zeros(()))
    logits, target, _, weights = (tensor.to(DEVICE) for tensor in problem(4, 1, 3, 10))
    for backend, expected in (('triton', 1), ('auto', 0), ('torch', 0)):
        calls.clear()
        multimix_cross_entropy(logits.float(), target, weights.float(), backend=backend)
        assert len(calls) == expected
    weights.requires_grad_()
    multimix_cross_entropy(logits, target, weights.detach(), backend='triton')  # float64
    multimix_cross_entropy(logits.float(), target, weights, backend='triton', attention_grad=True)
    assert not calls


def test_compiled_operations_give_the_same(monkeypatch):
    logits, target, _, weights = problem(6, 2, 5, 30)
    tile = torch.compile(timm_multimix.fused.FusedLoss._evaluate_tile, backend='aot_eager', fullgraph=True)
    monkeypatch.setattr(timm_multimix.fused, '_compiled_tile', lambda: tile)
    def run(backend):
        return gradient(lambda logits: multimix_cross_entropy(logits, target, weights, backend=backend), logits)[0]
    torch.testing.assert_close(run('compile'), run('torch'))


@pytest.mark.parametrize('name', ['cuda', 'Triton', ''])
def test_unknown_backends_are_refused(name):
    logits, target, _, weights = problem(4, 1, 3, 10)
    with pytest.raises(ValueError, match='backend must be one of auto, torch, compile, triton'):
        MultiMixLoss(backend=name)
    with pytest.raises(ValueError, match='backend must be one of'):
        multimix_cross_entropy(logits, target, weights, backend=name)


def test_without_a_gpu_the_kernel_is_refused_and_auto_is_not(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    logits, target = torch.randn(4, 3), torch.randint(3, (4,))
    with pytest.raises(ValueError, match="needs logits on a GPU, got cpu: leave backend='auto'"):
        MultiMixLoss(10, backend='triton')(logits, target)
    assert MultiMixLoss(10, backend='auto')(logits, target).isfinite()


def test_without_triton_the_kernel_is_refused_and_auto_is_not(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match="backend='triton' needs Triton, which is not installed"):
        MultiMixLoss(backend='triton')
    MultiMixLoss(backend='auto')


def test_the_package_does_not_import_triton():
    """A machine without it, or with a broken one, trains all the same."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, timm_multimix as m; "
        'print(m.MultiMixLoss(10)(torch.randn(4, 3), torch.arange(4) % 3).isfinite().item())')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ, check=True)
    assert run.stdout.strip() == 'True'


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from timm_multimix import kernels

for teacher in (False, True):
    options = dict(
        SIGMOID=False, TEACHER=teacher, TEMPERED=teacher, ANCHORED=True, PRECISION='tf32x3', ROWS=kernels.ROWS,
        CLASSES=kernels.CLASSES, EXAMPLES=kernels.EXAMPLES, OUT=64)
    for kernel in (kernels._loss_kernel, kernels._slope_kernel):
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        types = {name: 'i32' if name in ('n', 'b', 'c') else '*fp32' for name in kernel.arg_names}
        types.update(dict.fromkeys(('inverse_temperature', 'distill_factor') & types.keys(), 'fp32'))
        types.update(dict.fromkeys(constants, 'constexpr'))
        binary = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants),
            target=GPUTarget('cuda', 90, 32), options=dict(num_warps=kernels.NUM_WARPS))
        assert 'wgmma' in binary.asm['ptx'] and binary.asm['cubin']
"""


@pytest.mark.slow
def test_compiles_to_machine_code_of_an_h100():
    """Without one: this shows that it compiles, not that it runs."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    subprocess.run([sys.executable, '-c', COMPILE], env=environment, check=True)
