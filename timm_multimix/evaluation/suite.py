"""All measurements of one model."""
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..calibration.run import share_images
from ..calibration.temperature import fit_temperature
from ..common.errors import UsageError
from ..dense.heads import find_head
from ..dense.layouts import grid_size
from ..dense.positions import position_features
from ..losses.attention import attention_map
from . import between, corruptions, geometry, ood, robustness
from .batches import Embedder, InParts, predict, progress
from .images import Images, Source, choose
from .metrics import Tempered, classification_metrics, cross_fit, reliability
from .models import Candidate

_logger = logging.getLogger(__name__)

PARTS = ('attacks', 'corruptions', 'ood', 'embeddings', 'between', 'attention')
_NUM_ATTENTION_IMAGES = 8
_NUM_PICTURED = 1000


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. The fields without a description are options of the command.

    Attributes:
        source: Images to evaluate on.
        calibration: Images to fit a temperature on; None for cross-fitting on halves of the evaluated images.
        epsilons: Sizes of attacks, as fractions of the range of a pixel.
        pgd_step_size: Size of a step, as a fraction of the range of a pixel; None for 2.5 epsilon / steps, with which
            PGD can reach every point of the ball.
        outside: Sources of out-of-distribution images, and names of noises.
    """
    source: Source
    calibration: Source | None = None
    parts: tuple[str, ...] = PARTS
    epsilons: tuple[float, ...] = ()
    pgd_steps: int = 10
    pgd_step_size: float | None = None
    attack_loss: str = 'log-odds'
    outside: tuple[Source | str, ...] = ()
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
        values: Everything that is written to results.json, by section.
        pictures: Data of figures only: 'scores' of OOD detection, 'points' and 'classes' of the embeddings, 'images'
            and 'maps' of attention.
    """
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)


def _percent(hits: Sequence[torch.Tensor]) -> float:
    return 100 * torch.cat(list(hits)).double().mean().item()


