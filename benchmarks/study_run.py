"""One run of a study: load the data, train a model and compute its metrics."""
import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from torch import nn

from timm_multimix import MultiMixLoss, MultiMixTask, manifold_mixup_weights, multimix_cross_entropy
from timm_multimix.calibration.temperature import fit_temperature
from timm_multimix.data.alternation import AlternatingMixup, BatchSchedule
from timm_multimix.data.demo import GlyphsDataset
from timm_multimix.data.scenes import digit_images
from timm_multimix.evaluation.metrics import classification_metrics
from timm_multimix.evaluation.robustness import fgsm
from timm_multimix.losses.module import PRESETS

IMAGE_SIZE = 32
FGSM_STEP = 8 / 255  # for pixels in [0, 1]
SPLITS = ('train', 'validation', 'test')
# Options of a study and their defaults.
DATASET_DEFAULTS = dict(train=None, validation=500, test=None, label_noise=0.0)
TRAINING_DEFAULTS = dict(epochs=30, batch_size=50, opt='sgd', weight_decay=5e-4, reach=4)
PLAIN_OPTIONS = dict(smoothing=0.0, mixup=0.0, cutmix=0.0, manifold_mixup=0.0, multimix='off')
# Options of a method without a default. They are in the settings only if given, so the keys of older runs stay valid.
# `prob`: probability of a batch with MultiMix or manifold mixup. Mixup and CutMix apply to the other batches.
# `regmixup`: alpha of RegMixup, the plain loss on the images plus the loss on mixed images (Pinto et al., 2022).
# `targeted`: Dirichlet concentrations of one example of a mix and of all others, for pooled MultiMix (PowMix, 2024).
EXTRA_OPTIONS = ('prob', 'regmixup', 'targeted')
# Options whose values are stored in the settings of a run with MultiMix. If a default changes, the runs are repeated.
RESOLVED_OPTIONS = (
    'num_mixes', 'alpha', 'tuple_length', 'attention', 'attention_norm', 'attention_grad', 'balance', 'pooled_weight',
    'clean_weight', 'logit_scale', 'start_epoch', 'off_epoch')
# Additional options stored for a run with a teacher.
TEACHER_OPTIONS = ('teacher_decay', 'distill_weight', 'distill_temperature', 'distill_ramp_epochs', 'views')


class Split(NamedTuple):
    """Images (n, 1, 32, 32) in [-1, 1] and class indices (n,)."""
    images: torch.Tensor
    labels: torch.Tensor


def task_option_names() -> set[str]:
    """Return the options of MultiMixTask and MultiMixLoss that a method can set."""
    names = {name for owner in (MultiMixTask, MultiMixLoss) for name in inspect.signature(owner).parameters}
    return names - {
        'model', 'criterion', 'criterion_kwargs', 'mode', 'device', 'dtype', 'verbose', 'options', 'smoothing', 'seed',
        'loss_type', 'generator', 'tile_size', 'gather', 'teacher_path', 'preset'}


def _default_options() -> dict[str, Any]:
    """Return the defaults of MultiMixTask and MultiMixLoss. Defaults of the task take precedence."""
    parameters = [inspect.signature(owner).parameters for owner in (MultiMixLoss, MultiMixTask)]
    return {name: part.default for owner in parameters for name, part in owner.items()} | PRESETS['default']


