"""Calibration: one temperature, fitted on held-out data and folded into the last affine layer of a classifier.

A model trained on interpolations can be right and yet too sure of itself, or not sure enough. Dividing its logits by
one number mends that and changes no prediction (Guo et al., On Calibration of Modern Neural Networks, 2017). The
division is done once, in the weights: the calibrated model is the same architecture, with other values in its
classifier.
"""
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from .dense.heads import mean_of_heads

_logger = logging.getLogger(__name__)

# Temperatures are looked for between the spread of the logits divided and multiplied by this.
_WIDEST = 1e4
# Factors on the classifier that the logits must follow, and how closely: as the model's number format allows.
_TRIED_FACTORS = (0.5, 3.0)
_TOLERANCE = 1e-4
_ROUNDINGS = 8


def _slope(inverse: float, logits: np.ndarray, target: np.ndarray) -> float:
    """Derivative of the mean cross-entropy of inverse * logits with respect to inverse; it never falls."""
    scaled = logits * inverse
    probabilities = np.exp(scaled - scaled.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    return float(((probabilities - target) * logits).sum(1).mean())


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in at least float32. Not in float64, which not every device has."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of softmax(logits / T), in float64.

    The loss is convex in 1 / T, so there is one minimum. If every image is classified correctly there is none: any
    temperature is beaten by a lower one. Then the rule of succession stands in for the mistake that was not seen: the
    model may be right with probability (n + 1) / (n + 2), and the rest is shared by the other classes.

    Args:
        logits: Logits (n, c).
        target: Class indices (n,) or probabilities of classes (n, c).

    Returns:
        The temperature.

    Raises:
        ValueError: if shapes do not fit or values are not finite, or if no positive temperature is best, because the
            logits say nothing about the target.
    """
    from scipy.optimize import brentq  # slow to import, for something that most runs do once or never

    if logits.ndim != 2 or logits.shape[1] < 2 or len(target) != len(logits) or not len(logits):
        raise ValueError(
            f'A temperature is fitted to logits (n, c) of two classes or more and target (n,) or (n, c), got shapes '
            f'{tuple(logits.shape)} and {tuple(target.shape)}.')
    logits, target = logits.detach().cpu(), target.detach().cpu()
    if not logits.isfinite().all():
        raise ValueError('Logits that are not finite have no temperature.')
    num_images, num_classes = logits.shape
    if target.ndim == 1 and not 0 <= target.min() <= target.max() < num_classes:
        raise ValueError(
            f'Targets are class indices from 0 to {num_classes - 1}, got {target.min()} to {target.max()}.')
    # In NumPy, since not every device has float64.
    logits = _wide(logits).numpy().astype(np.float64)
    target = _wide(target).numpy().astype(np.float64) if target.ndim == 2 else np.eye(num_classes)[target.numpy()]
    logits -= logits.mean(1, keepdims=True)  # changes nothing, and keeps the numbers small
    spread = logits.std(ddof=1).item()
    if _slope(0.0, logits, target) >= 0:
        raise ValueError(
            f'No temperature fits: the logits say nothing about the targets of these {num_images} images. Are the '
            'labels those of the model?')
    if _slope(_WIDEST / spread, logits, target) <= 0:
        mistakes = 1 / (num_images + 2)
        target = target * (1 - mistakes) + (1 - target) * (mistakes / (num_classes - 1))
    return 1 / brentq(_slope, 0.0, _WIDEST / spread, args=(logits, target), xtol=1e-12 / spread, rtol=1e-12)


def _is_affine(module: nn.Module, output: Any) -> bool:
    return isinstance(output, torch.Tensor) and isinstance(getattr(module, 'weight', None), torch.Tensor)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Within the context, the model is in evaluation mode; then every module has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    logits = mean_of_heads(model(images))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ValueError(f'{type(model).__name__} does not give logits (b, c): create it with a classifier.')
    return logits


@torch.enable_grad()
def last_layers(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the modules with a weight whose output reaches the logits without passing another one.

    That is the classifier: one layer, or several in a model with two heads, or with one for each of its streams. They
    are found by running the model on images and following the logits back through autograd's graph.

    Args:
        model: A classifier; its mode and its gradients stay as they are.
        images: Images that it takes, one or more.

    Returns:
        Names of the modules, in the order of model.named_modules(). Empty if there are none, as in a model that
        torch.jit has scripted.
    """
    names = {}

    def record(module: nn.Module, _, output: Any, name: str) -> None:
        if _is_affine(module, output) and output.grad_fn is not None:
            names[output.grad_fn] = name

    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return []
    handles = [
        module.register_forward_hook(lambda *call, name=name: record(*call, name=name))
        for name, module in model.named_modules() if name]
    try:
        with _evaluation(model):
            logits = _logits(model, images.detach().clone().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    found, seen, waiting = set(), set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in names:
            found.add(names[node])
        elif node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return [name for name, _ in model.named_modules() if name in found]


def _affine_names(module: nn.Module) -> list[str]:
    return [name for name in ('weight', 'bias') if getattr(module, name, None) is not None]


@torch.no_grad()
def _multiply(modules: list[nn.Module], factor: float) -> None:
    """Multiply weight and bias of the modules, each tensor once. A parametrised one goes through its right inverse."""
    done = set()
    for module in modules:
        for name in _affine_names(module):
            value = getattr(module, name)
            if parametrize.is_parametrized(module, name):
                setattr(module, name, value * factor)
            elif id(value) not in done:
                done.add(id(value))
                value.mul_(factor)


@contextmanager
def _keeping(modules: list[nn.Module]) -> Iterator[None]:
    """After the context, the modules hold to the bit what they held before."""
    state = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, state, strict=True):
            module.load_state_dict(before)


def _follow(model: nn.Module, modules: list[nn.Module], images: torch.Tensor) -> bool:
    """Whether the logits are multiplied when the modules are, with other values in them than the present ones too."""
    generator = torch.Generator('cpu').manual_seed(0)
    with _keeping(modules):
        for module in modules:  # a classifier that starts at zero would follow anything
            for name in _affine_names(module):
                value = getattr(module, name)
                noise = torch.randn(value.shape, generator=generator, device='cpu').to(value)
                noise = noise * value.std(correction=0).clamp_min(value[0].numel() ** -0.5)
                if parametrize.is_parametrized(module, name):
                    setattr(module, name, value + noise)
                else:
                    value.add_(noise)
        expected = _wide(_logits(model, images))
        tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)
        factors_so_far = 1.0
        for factor in _TRIED_FACTORS:
            _multiply(modules, factor / factors_so_far)
            factors_so_far = factor
            error = (_wide(_logits(model, images)) / factor - expected).abs().max()
            if not error <= tolerance * expected.abs().max():
                return False
    return True


