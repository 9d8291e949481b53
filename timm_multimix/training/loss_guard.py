"""Skip updates whose loss is not finite, without an extra device synchronization before the backward pass."""
import logging

import torch
import torch.distributed as dist
from torch import nn

from ..common.errors import RunError

_logger = logging.getLogger(__name__)

_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


def normalization_statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the running-statistics buffers of a module's normalization layers, by name."""
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in _STATISTICS}


class LossGuard:
    """Checks the loss of every batch and skips updates with a loss that is not finite.

    Call watch() after the forward pass: it copies a flag to the host asynchronously. Call passed() after the backward
    pass is queued: it reads the flag while the device runs the backward pass, so that the device does not idle.

    Args:
        module: The trained model.
        limit: Number of consecutive skipped updates that stops the run. With 0 losses are not checked.
        distributed: Skip an update in all processes if the loss is not finite in one of them.
    """

    def __init__(self, module: nn.Module, limit: int, distributed: bool = False):
        self.limit = limit
        self.distributed = distributed
        self.failed_in_a_row = 0
        self._statistics = list(normalization_statistics(module).values()) if limit else []
        self._before = [torch.empty_like(buffer) for buffer in self._statistics]
        self._flags: torch.Tensor | None = None  # on the host: (batch failed, update failed)
        self._event = None
        self._failed = torch.zeros(())

    @torch.no_grad()
    def remember(self) -> None:
        """Save the normalization statistics before a forward pass."""
        if self._statistics:
            torch._foreach_copy_(self._before, self._statistics)

    @torch.no_grad()
    def watch(self, loss: torch.Tensor, is_update: bool) -> None:
        """Start the check of a loss. After the last batch of an update, the flag is reduced over all processes."""
        if not self.limit:
            return
        failed = (~loss.detach().isfinite()).float()
        self._failed = torch.maximum(self._failed.to(failed.device), failed)
        if is_update and self.distributed:
            dist.all_reduce(self._failed, dist.ReduceOp.MAX)
        self._flags = torch.stack([failed, self._failed])
        if self._flags.device.type == 'cuda':
            self._flags = torch.empty(2, pin_memory=True).copy_(self._flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @torch.no_grad()
    def passed(self) -> tuple[bool, bool]:
        """Return whether the loss of this batch is finite, and whether all losses of the update so far are finite.

        If the loss of the batch is not finite, restore the normalization statistics from before its forward pass.
        """
        if not self.limit:
            return True, True
        if self._event is not None:
            self._event.synchronize()
        batch_failed, update_failed = map(bool, self._flags.cpu())
        if batch_failed and self._statistics:
            torch._foreach_copy_(self._statistics, self._before)
        return not batch_failed, not update_failed

    def finish_update(self, passed: bool, place: str) -> None:
        """Count consecutive skipped updates. `place` is used in messages.

        Raises:
            RunError: if `limit` consecutive updates were skipped.
        """
        if not self.limit:
            return
        self._failed.zero_()
        if passed:
            self.failed_in_a_row = 0
            return
        self.failed_in_a_row += 1
        _logger.warning(
            f'The loss is not finite {place}: the update is skipped '
            f'({self.failed_in_a_row} in a row; the run stops at {self.limit}).')
        if self.failed_in_a_row >= self.limit:
            raise RunError(
                f'The loss was not finite in {self.limit} updates in a row, last {place}. Lower the learning rate, '
                'clip gradients (--clip-grad), or check the inputs for NaN.',
                is_shared=True)
