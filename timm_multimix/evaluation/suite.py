"""All measurements of a model."""
import argparse
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
from ..dense.positions import grid_size
from . import geometry, ood
from .images import Images, predict, progress
from .metrics import classification_metrics, cross_fit, reliability
from .models import Candidate
from .robustness import CORRUPTIONS, PIXEL_LEVELS, SEVERITIES, corrupt, fgsm, pgd

_logger = logging.getLogger(__name__)

PARTS = ('attacks', 'corruptions', 'ood', 'embeddings', 'between', 'attention')
_NUM_ATTENTION_IMAGES = 8
_NUM_PICTURED = 1000


@dataclass
class Result:
    """Measurements of a model.

    Attributes:
        values: Content of results.json, by section.
        pictures: Data of figures only: 'scores' of OOD detection, 'points' and 'classes' of the embeddings, 'images'
            and 'maps' of attention.
    """
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)


class _Evaluation:
    """Evaluation of one model. See evaluate_models for the arguments.

    Raises:
        UsageError: if the images do not suit the model, or if the temperature would be fitted on the evaluated images.
    """

    def __init__(self, candidate: Candidate, args: argparse.Namespace, device: torch.device):
        self.candidate = candidate
        self.args = args
        self.device = device
        if (count := getattr(candidate.model, 'num_classes', 0)) < 2:
            raise UsageError(
                f'{candidate.origin}: the model has {count} classes, but evaluation needs two or more.')
        self.images = Images(args.source, candidate, args, args.max_images)
        self.calibration = None
        if args.calibration is not None:
            self.calibration = Images(args.calibration, candidate, args)
            if share_images(self.calibration.dataset, self.images.dataset):
                raise UsageError(
                    f'--calibration-split {args.calibration_split}: these are the images that are evaluated. Leave '
                    'out the option to fit the temperature of each half of the images on the other half.')
        self.outside: dict[str, Images | str] = {
            str(source): source if isinstance(source, str) else Images(source, candidate, args, args.max_images, False)
            for source in args.outside if 'ood' in args.parts}

    def run(self) -> Result:
        """Measure the model. If memory does not suffice, try again with half of the batch size."""
        self.candidate.model.to(self.device)
        try:
            return self._measure()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and 'allocate memory' not in str(error):
                raise
            if self.args.batch_size == 1:
                raise UsageError(f'There is not enough memory for one image: {error}') from error
        finally:
            self.candidate.model.to('cpu')
        # Outside the handler, because the exception keeps the tensors of the failed call alive.
        self.args.batch_size //= 2
        _logger.warning(f'{self.candidate.name}: out of memory. Next batch size: {self.args.batch_size}.')
        return self.run()

    def _measure(self) -> Result:
        candidate, parts = self.candidate, self.args.parts
        logits, target = predict(candidate, self.images, 'images')
        if len(bad := target[(target < 0) | (target >= logits.shape[1])]):
            raise UsageError(
                f'Data {self.args.source}: label {int(bad[0])} is not a class of {candidate.name}, which has the '
                f'classes 0 to {logits.shape[1] - 1}.')
        result = Result(candidate.name, dict(
            origin=candidate.origin, weights=candidate.weights, input_size=list(candidate.data_config['input_size']),
            num_images=len(target), metrics=classification_metrics(logits, target),
            reliability=reliability(logits, target), tempered=self._tempered(logits, target)))
        if self.outside:
            self._ood(result, logits)
        if {'attacks', 'corruptions', 'embeddings', 'between'} & set(parts):
            sample = [torch.cat(batches) for batches in zip(*self.images.part(self.args.sample), strict=True)]
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
                logits, temperatures = cross_fit(logits, target, self.args.seed)
            else:
                fitted_on = str(self.calibration.source)
                temperatures = [fit_temperature(*predict(self.candidate, self.calibration, 'calibration'))]
                logits = logits.double() / temperatures[0]
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
        parts = [[part.cpu() for part in self.candidate.embed(batch.to(self.device))] for batch in batches]
        logits, embeddings = map(torch.cat, zip(*parts, strict=True))
        return logits, embeddings

    def _accuracy(
            self, what: str, images: torch.Tensor, target: torch.Tensor,
            change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None) -> float:
        """Return the top-1 accuracy in percent, after change(images, target) of each batch on the device."""
        hits = []
        batches = list(zip(images.split(self.args.batch_size), target.split(self.args.batch_size), strict=True))
        for batch, labels in progress(batches, f'{self.candidate.name}: {what}'):
            batch, labels = batch.to(self.device), labels.to(self.device)
            batch = change(batch, labels) if change else batch
            with torch.no_grad():
                hits.append((self.candidate(batch).argmax(1) == labels).cpu())
        return 100 * torch.cat(hits).double().mean().item()

    def _attacks(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        args, model, loss = self.args, self.candidate, self.args.attack_loss
        clean = self._accuracy('sample', images, target)
        curves = dict(fgsm=[clean], pgd=[clean])
        # By default PGD can reach every point of the ball.
        step_sizes = [args.pgd_step or 2.5 * epsilon / args.pgd_steps for epsilon in args.eps]
        for epsilon, step_size in zip(args.eps, step_sizes, strict=True):
            shown = f'{epsilon * PIXEL_LEVELS:g}/{PIXEL_LEVELS}'
            torch.manual_seed(args.seed)  # for the random start
            for name, attack in dict(
                    fgsm=partial(fgsm, model, epsilon=epsilon, loss=loss),
                    pgd=partial(pgd, model, epsilon=epsilon, step_size=step_size, num_steps=args.pgd_steps,
                                loss=loss)).items():
                curves[name].append(self._accuracy(f'{name.upper()} {shown}', images, target, attack))
        return dict(
            num_images=len(target),
            loss=loss,
            epsilon_of_255=[0.0, *(epsilon * PIXEL_LEVELS for epsilon in args.eps)],
            pgd_steps=args.pgd_steps,
            pgd_step_size_of_255=[size * PIXEL_LEVELS for size in step_sizes],
            **curves)

    def _corrupted_accuracy(self, kind: str, severity: int, images: torch.Tensor, target: torch.Tensor) -> float:
        generator = torch.Generator('cpu').manual_seed(self.args.seed)
        return self._accuracy(
            f'{kind} {severity}', images, target, lambda batch, _: corrupt(batch, kind, severity, generator))

    def _corruptions(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        top1 = {kind: [self._corrupted_accuracy(kind, severity, images, target) for severity in SEVERITIES]
                for kind in CORRUPTIONS}
        return dict(
            num_images=len(target), severities=list(SEVERITIES), clean_top1=self._accuracy('sample', images, target),
            mean_top1=fmean(accuracy for curve in top1.values() for accuracy in curve), top1=top1)

    def _ood(self, result: Result, logits: torch.Tensor) -> None:
        args = self.args
        result.values['ood'], scores = {}, {}
        inside = {name: score(logits) for name, score in ood.SCORES.items()}
        for name, images in self.outside.items():
            batches = images if isinstance(images, Images) else ood.noise_batches(
                images, len(logits), self.candidate.data_config['input_size'], args.batch_size, args.seed)
            outside_logits, _ = predict(self.candidate, batches, name)
            scores[name] = {kind: score(outside_logits) for kind, score in ood.SCORES.items()}
            result.values['ood'][name] = dict(
                num_images=len(outside_logits),
                **{kind: ood.detection_metrics(inside[kind], scores[name][kind]) for kind in ood.SCORES})
        result.pictures['scores'] = dict(inside=inside, outside=scores)

    def _embeddings_and_pairs(self, result: Result, images: torch.Tensor, target: torch.Tensor) -> None:
        parts = images.split(self.args.batch_size)
        _, embeddings = self._embed(progress(parts, f'{self.candidate.name}: embeddings'))
        if 'embeddings' in self.args.parts:
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
                    points=geometry.project(embeddings[::step], self.args.seed), classes=target[::step])
        pairs = geometry.sample_pairs(target, len(target), self.args.seed)
        if 'between' in self.args.parts and len(pairs):
            result.values['between'] = self._between(images, target, embeddings, pairs)

    def _between(
            self, images: torch.Tensor, target: torch.Tensor, embeddings: torch.Tensor, pairs: torch.Tensor,
    ) -> dict[str, Any]:
        targets = target[pairs]
        curve, counts = [], dict(misses=0, intrusions_of_images=0, intrusions_of_embeddings=0)
        nearest = partial(geometry.nearest_classes, embeddings=embeddings, target=target)
        for share in progress(geometry.SHARES, f'{self.candidate.name}: mixed images'):
            logits, mixed = self._embed(
                torch.lerp(images[part[:, 1]], images[part[:, 0]], share)
                for part in pairs.split(self.args.batch_size))
            curve.append(geometry.confidence_and_entropy(logits))
            if 0 < share < 1:  # otherwise the mixes are the images themselves
                mixed_embeddings = torch.lerp(embeddings[pairs[:, 1]], embeddings[pairs[:, 0]], share)
                for name, classes in dict(
                        misses=logits.argmax(1), intrusions_of_images=nearest(mixed),
                        intrusions_of_embeddings=nearest(mixed_embeddings)).items():
                    counts[name] += geometry.count_third_class(classes, targets)
        num_mixes = (len(geometry.SHARES) - 2) * len(pairs)
        confidence, entropy = map(list, zip(*curve, strict=True))
        return dict(
            num_pairs=len(pairs), num_mixes=num_mixes, shares=list(geometry.SHARES), confidence=confidence,
            entropy=entropy, mean_confidence=fmean(confidence[1:-1]), mean_entropy=fmean(entropy[1:-1]),
            **counts, **{f'{name}_percent': 100 * count / num_mixes for name, count in counts.items()})

    @torch.no_grad()
    def _attention(self, result: Result) -> None:
        images, _ = next(iter(self.images.part(_NUM_ATTENTION_IMAGES)))
        model = self.candidate.model
        try:
            with attach(model), outputs_in_evaluation(model):
                attention = model(self.candidate.normalize(images.to(self.device))).attention
        except (TypeError, ValueError, AttributeError) as error:
            _logger.info(f'{self.candidate.name}: no attention maps. {error}')
            return
        maps = attention.unflatten(1, grid_size(attention.shape[1], images.shape[-2:]))
        result.pictures.update(images=images, maps=maps.cpu())


def evaluate_models(
        candidates: Sequence[Candidate], args: argparse.Namespace, device: torch.device) -> Iterator[Result]:
    """Evaluate models one after the other on the device. The images of all models are checked first.

    `args` contains the options of the command and sources of images: `source` to evaluate on; `calibration` to fit a
    temperature on, None for cross-fitting on halves of the evaluated images; `outside`, sources of out-of-distribution
    images and names of noises.

    Raises:
        UsageError: if the images do not suit a model.
    """
    for evaluation in [_Evaluation(candidate, args, device) for candidate in candidates]:
        yield evaluation.run()
