"""State of a training run. Checkpoints store it, so that a resumed run equals an uninterrupted one."""
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from torch.utils.data import DataLoader

from ..common.console import Averages
from ..common.distributed import Watchdog
from ..common.random_state import random_state, set_random_state
from .checkpoints import RunSaver
from .interrupt import StopRequest
from .loss_guard import LossGuard, normalization_statistics
from .setup import Setup


class RunState:
    """Everything of a run that changes during training, besides the weights, the optimizer and the loss scaler.

    A checkpoint contains state_dict() as 'progress', and the epoch as in timm.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.epoch = 0  # in progress or, between epochs, the next one
        self.averages: Averages | None = None  # of the epoch in progress, None between epochs
        self.validated = False  # whether validation ran, also before the run was resumed
        self.saver: RunSaver | None = None  # None on all processes but the first
        self.guard = LossGuard(setup.task.get_trainable_module(), setup.args.max_nonfinite, setup.args.distributed)
        self.stop = StopRequest()
        self.watchdog = Watchdog()
        self._random: dict[str, Any] | None = None  # restored by begin_training

    @property
    def consumed(self) -> int:
        """Batches of the epoch in progress that were trained on; 0 if the loader cannot resume within an epoch."""
        loader = self.setup.loaders.resumable
        return 0 if self.averages is None or loader is None else loader.consumed

    def settings(self) -> dict[str, int]:
        """Return the settings that must be unchanged to continue in the middle of an epoch."""
        args = self.setup.args
        return dict(
            processes=args.world_size,
            workers=args.workers,
            batch_size=args.batch_size,
            grad_accum_steps=args.grad_accum_steps,
            batches=len(self.setup.loaders.train),
        )

    def _statistics(self) -> dict[str, torch.Tensor]:
        """Return the normalization statistics of this process, of the model and its averaged copies.

        They differ between processes, which train on different images. --dist-bn reduce averages them after the epoch,
        and a teacher uses them in its forward pass. The statistics of the first process are included: the weights in a
        checkpoint written during validation already contain the averaged statistics.
        """
        statistics = normalization_statistics(self.setup.task)
        return {name.replace('_orig_mod.', ''): buffer for name, buffer in statistics.items()}

    def _rounding_generator(self) -> torch.Generator | None:
        """Return the random generator of stochastic rounding in timm's EMA of bfloat16 weights."""
        return getattr(self.setup.task.get_trainable_module(ema=True), '_sr_generator', None)

    def _scheduler_state(self) -> dict[str, Any] | None:
        """Return the state of a plateau schedule. All other schedules are functions of the epoch or the update."""
        inner = getattr(self.setup.scheduler, 'lr_scheduler', None)
        if inner is None:
            return None
        rates = [group['lr'] for group in self.setup.optimizer.param_groups]
        return dict(inner=inner.state_dict(), restore_lr=self.setup.scheduler.restore_lr, lr=rates)

    def state_dict(self) -> dict[str, Any] | None:
        """Collect the state of all processes between two updates. All processes must call it.

        Returns:
            The state as plain data; None on all processes but the first.
        """
        args, loader = self.setup.args, self.setup.loaders.resumable
        statistics = self._statistics() if args.distributed else {}
        own = dict(
            random=random_state(self.setup.device),
            loader=None if loader is None else loader.state_dict(),
            averages=None if self.averages is None else self.averages.state_dict(),
            statistics={name: buffer.cpu() for name, buffer in statistics.items()},
        )
        processes: list[Any] | None = [own]
        if args.distributed:
            processes = [None] * args.world_size if utils.is_primary(args) else None
            dist.gather_object(own, processes)
            if processes is None:
                return None
        generator = self._rounding_generator()
        return dict(
            in_epoch=self.averages is not None,
            consumed=self.consumed,
            processes=processes,
            shape=self.settings(),
            scheduler=self._scheduler_state(),
            average=None if generator is None else generator.get_state(),
            validated=self.validated,
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of a run with the same number of processes. begin_training restores the random state.

        Raises:
            LookupError, TypeError, ValueError, RuntimeError: if the state is invalid.
        """
        args, loaders = self.setup.args, self.setup.loaders
        own = state['processes'][args.rank]
        if state['in_epoch']:
            self.averages = Averages(self.setup.device)
            self.averages.load_state_dict(own['averages'])
        if loaders.resumable is not None and own['loader'] is not None:
            loaders.resumable.load_state_dict(
                own['loader'], same_workers=state['shape']['workers'] == args.workers, in_epoch=state['in_epoch'])
        self.validated = state['validated']
        loader = getattr(loaders.evaluation, 'loader', loaders.evaluation)
        if self.validated and isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
            loader.generator = torch.Generator()  # the seed of its workers was drawn before
        generator = self._rounding_generator()
        if generator is not None and state['average'] is not None:
            generator.set_state(state['average'].cpu())
        for name, buffer in self._statistics().items():
            if name in own['statistics']:
                buffer.copy_(own['statistics'][name])
        self._random = own['random']

    def begin_training(self) -> None:
        """Set the random state. Call it last before training, because building a run draws random numbers."""
        args = self.setup.args
        if self._random is not None:
            set_random_state(self._random, self.setup.device)
        elif self.epoch:  # do not repeat the random numbers of the first epoch
            utils.random_seed(args.seed + 1_000_003 * self.epoch, args.rank)
