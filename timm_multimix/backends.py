"""What the loss is computed with: PyTorch's operations, the same compiled, or a Triton kernel."""
import importlib.util
import os

import torch

BACKENDS = ('auto', 'torch', 'compile', 'triton')


def check_backend(backend: str) -> None:
    """Raise ValueError if the backend is not one that exists, ImportError if it is not installed."""
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(BACKENDS)}, got {backend!r}.')
    if backend == 'triton' and importlib.util.find_spec('triton') is None:
        raise ImportError(
            "backend='triton' needs Triton, which is not installed: `pip install triton`, or leave backend='auto'.")


def uses_triton(backend: str, logits: torch.Tensor) -> bool:
    """Whether the kernel computes the loss of these logits.

    By name only: 'auto' is PyTorch until the kernel has been measured on a GPU. The kernel has no float64.

    Raises:
        ValueError: if the kernel is asked for by name and cannot run on the device.
    """
    if backend != 'triton' or logits.dtype == torch.float64:
        return False
    if logits.device.type != 'cuda' and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError(
            f"backend='triton' needs logits on a GPU, got {logits.device}: leave backend='auto', or set "
            'TRITON_INTERPRET=1 before the kernel is imported to try it here, slowly.')
    return True
