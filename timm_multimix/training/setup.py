"""Fixed parts of a training run."""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm import utils
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch.optim import Optimizer

from ..build.loaders import Loaders


@dataclass(frozen=True)
class Setup:
    """Parts of a run that do not change during training. RunState contains the rest."""
    args: argparse.Namespace
    options: dict[str, Any]  # options for args.yaml: as given, except for optimizer options of the checkpoint
    device: torch.device
    autocast: Callable[[], Any]  # returns the autocast context of a forward pass
    loss_scaler: utils.NativeScaler | None  # for float16 autocast on CUDA
    task: TrainingTask
    loaders: Loaders
    data_config: dict[str, Any]  # input size, pixel statistics, crop and interpolation
    class_to_idx: dict[str, int] | None  # index of each class name, None if unknown
    eval_metric: str  # selects the best checkpoint
    folder: str  # output folder
    # The parts below are set for training, and not for --validate.
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None  # None for --sched none
    updates_per_epoch: int = 0
    num_epochs: int = 0  # epochs of the schedule
    stop_epoch: int = 0  # training ends before this epoch
    resumed_from: str | None = None  # checkpoint that the run continues from

    @property
    def decreasing(self) -> bool:
        """Whether a lower metric is better."""
        return self.eval_metric.endswith('loss')
