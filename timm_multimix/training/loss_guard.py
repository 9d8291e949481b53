"""Losses that are not finite: found before they reach the weights, without keeping the device waiting."""
import logging

import torch
import torch.distributed as dist
from torch import nn

from ..common.errors import RunError

_logger = logging.getLogger(__name__)

_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


def normalisation_statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers in which a module's normalisation layers keep what they have seen."""
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in _STATISTICS}


class LossGuard:
    """Watches the loss of every batch, and lets no update through whose loss is not finite.

    watch() comes after the forward pass: it sends a flag to the host. passed() comes when the backward pass is queued
    and reads the flag. The device is busy with the backward pass meanwhile, so it never runs dry for the check.

    Of a batch that fails nothing is left: its update is not made, and normalisation statistics that it went into are
    put back.

    Args:
        module: The model that is trained.
        limit: Updates in a row that may fail before the run stops. With 0 nothing is watched.
        distributed: Let all processes skip what one of them must skip.
    """

    def __init__(self, module: nn.Module, limit: int, distributed: bool = False):
        self.limit = limit
        self.distributed = distributed
        self.failed_in_a_row = 0
        self._statistics = list(normalisation_statistics(module).values()) if limit else []
        self._before = [torch.empty_like(buffer) for buffer in self._statistics]
        self._flag: torch.Tensor | None = None  # on the host: whether this batch failed, whether the update did
        self._event = None
        self._failed = torch.zeros(())

    @torch.no_grad()
    def remember(self) -> None:
        """Before a forward pass: note the statistics it will change."""
        if self._statistics:
            torch._foreach_copy_(self._before, self._statistics)

    @torch.no_grad()
    def watch(self, loss: torch.Tensor, is_update: bool) -> None:
        """After a forward pass: look at its loss.

        Args:
            loss: Scalar.
            is_update: The last batch of an update. Processes agree on the update then.
        """
        if not self.limit:
            return
        failed = (~loss.detach().isfinite()).float()
        self._failed = torch.maximum(self._failed.to(failed.device), failed)
        if is_update and self.distributed:
            dist.all_reduce(self._failed, dist.ReduceOp.MAX)
        flags = torch.stack([failed, self._failed])
        if flags.device.type == 'cuda':
            self._flag = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._flag = flags.cpu()

    @torch.no_grad()
    def passed(self) -> tuple[bool, bool]:
        """Whether this batch is fine, and whether all of its update so far is."""
        if not self.limit:
            return True, True
        if self._event is not None:
            self._event.synchronize()
        batch_failed, update_failed = map(bool, self._flag)
        if batch_failed and self._statistics:
            torch._foreach_copy_(self._statistics, self._before)
        return not batch_failed, not update_failed

    def finish_update(self, passed: bool, place: str) -> None:
        """After the last batch of an update: count.

        Args:
            passed: Whether the update was made.
            place: Where in the run, with the learning rate, for a message.

        Raises:
            RunError: if too many updates in a row failed.
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
            f'({self.failed_in_a_row} in a row, {self.limit} stop the run).')
        if self.failed_in_a_row >= self.limit:
            raise RunError(
                f'The loss was not finite in {self.limit} updates in a row, last {place}. Lower the learning rate, '
                'clip gradients (--clip-grad), or look for broken inputs.',
                is_shared=True)
