"""Training of a detector and its predictions, in one process or several."""
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, Subset
from tqdm import tqdm

from ..common.errors import RunError
from ..data.loading import batches_of
from .backbones import Source
from .datasets import DetectionDataset
from .detectors import DETECTORS, build_detector
from .pyramid import Level, PyramidBackbone

_MAX_GRADIENT_NORM = 10.0
_WARMUP = 0.1  # of the updates


@dataclass
class Settings:
    """Options that a result depends on.

    Attributes:
        detector: 'fcos' or 'fasterrcnn'.
        frozen: Whether the backbone stays as it is.
        epochs: Passes over the training images.
        batch_size: Images in a batch of one process.
        lr: Highest learning rate.
        opt: Optimizer of timm.
        weight_decay: Weight decay.
        fpn_channels: Channels of the feature pyramid.
        head_convs: Convolutions before the last one in the head of FCOS.
        hflip: Probability that an image is mirrored.
        min_size: Shorter side of the images, in pixels.
        max_size: Limit of their longer side.
        amp: Whether to train in bfloat16.
    """
    detector: str = 'fcos'
    frozen: bool = True
    epochs: int = 10
    batch_size: int = 16
    lr: float = 2e-3
    opt: str = 'adamw'
    weight_decay: float = 0.05
    fpn_channels: int = 64
    head_convs: int = 1
    hflip: float = 0.0
    min_size: int = 96
    max_size: int = 160
    amp: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def create_detector(source: Source, levels: list[Level], num_classes: int, settings: Settings) -> nn.Module:
    """A detector with a new head on the backbone of a model."""
    backbone = PyramidBackbone(
        source.features(), levels, settings.fpn_channels, settings.min_size, settings.frozen,
        DETECTORS[settings.detector])
    bounds = settings.min_size, settings.max_size
    return build_detector(settings.detector, backbone, num_classes, source, bounds, settings.head_convs)


def _collate(samples: list) -> tuple[list, list]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _loader(dataset, batch_size: int, workers: int, sampler: Sampler | None = None) -> DataLoader:
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=_collate,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def _batches(loader: DataLoader):
    """The batches of a loader; a file that cannot be read ends the run with a line that names it."""
    try:
        yield from batches_of(loader)
    except OSError as error:  # a worker's has a traceback in its message
        raise RunError(str(error).strip().splitlines()[-1].removeprefix('OSError: ')) from error


def _bar(total: int, description: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True,
                disable=None if rank() == 0 else True)  # None: off unless on a terminal


def _to(device: torch.device, images: list, targets: list) -> tuple[list, list]:
    """A batch on a device, with only the parts of the targets that detectors are trained on."""
    return ([image.to(device, non_blocking=True) for image in images],
            [{name: target[name].to(device, non_blocking=True) for name in ('boxes', 'labels')} for target in targets])


def train_detector(
        detector: nn.Module,
        dataset: DetectionDataset,
        settings: Settings,
        device: torch.device,
        *,
        seed: int = 0,
        workers: int = 0,
        description: str = 'train',
) -> None:
    """Train a detector with one learning-rate cycle.

    Args:
        detector: The detector.
        dataset: The images, as a training view.
        settings: Settings.
        device: Device to train on.
        seed: Seed of the order of the images.
        workers: Processes that read images.
        description: Title of the progress bar.

    Raises:
        RunError: if an image cannot be read, or the loss is not finite.
    """
    detector.to(device).train()
    model = detector
    if num_processes() > 1:  # parts of a backbone behind its last feature map get no gradient
        ids = None if device.type == 'cpu' else [device]
        model = DistributedDataParallel(detector, device_ids=ids, find_unused_parameters=not settings.frozen)
    optimizer = create_optimizer_v2(detector, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    if num_processes() > 1:
        sampler = DistributedSampler(dataset, seed=seed)
    else:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    loader = _loader(dataset, settings.batch_size, workers, sampler)
    updates = settings.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=updates, pct_start=_WARMUP, cycle_momentum=False)
    bar = _bar(updates, description, 'update')
    with bar:
        for epoch in range(settings.epochs):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            for batch in _batches(loader):
                loss = _update(model, _to(device, *batch), optimizer, settings.amp)
                schedule.step()
                bar.update()
                bar.set_postfix(epoch=epoch, loss=f'{loss:.3f}', refresh=False)


def _update(model: nn.Module, batch: tuple[list, list], optimizer: torch.optim.Optimizer, amp: bool) -> float:
    """One update. Returns the loss."""
    device = batch[0][0].device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        loss = sum(model(*batch).values())
    value = loss.detach()
    if num_processes() > 1:
        value = value.clone()
        dist.all_reduce(value)  # all processes have to stop together
    if not torch.isfinite(value):
        raise RunError(f'The loss is {float(value)}. Try a lower --lr.', is_shared=True)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return float(value) / num_processes()


@torch.no_grad()
def predict(
        detector: nn.Module,
        dataset: DetectionDataset,
        batch_size: int,
        device: torch.device,
        *,
        workers: int = 0,
        description: str = 'test',
) -> tuple[list[dict], list[dict]]:
    """Predictions and true objects of all images, on the CPU and in the order of the dataset, in every process.

    Args:
        detector: The detector.
        dataset: The images.
        batch_size: Images in a batch.
        device: Device to compute on.
        workers: Processes that read images.
        description: Title of the progress bar.

    Raises:
        RunError: if an image cannot be read.
    """
    detector.to(device).eval()
    own = Subset(dataset, range(rank(), len(dataset), num_processes()))  # no image is counted twice
    predictions, targets = [], []
    with _bar(len(own), description, 'image') as bar:
        for images, batch_targets in _batches(_loader(own, batch_size, workers)):
            outputs = detector([image.to(device) for image in images])
            predictions += [{name: value.cpu() for name, value in one.items()} for one in outputs]
            targets += batch_targets
            bar.update(len(images))
    return _gather(predictions), _gather(targets)


def _gather(values: list) -> list:
    """The values of all processes, which took turns."""
    if num_processes() == 1:
        return values
    parts: list[list] = [[] for _ in range(num_processes())]
    dist.all_gather_object(parts, values)
    return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]


def transfer(
        source: Source,
        levels: list[Level],
        datasets: Sequence[DetectionDataset],
        settings: Settings,
        device: torch.device,
        *,
        seed: int = 0,
        workers: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Train a detector on a model's backbone, and return predictions and true objects of the test images.

    Args:
        source: The model.
        levels: Its levels, from find_levels.
        datasets: Training and test images.
        settings: Settings.
        device: Device to train on.
        seed: Seed of the head, of random weights and of the order of the images.
        workers: Processes that read images.
    """
    torch.manual_seed(seed)
    train, test = datasets
    detector = create_detector(source, levels, len(train.classes), settings)
    train = train.view(source.img_mode, training=True, hflip=settings.hflip)
    test = test.view(source.img_mode)
    title = f'{source.name}, seed {seed}'
    train_detector(detector, train, settings, device, seed=seed, workers=workers, description=title)
    return predict(detector, test, settings.batch_size, device, workers=workers, description=f'{title}, test')
