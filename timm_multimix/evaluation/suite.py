"""All measurements of a model."""
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch

from ..calibration.run import share_images
from ..calibration.temperature import fit_temperature
from ..common.errors import UsageError
from ..dense.hook import attach, outputs_in_evaluation
from ..dense.layouts import grid_size
from . import between, geometry, ood
from .batches import InParts, embed, predict, progress
from .corruptions import CORRUPTIONS, SEVERITIES, corrupt
from .images import Images, Source
from .metrics import classification_metrics, cross_fit, reliability
from .models import Candidate
from .robustness import PIXEL_LEVELS, fgsm, pgd

_logger = logging.getLogger(__name__)

PARTS = ('attacks', 'corruptions', 'ood', 'embeddings', 'between', 'attention')
_NUM_ATTENTION_IMAGES = 8
_NUM_PICTURED = 1000


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. Fields without a description are options of the command.

    Attributes:
        source: Images to evaluate on.
        calibration: Images to fit a temperature on; None for cross-fitting on halves of the evaluated images.
        outside: Sources of out-of-distribution images, and names of noises.
        eps: Sizes of attacks, as fractions of the range of a pixel.
        pgd_step: Size of a step, in the same units; None for 2.5 eps / pgd_steps, with which PGD can reach every point
            of the ball.
    """
    source: Source
    calibration: Source | None = None
    outside: tuple[Source | str, ...] = ()
    parts: Sequence[str] = PARTS
    eps: Sequence[float] = ()
    pgd_steps: int = 10
    pgd_step: float | None = None
    attack_loss: str = 'log-odds'
    batch_size: int = 32
    workers: int = 0
    max_images: int | None = None
    sample: int = 2000
    seed: int = 0


@dataclass
class Result:
    """Measurements of a model.

    Attributes:
        name: Name of the model.
        values: Content of results.json, by section.
        pictures: Data of figures only: 'scores' of OOD detection, 'points' and 'classes' of the embeddings, 'images'
            and 'maps' of attention.
    """
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)


class _Evaluation:
    """Evaluation of one model.

    Raises:
        UsageError: if the images do not suit the model, or if the temperature would be fitted on the evaluated images.
    """

    def __init__(self, candidate: Candidate, settings: Settings, device: torch.device):
        self.candidate = candidate
        self.settings = settings
        self.device = device
        self.in_parts = InParts()
        self.images = self._images(settings.source, settings.max_images)
        self.calibration = None
        if settings.calibration is not None:
            self.calibration = self._images(settings.calibration, None)
            if share_images(self.calibration.dataset, self.images.dataset):
                raise UsageError(
                    f'--calibration-split {settings.calibration.split}: these are the images that are evaluated. Leave '
                    'out the option to fit the temperature of each half of the images on the other half.')
        self.outside: dict[str, Images | str] = {
            str(source): source if isinstance(source, str) else self._images(source, settings.max_images, False)
            for source in settings.outside if 'ood' in settings.parts}

    def _images(self, source: Source, limit: int | None, labeled: bool = True) -> Images:
        settings = self.settings
        return Images(source, self.candidate, settings.batch_size, settings.workers, limit, settings.seed, labeled)

    def run(self) -> Result:
        candidate, parts = self.candidate, self.settings.parts
        logits, target = predict(candidate, self.images, self.in_parts, 'images')
        if len(bad := target[(target < 0) | (target >= candidate.num_classes)]):
            raise UsageError(
                f'Data {self.settings.source}: label {int(bad[0])} is not a class of {candidate.name}, which has the '
                f'classes 0 to {candidate.num_classes - 1}.')
        result = Result(candidate.name, dict(
            origin=candidate.origin, weights=candidate.weights, input_size=list(candidate.data_config['input_size']),
            num_images=len(target), metrics=classification_metrics(logits, target),
            reliability=reliability(logits, target), tempered=self._tempered(logits, target)))
        if self.outside:
            self._ood(result, logits)
        if {'attacks', 'corruptions', 'embeddings', 'between'} & set(parts):
            sample = [torch.cat(batches) for batches in zip(*self.images.part(self.settings.sample), strict=True)]
            if 'attacks' in parts:
                result.values['attacks'] = self._attacks(*sample)
            if 'corruptions' in parts:
                result.values['corruptions'] = self._corruptions(*sample)
            if 'embeddings' in parts or 'between' in parts:
                self._embeddings_and_pairs(result, *sample)
        if 'attention' in parts:
            self._attention(result)
        return result

    def _tempered(self, logits: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        fitted_on = 'the other half of the evaluated images, for each half'
        try:
            if self.calibration is None:
                logits, temperatures = cross_fit(logits, target, self.settings.seed)
            else:
                fitted_on = str(self.calibration.source)
                temperature = fit_temperature(*predict(self.candidate, self.calibration, self.in_parts, 'calibration'))
                logits, temperatures = logits.double() / temperature, [temperature]
        except ValueError as error:
            _logger.warning(f'{self.candidate.name}: {error}')
            return dict(reason=str(error))
        metrics = classification_metrics(logits, target)
        return dict(
            temperatures=temperatures, fitted_on=fitted_on,
            **{name: metrics[name] for name in ('nll', 'brier', 'ece', 'adaptive_ece', 'classwise_ece')},
            reliability=reliability(logits, target))

    def _embed(self, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (n, c) and the embeddings (n, d) of batches of images, on the CPU."""
        def joined(images: torch.Tensor) -> torch.Tensor:
            return torch.cat(embed(self.candidate, images), dim=1)

        rows = torch.cat([self.in_parts(joined, batch.to(self.device)).cpu() for batch in batches])
        return rows[:, :self.candidate.num_classes], rows[:, self.candidate.num_classes:]

    def _accuracy(
            self, what: str, images: torch.Tensor, target: torch.Tensor,
            change: Callable[[torch.Tensor], torch.Tensor] | None = None, attack: Callable | None = None) -> float:
        """Return the top-1 accuracy in percent.

        `change` is applied once to the images of a batch, on the CPU. `attack` is applied to images and classes on the
        device, and is repeated with a smaller batch if memory does not suffice.
        """
        def is_correct(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            images = attack(images, target) if attack else images
            with torch.no_grad():
                return self.candidate.pixel_model(images).argmax(1) == target

        hits = []
        size = self.settings.batch_size
        batches = list(zip(images.split(size), target.split(size), strict=True))
        for batch, labels in progress(batches, f'{self.candidate.name}: {what}'):
            batch = change(batch) if change else batch
            hits.append(self.in_parts(is_correct, batch.to(self.device), labels.to(self.device)).cpu())
        return 100 * torch.cat(hits).double().mean().item()

    def _attacks(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        settings, model, loss = self.settings, self.candidate.pixel_model, self.settings.attack_loss
        clean = self._accuracy('sample', images, target)
        curves = dict(fgsm=[clean], pgd=[clean])
        step_sizes = [settings.pgd_step or 2.5 * epsilon / settings.pgd_steps for epsilon in settings.eps]
        for epsilon, step_size in zip(settings.eps, step_sizes, strict=True):
            shown = f'{epsilon * PIXEL_LEVELS:g}/{PIXEL_LEVELS}'
            torch.manual_seed(settings.seed)  # for the random start
            for name, attack in dict(
                    fgsm=partial(fgsm, model, epsilon=epsilon, loss=loss),
                    pgd=partial(pgd, model, epsilon=epsilon, step_size=step_size, num_steps=settings.pgd_steps,
                                loss=loss)).items():
                curves[name].append(self._accuracy(f'{name.upper()} {shown}', images, target, attack=attack))
        return dict(
            num_images=len(target),
            loss=loss,
            epsilon_of_255=[0.0, *(epsilon * PIXEL_LEVELS for epsilon in settings.eps)],
            pgd_steps=settings.pgd_steps,
            pgd_step_size_of_255=[size * PIXEL_LEVELS for size in step_sizes],
            **curves)

    def _corruptions(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        top1: dict[str, list[float]] = {}
        for kind in CORRUPTIONS:
            for severity in SEVERITIES:
                generator = torch.Generator('cpu').manual_seed(self.settings.seed)
                top1.setdefault(kind, []).append(self._accuracy(
                    f'{kind} {severity}', images, target,
                    change=partial(corrupt, kind=kind, severity=severity, generator=generator)))
        accuracies = [accuracy for curve in top1.values() for accuracy in curve]
        return dict(
            num_images=len(target), severities=list(SEVERITIES), clean_top1=self._accuracy('sample', images, target),
            mean_top1=sum(accuracies) / len(accuracies), top1=top1)

    def _ood(self, result: Result, logits: torch.Tensor) -> None:
        settings = self.settings
        result.values['ood'], scores = {}, {}
        inside = {name: score(logits) for name, score in ood.SCORES.items()}
        for name, images in self.outside.items():
            batches = images if isinstance(images, Images) else ood.noise_batches(
                images, len(logits), self.candidate.data_config['input_size'], settings.batch_size, settings.seed)
            outside_logits, _ = predict(self.candidate, batches, self.in_parts, name)
            scores[name] = {kind: score(outside_logits) for kind, score in ood.SCORES.items()}
            result.values['ood'][name] = dict(
                num_images=len(outside_logits),
                **{kind: ood.detection_metrics(inside[kind], scores[name][kind]) for kind in ood.SCORES})
        result.pictures['scores'] = dict(inside=inside, outside=scores)

    def _embeddings_and_pairs(self, result: Result, images: torch.Tensor, target: torch.Tensor) -> None:
        parts = images.split(self.settings.batch_size)
        _, embeddings = self._embed(progress(parts, f'{self.candidate.name}: embeddings'))
        if 'embeddings' in self.settings.parts:
            ratio, by_class = geometry.compactness(embeddings, target)
            result.values['embeddings'] = dict(
                num_images=len(target),
                alignment=geometry.alignment(embeddings, target),
                uniformity=geometry.uniformity(embeddings),
                compactness=ratio,
                compactness_of_classes=by_class)
            step = -(-len(target) // _NUM_PICTURED)
            if len(target) > 3:
                result.pictures.update(
                    points=geometry.project(embeddings[::step], self.settings.seed), classes=target[::step])
        pairs = between.sample_pairs(target, len(target), self.settings.seed)
        if 'between' in self.settings.parts and len(pairs):
            result.values['between'] = self._between(images, target, embeddings, pairs)

    def _between(
            self, images: torch.Tensor, target: torch.Tensor, embeddings: torch.Tensor, pairs: torch.Tensor,
    ) -> dict[str, Any]:
        targets = target[pairs]
        confidence: list[float] = []
        entropy: list[float] = []
        counts = dict(misses=0, intrusions_of_images=0, intrusions_of_embeddings=0)
        for share in progress(between.SHARES, f'{self.candidate.name}: mixed images'):
            logits, mixed = self._embed(
                torch.lerp(images[part[:, 1]], images[part[:, 0]], share)
                for part in pairs.split(self.settings.batch_size))
            for values, value in zip((confidence, entropy), between.confidence_and_entropy(logits), strict=True):
                values.append(value)
            if 0 < share < 1:  # otherwise the mixes are the images themselves
                mixed_embeddings = torch.lerp(embeddings[pairs[:, 1]], embeddings[pairs[:, 0]], share)
                for name, classes in dict(
                        misses=logits.argmax(1),
                        intrusions_of_images=between.nearest_classes(mixed, embeddings, target),
                        intrusions_of_embeddings=between.nearest_classes(mixed_embeddings, embeddings, target)).items():
                    counts[name] += between.count_third_class(classes, targets)
        num_mixes = (len(between.SHARES) - 2) * len(pairs)
        return dict(
            num_pairs=len(pairs), num_mixes=num_mixes, shares=list(between.SHARES), confidence=confidence,
            entropy=entropy, mean_confidence=fmean(confidence[1:-1]), mean_entropy=fmean(entropy[1:-1]),
            **counts, **{f'{name}_percent': 100 * count / num_mixes for name, count in counts.items()})

    @torch.no_grad()
    def _attention(self, result: Result) -> None:
        images, _ = next(iter(self.images.part(_NUM_ATTENTION_IMAGES)))
        model, normalized = self.candidate.model, self.candidate.pixel_model.normalize(images.to(self.device))
        try:
            with attach(model), outputs_in_evaluation(model):
                attention = model(normalized).attention
        except (TypeError, ValueError, AttributeError) as error:
            _logger.info(f'{self.candidate.name}: no attention maps. {error}')
            return
        maps = attention.unflatten(1, grid_size(attention.shape[1], images.shape[-2:]))
        result.pictures.update(images=images, maps=maps.cpu())


def evaluate_models(candidates: Sequence[Candidate], settings: Settings, device: torch.device) -> Iterator[Result]:
    """Evaluate models one after the other on the device. The images of all models are checked first.

    Raises:
        UsageError: if the images do not suit a model.
    """
    for evaluation in [_Evaluation(candidate, settings, device) for candidate in candidates]:
        pixel_model = evaluation.candidate.pixel_model.to(device)
        try:
            yield evaluation.run()
        finally:
            pixel_model.to('cpu')
