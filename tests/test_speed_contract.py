"""A step does not wait for the device, and its memory and precision have limits."""
import pytest
import timm
import torch
from loss_helpers import PAPERS_ALPHA, literal_gradient, problem, relative_error
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    SelfDistillationLoss,
    attach,
    multimix_cross_entropy,
)
from timm_multimix.losses import reference

# Operations for whose results the host waits.
SYNCHRONIZES = {'_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'unique', 'equal', 'is_nonzero', 'allclose'}


class Recorder(TorchDispatchMode):
    """Record the names of operations, and the number of elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


OPTIONS = [
    dict(), dict(attention='cam'), dict(attention_grad=True), dict(tuple_length=2), dict(clean_weight=0.5),
    dict(loss_type='bce'), dict(smoothing=0.1),
]


@pytest.fixture
def step_on_a_gpu():
    """Run an attached model and a loss on fake CUDA tensors. An operation that needs a value on the host raises."""
    try:
        with FakeTensorMode():
            torch._standard_gamma(torch.ones(1, device='cuda'))
    except (NotImplementedError, RuntimeError):
        pytest.skip('this version of PyTorch needs a GPU for fake CUDA tensors')
    model = timm.create_model('test_resnet', num_classes=7)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    trainable = {name for name, _ in model.named_parameters()}

    def step(loss, mode='dense'):
        with attach(model, mode), FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
            state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
            state = {name: tensor.requires_grad_(name in trainable) for name, tensor in state.items()}
            images, target = torch.randn(4, 3, 64, 64), torch.randint(7, (4,))
            return loss(torch.func.functional_call(model, state, (images,)), target)
    return step


# The gradient through the attention is computed in the forward pass, and fake tensors have no CUDA autograd.
@pytest.mark.parametrize('options', [options for options in OPTIONS if 'attention_grad' not in options])
@pytest.mark.parametrize('mode', ['dense', 'pooled'])
def test_a_step_does_not_wait_for_the_device(mode, options, step_on_a_gpu):
    value = step_on_a_gpu(MultiMixLoss(30, **options), mode)
    assert value.device.type == 'cuda' and value.requires_grad and value.shape == ()


def test_a_step_with_a_teacher_does_not_wait_for_the_device(step_on_a_gpu):
    loss = SelfDistillationLoss(MultiMixLoss(30))
    assert step_on_a_gpu(lambda output, target: loss(output, target, output)).device.type == 'cuda'


@pytest.mark.parametrize('kind', ['ce', 'bce'])
@pytest.mark.parametrize('attention', [None, 'cam'])
def test_masks_dense_targets_and_class_weights_do_not_wait_for_the_device(kind, attention, step_on_a_gpu):
    def loss(output, target):
        weights = dict(weight=torch.ones(7), **(dict(pos_weight=torch.ones(7)) if kind == 'bce' else {}))
        criterion = MultiMixLoss(30, loss_type=kind, attention=attention, **weights)
        mask = torch.ones(output.dense_logits.shape[:2], dtype=torch.bool)
        return criterion(output, target, mask=mask, dense_target=mask.long())
    assert step_on_a_gpu(loss).device.type == 'cuda'


def test_waiting_for_the_device_is_detected(step_on_a_gpu):
    with pytest.raises(DataDependentOutputException):
        step_on_a_gpu(lambda output, target: output.logits.sum().item())


@pytest.mark.parametrize('options', OPTIONS)
def test_the_backward_pass_does_not_wait_for_the_device(options):
    model = timm.create_model('test_resnet', num_classes=7)
    attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=True)
    loss = MultiMixLoss(30, **options)(model(torch.randn(4, 3, 64, 64)), torch.randint(7, (4,)))
    with Recorder() as recorder:
        loss.backward()
        optimizer.step()
    assert 'convolution_backward' in recorder.names, 'nothing was recorded'
    assert not recorder.names & SYNCHRONIZES


@pytest.mark.parametrize('teacher', [False, True])
@pytest.mark.parametrize('options', [dict(), dict(attention_grad=True), dict(loss_type='bce')])
def test_no_tensor_is_larger_than_the_weights_of_a_position(options, teacher):
    dense, target = torch.randn(8, 3, 100), torch.randint(100, (8,))
    output = MultiMixOutput(dense.mean(1), dense.clone().requires_grad_(), torch.rand(8, 3).requires_grad_())
    with_teacher = dict(teacher=MultiMixOutput(dense.mean(1), dense)) if teacher else {}
    def largest(n):
        with Recorder() as recorder:
            MultiMixLoss(n, **options).terms(output, target, **with_teacher)['loss'].backward()
        return recorder.largest
    num_mixes = 100_000
    assert largest(num_mixes) <= num_mixes * (8 + 1), 'more than the weights of one position'


# Products that round their operands


def rounded(bits, truncate=False):
    """Return a product whose operands have fractions of this many bits: 10 for TF32, 7 for bfloat16."""
    def keep(tensor):
        bits_lost = 23 - bits
        integer = tensor.float().contiguous().view(torch.int32)
        if not truncate:  # to nearest, ties to even
            integer = integer + (2 ** (bits_lost - 1) - 1) + (integer >> bits_lost & 1)
        return (integer >> bits_lost << bits_lost).view(torch.float32)
    return lambda a, b: torch.matmul(keep(a).double(), keep(b).double()).float()


@pytest.fixture
def fast_products():
    """Replace all matrix products of the loss."""
    def use(product):
        class Rounds(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.mv):
                    return product(*args)
                assert func.overloadpacket not in (torch.ops.aten.baddbmm, torch.ops.aten.addmm)
                return func(*args, **(kwargs or {}))
        return Rounds()
    return use


PROBLEMS = [
    (32, 1, 1000, 1000, 1), (128, 1, 100, 1000, 3), (128, 2, 10, 1000, 1), (256, 1, 10, 1000, 10), (256, 1, 2, 1000, 1)]


@pytest.mark.parametrize('bits, truncate, limit', [(10, False, 1e-3), (10, True, 2e-3), (7, False, 2e-2)])
@pytest.mark.parametrize('b, r, c, n, scale', PROBLEMS)
@pytest.mark.parametrize('alpha', [PAPERS_ALPHA, None])
def test_balanced_gradient_is_precise_with_products_that_round(
        b, r, c, n, scale, alpha, bits, truncate, limit, fast_products):
    logits, target, y, weights = problem(b, r, c, n, scale=scale, alpha=alpha)
    logits, weights = logits.float(), weights.float()
    truth = literal_gradient(logits.double(), y, weights.double(), balance=True)
    given = logits.clone().requires_grad_()
    with fast_products(rounded(bits, truncate)):
        multimix_cross_entropy(given, target, weights).backward()
    assert relative_error(given.grad, truth) < limit


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('b, r, c, n, scale', PROBLEMS)
@pytest.mark.parametrize('alpha', [PAPERS_ALPHA, None])
def test_balanced_gradient_is_precise(b, r, c, n, scale, alpha, dtype, limit):
    logits, target, y, weights = problem(b, r, c, n, scale=scale, alpha=alpha)
    logits, weights = logits.to(dtype), weights.float()
    truth = literal_gradient(logits.double(), y, weights.double(), balance=True)
    given = logits.clone().requires_grad_()
    multimix_cross_entropy(given, target, weights).backward()
    assert relative_error(given.grad, truth) < limit


def test_products_that_round_are_imprecise_for_weights_that_are_not_centered():
    """The gradient computed from MᵀM and Mᵀ A' with products that round to TF32 is less precise."""
    logits, _, y, weights = problem(128, 1, 100, 1000, scale=3)
    truth = literal_gradient(logits, y, weights, balance=True)[:, 0]
    m, logits, product = weights[0].float(), logits[:, 0].float(), rounded(10)
    grad = (product(m.mT, product(m, logits).softmax(-1)) - product(product(m.mT, m), y.float())) / len(m)
    assert relative_error(reference.balance_gradient(grad, m), truth) > 1e-3
