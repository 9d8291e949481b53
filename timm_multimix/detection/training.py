"""Training of a detector and its predictions, in one process or several."""
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.utils.distributed import world_info_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, Subset
from tqdm import tqdm

from ..common.errors import RunError
from ..data.loading import batches_of
from ..evaluation.models import Candidate
from .datasets import DetectionDataset
from .detectors import Settings, create_detector

_MAX_GRADIENT_NORM = 10.0
_WARMUP = 0.1  # fraction of the updates


def _loader(dataset: Dataset, batch_size: int, workers: int, sampler: Sampler | None = None) -> DataLoader:
    return DataLoader(  # batches are lists of pairs, because images have different sizes
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=list, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available())


def _batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[list[torch.Tensor], list[dict]]]:
    """Yield images on the device and targets. Raise RunError for a file that cannot be read."""
    try:
        for batch in batches_of(loader):
            yield [image.to(device, non_blocking=True) for image, _ in batch], [target for _, target in batch]
    except OSError as error:  # a worker's message contains a traceback
        raise RunError(str(error).strip().splitlines()[-1].removeprefix('OSError: ')) from error


def _bar(total: int, description: str, unit: str) -> tqdm:
    is_primary = world_info_from_env()[1] == 0
    return tqdm(total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True,
                disable=None if is_primary else True)  # None disables it unless it is on a terminal


def train_detector(
        detector: nn.Module, dataset: Dataset, settings: Settings, device: torch.device, *, seed: int = 0,
        workers: int = 0, description: str = 'train') -> None:
    """Train a detector with a one-cycle learning rate schedule. The seed determines the order of the images.

    Raises:
        RunError: if an image cannot be read, or the loss is not finite.
    """
    model = detector.to(device).train()
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    if dist.is_initialized():
        sampler = DistributedSampler(dataset, seed=seed)
        # layers of the backbone after its last feature map get no gradient
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
    """Update the model once and return the loss."""
    device = images[0].device
    targets = [{name: target[name].to(device, non_blocking=True) for name in ('boxes', 'labels')} for target in targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        loss = sum(model(images, targets).values())
    value = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)  # all processes have to stop together
        value /= dist.get_world_size()
    if not torch.isfinite(value):
        raise RunError(f'The loss is {float(value)}. Try a lower --lr.', is_shared=True)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return float(value)


@torch.no_grad()
def predict(
        detector: nn.Module, dataset: Dataset, batch_size: int, device: torch.device, *, workers: int = 0,
        description: str = 'test') -> tuple[list[dict], list[dict]]:
    """Return predictions and true objects of all images, on the CPU in the order of the dataset, in every process."""
    detector.to(device).eval()
    _, rank, num_processes = world_info_from_env() if dist.is_initialized() else (0, 0, 1)
    own = Subset(dataset, range(rank, len(dataset), num_processes))
    results: list[tuple[dict, dict]] = []
    with _bar(len(own), description, 'image') as bar:
        for images, targets in _batches(_loader(own, batch_size, workers), device):
            predictions = [{name: value.cpu() for name, value in one.items()} for one in detector(images)]
            results += zip(predictions, targets, strict=True)
            bar.update(len(images))
    if num_processes > 1:
        parts: list[list] = [[] for _ in range(num_processes)]
        dist.all_gather_object(parts, results)
        results = [parts[index % num_processes][index // num_processes] for index in range(len(dataset))]
    return [prediction for prediction, _ in results], [target for _, target in results]


def transfer(
        source: Candidate, datasets: Sequence[DetectionDataset], settings: Settings,
        device: torch.device, *, seed: int = 0, workers: int = 0) -> Iterator[tuple[list[dict], list[dict]]]:
    """Train a detector on a model's backbone and the first dataset. Yield predictions and true objects of the others.

    `seed` determines the head, random weights and the order of the images.
    """
    torch.manual_seed(seed)
    train, *others = datasets
    detector = create_detector(source, len(train.classes), settings)
    title = f'{source.name}, seed {seed}'
    train_detector(detector, train.view(source.img_mode, training=True, hflip=settings.hflip), settings, device,
                   seed=seed, workers=workers, description=title)
    for other in others:
        yield predict(detector, other.view(source.img_mode), settings.batch_size, device, workers=workers,
                      description=f'{title}, test')
