"""Temperature scaling of a classifier (Guo et al., On Calibration of Modern Neural Networks, 2017).

The temperature is fitted on held-out data and folded into the weights of the last affine layer. The architecture and
the predicted classes do not change.
"""
import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from ..dense.heads import watching
from ..dense.positions import mean_of_heads

# Limit of the ratio between the standard deviation of the logits and the temperature.
_MAX_RATIO = 1e4
# Factor on the parameters of a classifier, to test whether its logits are proportional to them. A power of 2, because
# products that round their operands, such as TF32 on a GPU, round 3 * weight differently.
_TEST_FACTOR = 4.0
# Relative tolerance of the test, at least _ROUNDINGS times the machine epsilon of the model's dtype.
_TOLERANCE = 1e-4
_ROUNDINGS = 8


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Cast to at least float32. Some devices do not support float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Fit the temperature T that minimizes the mean cross-entropy of softmax(logits / T), in float64.

    The loss is convex in 1 / T. If every image is classified correctly, it has no minimum: a lower temperature is
    always better. The targets are then smoothed by the rule of succession. The true class has probability
    (n + 1) / (n + 2), and the other classes share the rest.

    Args:
        logits: Logits (n, c).
        target: Class indices (n,) or class probabilities (n, c).

    Returns:
        The temperature.

    Raises:
        ValueError: If shapes do not match, values are not finite, or no positive temperature minimizes the loss,
            because the logits do not predict the target.
    """
    from scipy.optimize import brentq  # slow to import

    if logits.ndim != 2 or logits.shape[1] < 2 or len(target) != len(logits) or not len(logits):
        raise ValueError(
            'fit_temperature expects logits (n, c) of two or more classes and target (n,) or (n, c), got shapes '
            f'{tuple(logits.shape)} and {tuple(target.shape)}.')
    logits, target = logits.detach().cpu().double(), target.detach().cpu()
    if not logits.isfinite().all():
        raise ValueError('The temperature cannot be fitted: the logits are not finite.')
    num_images, num_classes = logits.shape
    if target.ndim == 1:
        if target.is_floating_point() or not 0 <= target.min() <= target.max() < num_classes:
            raise ValueError(
                f'Targets must be class indices from 0 to {num_classes - 1}, got {target.dtype} from {target.min()} to '
                f'{target.max()}.')
        target = F.one_hot(target.long(), num_classes)
    elif target.shape != logits.shape or not (target.min() >= 0 and (target.double().sum(1) - 1).abs().max() < 1e-3):
        raise ValueError(
            f'Targets must be class indices (n,), or class probabilities {tuple(logits.shape)} that sum to 1, got '
            f'shape {tuple(target.shape)}.')
    target = target.double()
    logits = logits - logits.mean(1, keepdim=True)  # softmax is invariant to it

    def slope(inverse: float) -> float:
        """Return the derivative of the mean cross-entropy of inverse * logits with respect to inverse."""
        return (((inverse * logits).softmax(1) - target) * logits).sum(1).mean().item()

    if slope(0.0) >= 0:
        raise ValueError(
            f'The temperature cannot be fitted: the logits do not predict the targets of these {num_images} images. '
            'Check that the labels and the class order match the model.')
    spread = logits.std().item()
    if slope(_MAX_RATIO / spread) <= 0:
        error_rate = 1 / (num_images + 2)
        target = target * (1 - error_rate) + (1 - target) * (error_rate / (num_classes - 1))
    return 1 / brentq(slope, 0.0, _MAX_RATIO / spread, xtol=1e-12 / spread, rtol=1e-12)


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    logits = mean_of_heads(model(images))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or getattr(model, 'num_classes', None) == 0:
        raise ValueError(f'{type(model).__name__} does not return logits (b, c): create it with a classifier.')
    return logits


@torch.enable_grad()
def last_layers(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the names of the last modules with a weight before the logits, in the order of model.named_modules().

    Usually this is the classifier. There are several modules if the model has several heads or streams. The model, in
    evaluation mode, runs on the images, and the autograd graph is traversed from the logits.
    """
    names = {}

    def record(name: str, module: nn.Module, output: Any) -> None:
        has_weight = isinstance(getattr(module, 'weight', None), torch.Tensor)
        if has_weight and isinstance(output, torch.Tensor) and output.grad_fn is not None:
            names[output.grad_fn] = name

    with watching(model, record):
        logits = _logits(model, images.detach().clone().requires_grad_())
    found, seen, waiting = set(), set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in names:
            found.add(names[node])
        elif node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return [name for name, _ in model.named_modules() if name in found]


