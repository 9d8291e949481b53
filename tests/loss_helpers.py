"""Helpers for tests of the losses: the literal computation on logits, and peak memory."""
import torch

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    attend,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.losses import reference

LOSSES = {
    'ce': (multimix_cross_entropy, reference.cross_entropy),
    'bce': (multimix_binary_cross_entropy, reference.binary_cross_entropy),
}


def literal(logits, y, weights, loss=reference.cross_entropy):
    """Reference loss for logits (b, r, c), attended weights (r, n, b), rows y (b, c) and an identity classifier."""
    uniform = torch.ones(logits.shape[:2], dtype=logits.dtype)
    return reference.dense_multimix(logits, y.to(logits.dtype), weights.to(logits.dtype), uniform, lambda z: z, loss)


def literal_gradient(logits, y, weights, loss=reference.cross_entropy, balance=False):
    """Gradient of the literal loss for logits (b, r, c), optionally balanced."""
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


PAPERS_ALPHA = (0.5, 2.0)  # balancing has a large effect: κ is about the batch size


def problem(b, r, c, n, length=None, soft=False, scale=1.0, alpha=PAPERS_ALPHA):
    """Random logits (b, r, c), target, rows y (b, c) and attended weights (r, n, b), in float64."""
    logits = scale * torch.randn(b, r, c, dtype=torch.float64)
    target = torch.rand(b, c, dtype=torch.float64) if soft else torch.randint(c, (b,))
    weights = sample_weights(n, b, r, tuple_length=length, alpha=alpha).double()
    weights = attend(weights / weights.sum(-1, keepdim=True), torch.rand(b, r, dtype=torch.float64) + 0.01)
    return logits, target, reference.one_hot(target, c, torch.float64), weights


def drawn(output, target, **options):
    """Loss and gradient of MultiMixLoss with a seeded generator."""
    generator = torch.Generator().manual_seed(0)
    logits = [tensor.detach().requires_grad_() for tensor in output[:2] if tensor is not None]
    loss = MultiMixLoss(generator=generator, **options)(MultiMixOutput(*logits, *output[len(logits):]), target)
    return loss, torch.autograd.grad(loss, logits, allow_unused=True)


def peak_memory(function):
    """Peak memory of PyTorch's CPU allocator during a call, in bytes, above the memory allocated before."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    changes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(torch.tensor(changes).cumsum(0))