def _check_untied(model: nn.Module, names: list[str]) -> None:
    modules = {model.get_submodule(name) for name in names}
    own = {id(parameter): name for name in names for parameter in model.get_submodule(name).parameters()}
    for name, module in model.named_modules():
        is_part = any(name == other or name.startswith(f'{other}.') for other in names)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in own and module not in modules and not is_part:
                raise ValueError(
                    f'The classifier {own[id(parameter)]!r} shares a parameter with {f"{name}.{key}".lstrip(".")!r}, '
                    'which a temperature would change too: give the classifier parameters of its own.')


@torch.no_grad()
def scalable_classifier(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the layers that have to be multiplied for the logits to be multiplied.

    Args:
        model: A classifier; nothing of it is changed.
        images: A few images that it takes.

    Returns:
        Names of modules with a weight and perhaps a bias.

    Raises:
        ValueError: if there are none, with the reason: something that is no multiplication follows the last affine
            layer, its weight is normalised before use, or it is shared with another part of the model.
    """
    names = last_layers(model, images)
    kind = type(model).__name__
    if not names:
        raise ValueError(
            f'{kind} shows no layer that its logits come from. Calibrate the model itself, before it is compiled with '
            'torch.compile or torch.jit.')
    _check_untied(model, names)
    with _evaluation(model), torch.autocast(images.device.type, enabled=False):
        modules = [model.get_submodule(name) for name in names]
        try:
            follows = _follow(model, modules, images)
        except NotImplementedError as error:  # a parametrisation without right inverse
            raise ValueError(
                f'The classifier {", ".join(names)} of {kind} has a parametrisation that cannot be set.') from error
    if not follows:
        raise ValueError(
            f'The logits of {kind} are not proportional to its last affine layer ({", ".join(names[:5])}'
            f'{", ..." if len(names) > 5 else ""}), so that a temperature cannot be folded into it: there is an '
            'activation or another constant behind it, or its weight is normalised before use. Divide the logits '
            'themselves by the temperature that fit_temperature gives.')
    return names


@torch.no_grad()
def fold_temperature(model: nn.Module, temperature: float, images: torch.Tensor) -> None:
    """Divide a model's logits by a temperature, in the weights of its last affine layer.

    Args:
        model: A classifier, changed in place.
        temperature: Positive number.
        images: A few images that the model takes, to find its last layer with.

    Raises:
        ValueError: if the temperature is not positive, or the model has no layer for it; the model is then as it was.
    """
    if not 0 < temperature < float('inf'):
        raise ValueError(f'A temperature is a positive number, got {temperature}.')
    names = scalable_classifier(model, images)
    _multiply([model.get_submodule(name) for name in names], 1 / temperature)


@torch.no_grad()
def collect_logits(
        model: nn.Module,
        loader: Iterable,
        description: str = 'Logits',
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and targets of everything in a loader, in evaluation mode.

    Args:
        model: A classifier.
        loader: Batches (images, target, ...), as the model takes them.
        description: Of the progress bar, shown on a terminal.

    Returns:
        Logits (n, c) in float32 or float64 and targets, both on the CPU, and the first two images.

    Raises:
        ValueError: if the loader is empty.
    """
    device = next(model.parameters()).device
    outputs, targets, example = [], [], None
    with _evaluation(model):
        for images, target, *_ in tqdm(loader, desc=description, leave=False, disable=None):
            images = images.to(device)
            example = images[:2].clone() if example is None else example
            logits = _logits(model, images)
            outputs.append(_wide(logits).cpu())
            targets.append(torch.as_tensor(target, device='cpu'))
    if example is None:
        raise ValueError('There are no images to calibrate on.')
    return torch.cat(outputs), torch.cat(targets), example


def calibrate(model: nn.Module, loader: Iterable) -> float:
    """Fit one temperature on held-out data and fold it into the model's last affine layer.

    Afterwards the model gives its former logits divided by the temperature, from the same code: its state_dict is a
    plain checkpoint of the same architecture. The order of the logits stays, and with it accuracy (in half precision,
    where dividing the weights rounds them, all but ties). Works for one classifier or several whose logits are added,
    averaged or the maximum taken of, linear or convolutional; in any PyTorch model.

    Args:
        model: A classifier, changed in place. A wrapper for distribution or compilation is looked through.
        loader: Batches (images, target) that the model was not trained on, nor will be judged by; images as the model
            takes them, class indices (b,) or probabilities (b, c).

    Returns:
        The temperature: above 1 the model was too sure, below 1 not sure enough.

    Raises:
        ValueError: if no temperature fits or none can be folded in, with the reason; the model is then as it was.
    """
    model = unwrap_model(model)
    logits, target, images = collect_logits(model, loader, 'Calibrating')
    temperature = fit_temperature(logits, target)
    names = scalable_classifier(model, images)
    _multiply([model.get_submodule(name) for name in names], 1 / temperature)
    _logger.debug(f'Temperature {temperature:.6g} folded into {", ".join(names)}.')
    return temperature
