"""Training of a detector and its predictions, in one process or several."""
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, Subset
from tqdm import tqdm

from ..common.errors import RunError
from ..data.loading import batches_of
from .backbones import Source
from .datasets import DetectionDataset
from .detectors import Settings, create_detector
from .pyramid import Level

_MAX_GRADIENT_NORM = 10.0
_WARMUP = 0.1  # of the updates


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def _loader(dataset: Dataset, batch_size: int, workers: int, sampler: Sampler | None = None) -> DataLoader:
    return DataLoader(  # batches are lists of pairs, because images have different sizes
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=list, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available())


def _batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[list[torch.Tensor], list[dict]]]:
    """Images on the device and targets. A file that cannot be read ends the run with a line that names it."""
    try:
        for batch in batches_of(loader):
            yield [image.to(device, non_blocking=True) for image, _ in batch], [target for _, target in batch]
    except OSError as error:  # a worker's has a traceback in its message
        raise RunError(str(error).strip().splitlines()[-1].removeprefix('OSError: ')) from error


def _bar(total: int, description: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True,
                disable=None if rank() == 0 else True)  # None: off unless on a terminal


def train_detector(
        detector: nn.Module, dataset: Dataset, settings: Settings, device: torch.device, *, seed: int = 0,
        workers: int = 0, description: str = 'train') -> None:
    """Train a detector with one learning-rate cycle. The seed is that of the order of the images.

    Raises:
        RunError: if an image cannot be read, or the loss is not finite.
    """
    model = detector.to(device).train()
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    if num_processes() > 1:
        sampler = DistributedSampler(dataset, seed=seed)
        # parts of a backbone behind its last feature map get no gradient
        model = DistributedDataParallel(
            detector, device_ids=None if device.type == 'cpu' else [device],
            find_unused_parameters=not settings.frozen)
    loader = _loader(dataset, settings.batch_size, workers, sampler)
    optimizer = create_optimizer_v2(detector, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    updates = settings.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=updates, pct_start=_WARMUP, cycle_momentum=False)
    with _bar(updates, description, 'update') as bar:
        for epoch in range(settings.epochs):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            for batch in _batches(loader, device):
                loss = _update(model, *batch, optimizer, settings.amp)
                schedule.step()
                bar.update()
                bar.set_postfix(epoch=epoch, loss=f'{loss:.3f}', refresh=False)


def _update(
        model: nn.Module, images: list[torch.Tensor], targets: list[dict], optimizer: torch.optim.Optimizer, amp: bool,
) -> float:
    """One update. Returns the loss."""
    device = images[0].device
    targets = [{name: target[name].to(device, non_blocking=True) for name in ('boxes', 'labels')} for target in targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        loss = sum(model(images, targets).values())
    value = loss.detach().clone()
    if num_processes() > 1:
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
        detector: nn.Module, dataset: Dataset, batch_size: int, device: torch.device, *, workers: int = 0,
        description: str = 'test') -> tuple[list[dict], list[dict]]:
    """Predictions and true objects of all images, on the CPU and in the order of the dataset, in every process.

    Raises:
        RunError: if an image cannot be read.
    """
    detector.to(device).eval()
    own = Subset(dataset, range(rank(), len(dataset), num_processes()))  # no image is counted twice
    predictions, targets = [], []
    with _bar(len(own), description, 'image') as bar:
        for images, batch_targets in _batches(_loader(own, batch_size, workers), device):
            predictions += [{name: value.cpu() for name, value in one.items()} for one in detector(images)]
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
        source: Source, levels: list[Level], datasets: Sequence[DetectionDataset], settings: Settings,
        device: torch.device, *, seed: int = 0, workers: int = 0) -> Iterator[tuple[list[dict], list[dict]]]:
    """Train a detector on a model's backbone, and predict the objects of other images.

    Args:
        source: The model.
        levels: Its levels, from find_levels.
        datasets: Training images, and one or several sets of other images.
        settings: Settings.
        device: Device to train on.
        seed: Seed of the head, of random weights and of the order of the images.
        workers: Processes that read images.

    Yields:
        Predictions and true objects of each set of other images.
    """
    torch.manual_seed(seed)
    train, *others = datasets
    detector = create_detector(source, levels, len(train.classes), settings)
    title = f'{source.name}, seed {seed}'
    train_detector(detector, train.view(source.img_mode, training=True, hflip=settings.hflip), settings, device,
                   seed=seed, workers=workers, description=title)
    for other in others:
        yield predict(detector, other.view(source.img_mode), settings.batch_size, device, workers=workers,
                      description=f'{title}, test')