def resolve_method(options: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults to the options of a method. Defaults of MultiMix are added if it is enabled.

    Raises:
        ValueError: If an option is unknown.
    """
    known = task_option_names() | set(EXTRA_OPTIONS)
    unknown = set(options) - set(PLAIN_OPTIONS) - known
    if unknown:
        raise ValueError(
            f'Unknown option {", ".join(sorted(unknown))}: choose from {", ".join([*PLAIN_OPTIONS, *sorted(known)])}.')
    resolved = {**PLAIN_OPTIONS, **options}
    # YAML 1.1 reads a bare `off` as False.
    resolved['multimix'] = resolved['multimix'] or 'off'
    wanted = RESOLVED_OPTIONS + (TEACHER_OPTIONS if 'teacher' in options else ())
    if resolved['multimix'] != 'off':
        defaults = _default_options()
        resolved = {name: defaults[name] for name in wanted if name in defaults} | resolved
    return {name: list(value) if isinstance(value, tuple) else value for name, value in resolved.items()}


def _digits(train: int, validation: int, test: int | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    digits = load_digits()
    images, labels = digits.images / 16, digits.target
    options = dict(random_state=0)
    first, rest = train_test_split(np.arange(len(labels)), train_size=train, stratify=labels, **options)
    second, third = train_test_split(rest, train_size=validation, stratify=labels[rest], **options)
    indices = zip(SPLITS, (first, second, third[:test]), strict=True)
    return {name: (images[index], labels[index]) for name, index in indices}


def _glyphs(train: int, validation: int, test: int | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    datasets = {name: GlyphsDataset(name, count) for name, count in zip(SPLITS, (train, validation, test), strict=True)}
    return {name: (dataset.images / 255, np.array(dataset.targets)) for name, dataset in datasets.items()}


def _scene_digits(train: int, validation: int, test: int | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Load digits that occur in no scene of another split."""
    splits = {}
    for name, count in zip(SPLITS, (train, validation, test), strict=True):
        images, labels = digit_images(name)
        chosen = np.random.default_rng(0).permutation(len(labels))[:count]
        splits[name] = images[chosen] / 255, labels[chosen]
    return splits


DATASETS = {'digits': _digits, 'glyphs': _glyphs, 'scene digits': _scene_digits}


@lru_cache(maxsize=4)
def _load(
        image_size: int,
        name: str,
        train: int,
        validation: int,
        test: int | None,
        label_noise: float,
) -> dict[str, Split]:
    splits = {}
    for split, (images, labels) in DATASETS[name](train, validation, test).items():
        images = torch.tensor(images, dtype=torch.float32).unsqueeze(1)
        images = F.interpolate(images, image_size, mode='bicubic').clamp(0, 1)
        splits[split] = Split(2 * images - 1, torch.tensor(labels))
    if label_noise:
        labels = splits['train'].labels.clone()
        random = torch.Generator().manual_seed(0)
        wrong = torch.randperm(len(labels), generator=random)[:round(label_noise * len(labels))]
        classes = int(labels.max()) + 1
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=random)) % classes
        splits['train'] = splits['train']._replace(labels=labels)
    return splits


def load_splits(dataset: dict[str, Any], image_size: int = IMAGE_SIZE) -> dict[str, Split]:
    """Load the splits of a dataset. Label noise replaces a share of the training labels by other classes."""
    return _load(image_size, **dataset)


def shift(images: torch.Tensor, reach: int) -> torch.Tensor:
    """Shift every image by up to `reach` pixels in each direction, with replicated borders."""
    padded = F.pad(images, [reach] * 4, mode='replicate')
    count, _, height, width = images.shape
    y, x = torch.randint(0, 2 * reach + 1, (2, count, 1))
    rows, columns = y + torch.arange(height), x + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def targeted_weights(batch_size: int, high: float, low: float, num_mixes: int = 1000) -> torch.Tensor:
    """Draw Dirichlet weights with concentration `high` for one example of each mix and `low` for all others."""
    concentration = torch.full((num_mixes, batch_size), float(low))
    concentration[torch.arange(num_mixes), torch.arange(num_mixes) % batch_size] = high
    return torch.distributions.Dirichlet(concentration).sample()


