"""BatchNorm in a head: positions are normalized with the batch statistics of the pooled features.

Evaluation applies the running statistics to pooled features. Therefore positions must not enter the batch statistics.
"""
from collections.abc import Sequence

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .swapping import restore_class, swap_class


class _PooledBatchNorm:
    """Mixin for a head's BatchNorm. It stores the variance and the mean of the pooled batch during a forward pass.

    Phases: None (ordinary BatchNorm), 'record' (store the statistics and update the running statistics), 'measure'
    (store the statistics only), 'apply' (normalize with the stored statistics).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._multimix_phase is None or not self.training:
            return super().forward(x)
        if self._multimix_phase != 'apply':
            axes = [axis for axis in range(x.ndim) if axis != 1]
            self._multimix_statistics = torch.var_mean(x.float(), axes, correction=0)
            if self._multimix_phase == 'record':
                return super().forward(x)
        return self._normalize(x, *self._multimix_statistics)

    def _normalize(self, x: torch.Tensor, var: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        # F.batch_norm in evaluation mode computes no gradient for the statistics.
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.float()
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias.float()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        x = (x.float() * scale.view(shape) + shift.view(shape)).to(x.dtype)
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x


def check_batch_norms(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError if one of a head's BatchNorms, given by their module names, is not an ordinary BatchNorm."""
    for module in map(model.get_submodule, names):
        is_plain = type(module).forward in (_BatchNorm.forward, BatchNormAct2d.forward)
        if not is_plain and not isinstance(module, _PooledBatchNorm):
            raise ValueError(
                f'Dense MultiMix does not support a {type(module).__name__} in the head: use an ordinary BatchNorm, or '
                "attach with mode='pooled'.")


def swap_batch_norms(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the class of a head's BatchNorms, so that they record the statistics of the pooled batch."""
    for module in map(model.get_submodule, names):
        if not isinstance(module, _PooledBatchNorm):
            swap_class(module, _PooledBatchNorm)
            module._multimix_phase = module._multimix_statistics = None


def restore_batch_norms(model: nn.Module) -> None:
    """Undo swap_batch_norms for all modules of the model."""
    for module in model.modules():
        if isinstance(module, _PooledBatchNorm):
            restore_class(module)
            del module._multimix_phase, module._multimix_statistics


def set_phase(model: nn.Module, names: Sequence[str], phase: str | None) -> None:
    """Set the phase of a head's BatchNorms. None deletes the stored statistics."""
    for name in names:
        module = model.get_submodule(name)
        module._multimix_phase = phase
        if phase is None:
            module._multimix_statistics = None