def _multiply(model: nn.Module, names: Iterable[str], factor: float) -> None:
    """Multiply the weights and biases of modules by a factor. A shared parameter is multiplied once."""
    modules = [model.get_submodule(name) for name in names]
    values = [(module, name, getattr(module, name, None)) for module in modules for name in ('weight', 'bias')]
    unique = {id(value): (module, name, value) for module, name, value in values if isinstance(value, torch.Tensor)}
    for module, name, value in unique.values():
        if parametrize.is_parametrized(module, name):
            setattr(module, name, value * factor)  # by right_inverse
        else:
            value.mul_(factor)


@torch.no_grad()
def scalable_classifier(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the names of the layers that the logits are proportional to.

    Raises:
        ValueError: If there are no such layers, because the last affine layer is followed by an operation other than
            scaling, or its weight is normalized to a fixed norm.
    """
    is_scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    kind, twin = type(model).__name__, copy.deepcopy(model).eval()
    names = [] if is_scripted else last_layers(twin, images)
    if not names:
        raise ValueError(
            f'The last layer of {kind} was not found. Calibrate the model before it is compiled with torch.compile or '
            'torch.jit.')
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)
    is_proportional = False
    with torch.autocast(images.device.type, enabled=False), suppress(NotImplementedError):  # without right_inverse
        expected = _wide(_logits(twin, images))
        _multiply(twin, names, _TEST_FACTOR)
        error = (_wide(_logits(twin, images)) / _TEST_FACTOR - expected).abs().max()
        is_proportional = bool(error <= tolerance * expected.abs().max())
    if not is_proportional:
        raise ValueError(
            f'The logits of {kind} are not proportional to its last affine layer ({", ".join(names[:5])}'
            f'{", ..." if len(names) > 5 else ""}), so the temperature cannot be folded into it: an activation or a '
            'constant follows the layer, or its weight is normalized. Divide the logits by the temperature of '
            'fit_temperature instead.')
    return names


@torch.no_grad()
def fold_temperature(model: nn.Module, temperature: float, images: torch.Tensor) -> None:
    """Divide the weights of a model's last affine layer by a temperature, in place. The images are used to find it.

    Raises:
        ValueError: If the temperature is not positive, or the logits are not proportional to the last affine layer.
            The model is then not changed.
    """
    if not 0 < temperature < float('inf'):
        raise ValueError(f'The temperature must be a positive number, got {temperature}.')
    _multiply(model, scalable_classifier(model, images), 1 / temperature)


@torch.no_grad()
def collect_logits(model: nn.Module, loader: Iterable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the logits of all images of a loader, in evaluation mode.

    Returns:
        Logits (n, c) in float32 or float64 and targets, both on the CPU, and the first two images.
    """
    device, model = next(model.parameters()).device, copy.deepcopy(model).eval()
    outputs, targets, example = [], [], None
    for images, target, *_ in tqdm(loader, desc='Calibrating', leave=False, disable=None):
        images = images.to(device)
        example = images[:2].clone() if example is None else example
        outputs.append(_wide(_logits(model, images)).cpu())
        targets.append(torch.as_tensor(target, device='cpu'))
    if example is None:
        raise ValueError('There are no images to calibrate on.')
    return torch.cat(outputs), torch.cat(targets), example


def calibrate(model: nn.Module, loader: Iterable) -> float:
    """Fit a temperature on held-out data and fold it into the model's last affine layer.

    Afterwards the model returns its previous logits divided by the temperature. The state_dict has the same entries as
    before. The order of the logits and the accuracy do not change, except for ties caused by rounding in half
    precision. Any PyTorch model is supported whose logits come from a linear or convolutional classifier, or from the
    sum, the mean or the maximum of several classifiers.

    Args:
        model: A classifier, changed in place. Wrappers for compilation and distribution are removed.
        loader: Loader of batches (images, target). The images should be used neither for training nor for evaluation.
            Targets are class indices (b,) or class probabilities (b, c).

    Returns:
        The temperature. It is above 1 for an overconfident model and below 1 for an underconfident model.

    Raises:
        ValueError: If the temperature cannot be fitted or folded. The message gives the reason. The model is then not
            changed.
    """
    model = unwrap_model(model)
    logits, target, images = collect_logits(model, loader)
    temperature = fit_temperature(logits, target)
    fold_temperature(model, temperature, images)
    return temperature
