"""Matrix products of the loss, by the library that is fast at them."""
import torch


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


HAS_ONEDNN = _has_onednn()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for every position: (p, i, k), (p, k, j) -> (p, i, j).

    In float32 on the CPU, PyTorch's products are those of MKL, which keeps to half the width of the registers of
    processors that are not Intel's. oneDNN, which PyTorch's convolutions come from, does not. It has no batches. (In
    compiled code the choice is the compiler's.)
    """
    is_eager = not torch.compiler.is_compiling()
    if is_eager and len(a) == 1 and HAS_ONEDNN and a.device.type == 'cpu' and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a[0], b[0].mT, None, 'none', [], '').unsqueeze(0)
    return torch.bmm(a, b)


def are_exact(device: torch.device) -> bool:
    """Whether products of float32 keep its precision; else they may round what they multiply to TF32 or bfloat16.

    Compiled code cannot ask.
    """
    is_eager = not torch.compiler.is_compiling()
    return is_eager and device.type == 'cpu' and torch.get_float32_matmul_precision() == 'highest'
