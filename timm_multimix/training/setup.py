"""Fixed parts of a training run."""
import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm import utils
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch.optim import Optimizer

from ..build.loaders import Loaders


@dataclass(frozen=True)
class Setup:
    """Everything of a run that is fixed before the first update, created by build_run. RunState contains the rest.

    Attributes:
        args: Arguments, by timm's names.
        options: Options for args.yaml: as given, except for optimizer options that the checkpoint determines.
        device: Device of this process.
        dtype: Dtype of model and images, None for float32.
        autocast: Returns the autocast context of a forward pass.
        loss_scaler: Loss scaler for float16 autocast on CUDA, else None.
        task: timm training task. It owns the model and computes the loss.
        loaders: Training, validation and calibration loaders.
        data_config: Input size, pixel statistics, crop and interpolation.
        class_to_idx: Index of each class name, None if the class names are unknown.
        eval_metric: Metric that selects the best checkpoint.
        folder: Output folder.
        optimizer: The optimizer, None for a run that only validates.
        scheduler: Learning rate scheduler, None for --sched none.
        updates_per_epoch: Optimizer updates in an epoch.
        num_epochs: Epochs of the schedule.
        stop_epoch: Training ends before this epoch; at most num_epochs.
        resumed_from: Checkpoint that the run continues from, or None.
    """
    args: argparse.Namespace
    options: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    autocast: Callable[[], Any]
    loss_scaler: utils.NativeScaler | None
    task: TrainingTask
    loaders: Loaders
    data_config: dict[str, Any] = field(default_factory=dict)
    class_to_idx: dict[str, int] | None = None
    eval_metric: str = 'loss'
    folder: str = ''
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    updates_per_epoch: int = 0
    num_epochs: int = 0
    stop_epoch: int = 0
    resumed_from: str | None = None

    @property
    def decreasing(self) -> bool:
        """Whether a lower metric is better."""
        return self.eval_metric.endswith('loss')
