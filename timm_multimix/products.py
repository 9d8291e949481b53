"""Matrix products in float32 on the CPU, by the library that is fast at them.

PyTorch's own are those of MKL, which keeps to half the width of the registers of processors that are not Intel's.
oneDNN, which PyTorch's convolutions come from, does not. In compiled code the choice is the compiler's.
"""
import torch

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def _uses_onednn(*tensors: torch.Tensor) -> bool:
    return HAS_ONEDNN and not torch.compiler.is_compiling() and all(
        tensor.device.type == 'cpu' and tensor.dtype == torch.float32 for tensor in tensors)


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix without gaps between rows or columns: with them oneDNN falls back to a reference implementation."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def _matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(_packed(a), _packed(b).mT, bias, 'none', [], '')


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for every position: (p, i, k), (p, k, j) -> (p, i, j). Not differentiable."""
    if len(a) == 1 and _uses_onednn(a, b):  # it has no batches
        return _matmul(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _matmul(x, weight.mT, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        matmul = torch.matmul if torch.is_grad_enabled() else _matmul  # with create_graph it is differentiated again
        needed = ctx.needs_input_grad
        return (
            matmul(grad, weight) if needed[0] else None,
            matmul(grad.mT, x) if needed[1] else None,
            grad.sum(dim=0) if needed[2] else None,
        )


def linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """layer(x) for x (..., d), which goes past its hooks where that is faster: a plain layer without any.

    The classifier at every position is most of what MultiMix adds to a step of a wide network.
    """
    is_plain = type(layer) is torch.nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)
    if not is_plain or not _uses_onednn(x, layer.weight) or torch.is_autocast_enabled('cpu'):
        return layer(x)
    return _Linear.apply(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])


def are_exact(device: torch.device) -> bool:
    """Whether products of float32 keep its precision; else they may round what they multiply to TF32 or bfloat16.

    Compiled code cannot ask.
    """
    is_eager = not torch.compiler.is_compiling()
    return is_eager and device.type == 'cpu' and torch.get_float32_matmul_precision() == 'highest'