class _Evaluation:
    """Evaluates one model.

    Raises:
        UsageError: if the images do not suit the model, or if the temperature would be fitted on the evaluated images.
    """

    def __init__(self, candidate: Candidate, settings: Settings, device: torch.device):
        self.candidate = candidate
        self.settings = settings
        self.device = device
        self.in_parts = InParts()
        self.images = self._images(settings.source, settings.max_images)
        self.sample = self.images.part(settings.sample)
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

    def _images(self, source: Source, limit: int | None, labelled: bool = True) -> Images:
        settings = self.settings
        return Images(source, self.candidate, settings.batch_size, settings.workers, limit, settings.seed, labelled)

    def run(self) -> Result:
        candidate = self.candidate
        result = Result(candidate.name, dict(
            origin=candidate.origin, weights=candidate.weights, input_size=list(candidate.data_config['input_size'])))
        logits, target = predict(candidate, self.images, self.in_parts, 'images')
        if len(bad := target[(target < 0) | (target >= candidate.num_classes)]):
            raise UsageError(
                f'Data {self.settings.source}: label {int(bad[0])} is not a class of {candidate.name}, whose classes '
                f'are 0 to {candidate.num_classes - 1}.')
        result.values.update(
            num_images=len(target),
            metrics=classification_metrics(logits, target),
            reliability=asdict(reliability(logits, target)),
            tempered=self._tempered(logits, target))
        parts = self.settings.parts
        if 'attacks' in parts:
            self._attacks(result)
        if 'corruptions' in parts:
            self._corruptions(result)
        if 'ood' in parts:
            self._ood(result, logits)
        if 'embeddings' in parts or 'between' in parts:
            self._embeddings_and_pairs(result)
        if 'attention' in parts:
            self._attention(result)
        return result

    def _tempered(self, logits: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        try:
            if self.calibration is None:
                tempered = cross_fit(logits, target, self.settings.seed)
            else:
                temperature = fit_temperature(*predict(self.candidate, self.calibration, self.in_parts, 'calibration'))
                tempered = Tempered(logits.double() / temperature, [temperature], str(self.calibration.source))
        except ValueError as error:
            _logger.warning(f'{self.candidate.name}: {error}')
            return dict(reason=str(error))
        metrics = classification_metrics(tempered.logits, target)
        return dict(
            temperatures=list(tempered.temperatures), fitted_on=tempered.fitted_on,
            **{name: metrics[name] for name in ('nll', 'brier', 'ece', 'adaptive_ece', 'classwise_ece')},
            reliability=asdict(reliability(tempered.logits, target)))

    def _accuracy(self, what: str, attack: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """Top-1 accuracy in percent on attacked images of the sample."""
        def correct(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self._is_correct(attack(images, target), target)

        hits = [
            self.in_parts(correct, images.to(self.device), target.to(self.device)).cpu()
            for images, target in progress(self.sample, f'{self.candidate.name}: {what}')]
        return _percent(hits)

    @torch.no_grad()
    def _is_correct(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.candidate.pixel_model(images).argmax(1) == target

    def _attacks(self, result: Result) -> None:
        settings, model, loss = self.settings, self.candidate.pixel_model, self.settings.attack_loss
        clean = self._accuracy('sample', lambda images, target: images)
        curves = dict(fgsm=[clean], pgd=[clean])
        step_sizes = [settings.pgd_step_size or 2.5 * epsilon / settings.pgd_steps for epsilon in settings.epsilons]
        for epsilon, step_size in zip(settings.epsilons, step_sizes, strict=True):
            shown = f'{epsilon * robustness.PIXEL_LEVELS:g}/{robustness.PIXEL_LEVELS}'
            torch.manual_seed(settings.seed)  # for the random start
            curves['fgsm'].append(self._accuracy(
                f'FGSM {shown}', lambda x, y, e=epsilon: robustness.fgsm(model, x, y, e, loss)))
            curves['pgd'].append(self._accuracy(
                f'PGD {shown}', lambda x, y, e=epsilon, s=step_size: robustness.pgd(
                    model, x, y, e, s, settings.pgd_steps, loss=loss)))
        result.values['attacks'] = dict(
            num_images=min(result.values['num_images'], settings.sample),
            loss=loss,
            epsilon_of_255=[0.0, *(epsilon * robustness.PIXEL_LEVELS for epsilon in settings.epsilons)],
            pgd_steps=settings.pgd_steps,
            pgd_step_size_of_255=[size * robustness.PIXEL_LEVELS for size in step_sizes],
            **curves)

    def _corruptions(self, result: Result) -> None:
        cells = [(kind, severity) for kind in corruptions.CORRUPTIONS for severity in corruptions.SEVERITIES]
        generators = {cell: torch.Generator('cpu').manual_seed(self.settings.seed) for cell in cells}
        clean = []
        hits: dict[tuple[str, int], list[torch.Tensor]] = {cell: [] for cell in cells}
        for images, target in progress(self.sample, f'{self.candidate.name}: corruptions'):
            target = target.to(self.device)
            clean.append(self.in_parts(self._is_correct, images.to(self.device), target).cpu())
            for cell in cells:
                corrupted = corruptions.corrupt(images, *cell, generators[cell]).to(self.device)
                hits[cell].append(self.in_parts(self._is_correct, corrupted, target).cpu())
        top1 = {
            kind: [_percent(hits[kind, severity]) for severity in corruptions.SEVERITIES]
            for kind in corruptions.CORRUPTIONS}
        accuracies = [accuracy for curve in top1.values() for accuracy in curve]
        result.values['corruptions'] = dict(
            num_images=sum(map(len, clean)), severities=list(corruptions.SEVERITIES), clean_top1=_percent(clean),
            mean_top1=sum(accuracies) / len(accuracies), top1=top1)

    def _noise(self, kind: str, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = tuple(self.candidate.data_config['input_size'])
        for images in ood.noise_batches(kind, count, size, self.settings.batch_size, self.settings.seed):
            yield images, torch.zeros(len(images), dtype=torch.long, device='cpu')

    def _ood(self, result: Result, logits: torch.Tensor) -> None:
        result.values['ood'], scores = {}, {}
        inside = {name: score(logits) for name, score in ood.SCORES.items()}
        for name, images in self.outside.items():
            batches = self._noise(images, len(logits)) if isinstance(images, str) else images
            outside_logits, _ = predict(self.candidate, batches, self.in_parts, name)
            scores[name] = {kind: score(outside_logits) for kind, score in ood.SCORES.items()}
            result.values['ood'][name] = dict(
                num_images=len(outside_logits),
                **{kind: ood.detection_metrics(inside[kind], scores[name][kind]) for kind in ood.SCORES})
        result.pictures['scores'] = dict(inside=inside, outside=scores)

    def _embeddings_and_pairs(self, result: Result) -> None:
        images, target = (torch.cat(parts) for parts in zip(*self.sample, strict=True))
        embed = Embedder(self.candidate, images[:2].to(self.device))
        parts = images.split(self.settings.batch_size)
        _, embeddings = embed.split(torch.cat([
            self.in_parts(embed, part.to(self.device)).cpu()
            for part in progress(parts, f'{self.candidate.name}: embeddings')]))
        if 'embeddings' in self.settings.parts:
            self._geometry(result, embeddings, target)
        if 'between' in self.settings.parts:
            self._between(result, embed, images, target, embeddings)

    def _geometry(self, result: Result, embeddings: torch.Tensor, target: torch.Tensor) -> None:
        ratio, by_class = geometry.compactness(embeddings, target)
        result.values['embeddings'] = dict(
            num_images=len(target),
            alignment=geometry.alignment(embeddings, target),
            uniformity=geometry.uniformity(embeddings),
            compactness=ratio,
            compactness_of_classes=by_class)
        if len(target) > 3:
            shown = choose(range(len(target)), _NUM_PICTURED, self.settings.seed) or slice(None)
            result.pictures.update(
                points=geometry.project(embeddings[shown], self.settings.seed), classes=target[shown])

    def _between(
            self, result: Result, embed: Embedder, images: torch.Tensor, target: torch.Tensor,
            embeddings: torch.Tensor) -> None:
        pairs = between.sample_pairs(target, len(target), self.settings.seed)
        if not len(pairs):
            return
        targets = target[pairs]
        confidence: list[torch.Tensor] = []
        entropy: list[torch.Tensor] = []
        counts = dict(misses=0, intrusions_of_images=0, intrusions_of_embeddings=0)
        for share in progress(between.SHARES, f'{self.candidate.name}: mixed images'):
            logits, mixed = embed.split(torch.cat([
                self.in_parts(embed, between.mix(*(images[part].to(self.device) for part in some.T), share=share)).cpu()
                for some in pairs.split(self.settings.batch_size)]))
            for values, value in zip((confidence, entropy), between.confidence_and_entropy(logits), strict=True):
                values.append(value)
            if 0 < share < 1:  # at the ends are the images themselves
                of_embeddings = between.mix(embeddings[pairs[:, 0]], embeddings[pairs[:, 1]], share)
                counts['misses'] += between.count_misses(logits, targets)
                counts['intrusions_of_images'] += between.count_intrusions(mixed, targets, embeddings, target)
                counts['intrusions_of_embeddings'] += between.count_intrusions(
                    of_embeddings, targets, embeddings, target)
        num_mixes = (len(between.SHARES) - 2) * len(pairs)
        result.values['between'] = dict(
            num_pairs=len(pairs), num_mixes=num_mixes, shares=list(between.SHARES), confidence=confidence,
            entropy=entropy,
            mean_confidence=sum(confidence[1:-1]) * len(pairs) / num_mixes,
            mean_entropy=sum(entropy[1:-1]) * len(pairs) / num_mixes,
            **counts, **{f'{name}_percent': 100 * count / num_mixes for name, count in counts.items()})

    @torch.no_grad()
    def _attention(self, result: Result) -> None:
        model = self.candidate.model
        images, _ = next(iter(self.images.part(_NUM_ATTENTION_IMAGES)))
        normalised = self.candidate.pixel_model.normalise(images[:_NUM_ATTENTION_IMAGES].to(self.device))
        try:
            head = find_head(model)
            streams = position_features(head, model.forward_features(normalised), normalised.shape[-2:])
            features = torch.cat([s for s, lay in zip(streams, head.layouts, strict=True) if lay.has_positions], dim=-1)
        except (TypeError, ValueError, AttributeError) as error:
            _logger.info(f'{self.candidate.name}: no attention maps. {error}')
            return
        maps = attention_map(features).unflatten(1, grid_size(features.shape[1], normalised.shape[-2:]))
        result.pictures.update(images=images[:_NUM_ATTENTION_IMAGES], maps=maps.cpu())


def evaluate_models(candidates: Sequence[Candidate], settings: Settings, device: torch.device) -> Iterator[Result]:
    """Evaluate models one after the other, each on the device. The images of all models are checked first.

    Raises:
        UsageError: if the images do not suit a model.
    """
    for evaluation in [_Evaluation(candidate, settings, device) for candidate in candidates]:
        pixel_model = evaluation.candidate.pixel_model.to(device)
        try:
            yield evaluation.run()
        finally:
            pixel_model.to('cpu')