def feature_mix_loss(method: dict[str, Any]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return the loss of manifold mixup or of MultiMix with a targeted Dirichlet. None for other methods."""
    if method['manifold_mixup']:
        sample, balance = partial(manifold_mixup_weights, alpha=method['manifold_mixup']), False
    elif method.get('targeted'):
        high, low = method['targeted']
        sample, balance = partial(targeted_weights, high=high, low=low), True
    else:
        return None
    return lambda logits, target: multimix_cross_entropy(
        logits, target, sample(len(target)), balance=balance, smoothing=method['smoothing'])


def make_task(model: nn.Module, method: dict[str, Any], seed: int = 0) -> MultiMixTask:
    """Create the training task of a method."""
    options = {name: value for name, value in method.items()
               if name not in PLAIN_OPTIONS and name not in EXTRA_OPTIONS}
    criterion = nn.CrossEntropyLoss(label_smoothing=method['smoothing'])
    return MultiMixTask(
        model, criterion, mode=method['multimix'], prob=method.get('prob'), seed=seed, verbose=False, **options)


def make_mixup(method: dict[str, Any], num_classes: int) -> AlternatingMixup | None:
    """Create timm's Mixup if the method mixes images, else None."""
    alpha = method.get('regmixup') or method['mixup']
    if not alpha and not method['cutmix']:
        return None
    return AlternatingMixup(
        mixup_alpha=alpha, cutmix_alpha=method['cutmix'], label_smoothing=method['smoothing'],
        num_classes=num_classes)


def batch_loss(
        task: MultiMixTask,
        method: dict[str, Any],
        mixup: AlternatingMixup | None,
        images: torch.Tensor,
        target: torch.Tensor,
        second_view: torch.Tensor | None,
        is_multimix: bool,
) -> torch.Tensor:
    """Compute the loss of one batch. MultiMix or manifold mixup is used if is_multimix is True."""
    if method.get('regmixup'):
        mixed, mixed_target = mixup(images.clone(), target)
        both = torch.cat([images, mixed]).contiguous(memory_format=torch.channels_last)
        logits, mixed_logits = task.trainable_module(both).chunk(2)
        return F.cross_entropy(logits, target) + F.cross_entropy(mixed_logits, mixed_target)
    if mixup is not None:
        images, target = mixup(images, target)
    if second_view is not None:  # (b, 2c, h, w)
        images = torch.cat([images, second_view], dim=1)
    images = images.contiguous(memory_format=torch.channels_last)
    feature_loss = feature_mix_loss(method) if is_multimix else None
    if feature_loss is not None:
        return feature_loss(task.trainable_module(images), target)
    return task(images, target, multimix=is_multimix and method['multimix'] != 'off')['loss']


def train(settings: dict[str, Any], data: Split) -> MultiMixTask:
    """Train a model with a one-cycle learning-rate schedule, and return the task in evaluation mode."""
    torch.manual_seed(settings['seed'])
    np.random.seed(settings['seed'])  # for timm's Mixup
    options, method = settings['training'], settings['method']
    num_classes = int(data.labels.max()) + 1
    model = timm.create_model(**settings['model'], num_classes=num_classes, in_chans=1)
    model = model.to(memory_format=torch.channels_last)  # faster on a CPU
    task = make_task(model, method, settings['seed'])
    batch_schedule = BatchSchedule(
        method.get('prob', 1.0), settings['seed'], method.get('start_epoch', 0), method.get('off_epoch', 0))
    mixup = make_mixup(method, num_classes)
    optimizer = create_optimizer_v2(
        model, opt=options['opt'], lr=settings['lr'], weight_decay=options['weight_decay'])
    batch_size = options['batch_size']
    steps = len(data.labels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings['lr'], total_steps=options['epochs'] * steps)
    task.train()
    for epoch in range(options['epochs']):
        task.set_epoch(epoch)
        for index, batch in enumerate(torch.randperm(len(data.labels))[:steps * batch_size].split(batch_size)):
            images, target = shift(data.images[batch], options['reach']), data.labels[batch]
            second_view = shift(data.images[batch], options['reach']) if task.views == 2 else None
            if mixup is not None:
                mixup.mixes_images = batch_schedule.mixes_images(epoch, index)
            optimizer.zero_grad()
            is_multimix = batch_schedule.is_multimix(epoch, index)
            batch_loss(task, method, mixup, images, target, second_view, is_multimix).backward()
            optimizer.step()
            schedule.step()
            task.update_ema()
    return task.eval()


def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits in float64, with NaN replaced if the training has diverged."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(250)]).double().nan_to_num()


class _FromPixels(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images - 1


def fgsm_accuracy(model: nn.Module, data: Split) -> float:
    """Return the accuracy in percent on FGSM adversarial images."""
    pixel_model = nn.Sequential(_FromPixels(), model)
    batches = zip(data.images.split(250), data.labels.split(250), strict=True)
    adversarial = torch.cat([fgsm(pixel_model, (images + 1) / 2, labels, FGSM_STEP) for images, labels in batches])
    return 100 * (predict(pixel_model, adversarial).argmax(1) == data.labels).float().mean().item()


def evaluate(model: nn.Module, validation: Split, test: Split) -> dict[str, float]:
    """Return the test metrics, the temperature fitted on the validation split, and the validation accuracy."""
    validation_logits, logits = (predict(model, split.images) for split in (validation, test))
    try:
        temperature = fit_temperature(validation_logits, validation.labels)
    except ValueError:  # the logits do not predict the labels
        temperature = float('inf')
    raw, tempered = (classification_metrics(values, test.labels) for values in (logits, logits / temperature))
    return dict(
        validation=100 * (validation_logits.argmax(1) == validation.labels).double().mean().item(),
        accuracy=raw['top1'], nll=raw['nll'], ece=raw['ece'], fgsm=fgsm_accuracy(model, test),
        temperature=temperature, nll_at_t=tempered['nll'], ece_at_t=tempered['ece'],
    )


def run(settings: dict[str, Any]) -> dict[str, float]:
    """Train and evaluate a model with the settings 'dataset', 'model', 'training', 'method', 'lr' and 'seed'."""
    splits = load_splits(settings['dataset'], settings['model'].get('img_size', IMAGE_SIZE))
    task = train(settings, splits['train'])
    # Use the model or the 'ema' teacher, whichever has the better validation accuracy.
    models = [model for model in (task.trainable_module, task.get_eval_teacher()) if model is not None]
    results = [evaluate(model, splits['validation'], splits['test']) for model in models]
    return max(results, key=lambda metrics: metrics['validation'])
