"""Metrics of a run in Weights & Biases, TensorBoard and Trackio (--report-to)."""
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..common.errors import UsageError
from .setup import Setup

_TRACKIO_PROJECT = 'timm-multimix'


class Trackers:
    """Trackers that are selected with --report-to. TensorBoard discards events of an earlier run from start_epoch on.

    Raises:
        UsageError: if a tracker cannot be started.
    """

    def __init__(self, setup: Setup, start_epoch: int):
        self._writer: Any = None
        self._services: list[Any] = []
        for name in setup.args.report_to:
            try:
                self._start(name, setup, start_epoch)
            except Exception as error:  # wandb has its own types
                raise UsageError(f'--report-to {name}: {error or type(error).__name__}') from error

    def _start(self, name: str, setup: Setup, start_epoch: int) -> None:
        if name == 'tensorboard':
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            self._writer = SummaryWriter(setup.folder, purge_step=start_epoch)
            return
        args, service = setup.args, import_module(name)
        if name == 'wandb':
            own = dict(project=args.wandb_project, tags=args.wandb_tags, id=args.wandb_resume_id or None,
                       resume='must' if args.wandb_resume_id else None)
        else:
            own = dict(project=_TRACKIO_PROJECT, resume='allow' if setup.resumed_from else 'never')
        service.init(name=os.path.basename(setup.folder), config=vars(args), **own)
        self._services.append(service)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the metrics of an epoch, with the names of the columns of summary.csv."""
        for service in self._services:
            service.log(dict(row))
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, row['epoch'])
            self._writer.flush()

    def finish(self) -> None:
        """Finish the runs of the trackers."""
        for service in self._services:
            service.finish()
        if self._writer is not None:
            self._writer.close()
