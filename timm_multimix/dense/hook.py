"""Attach MultiMix to a timm model, so that it returns a MultiMixOutput in training mode."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from ..losses.attention import attention_map, check_attention
from ..losses.module import MultiMixOutput
from .head_norm import restore_batch_norms, set_phase, swap_batch_norms
from .heads import find_head
from .positions import Features, Head, as_streams, mean_of_heads, position_features, position_logits
from .swapping import restore_class, swap_class

ATTACH_MODES = ('pooled', 'dense')


@dataclass(eq=False)
class _Settings:
    """Options of attach and the description of the head, stored as one attribute of the model."""
    mode: str
    attention: str
    attention_norm: str
    head: Head | None
    enabled: bool = True
    in_evaluation: bool = False


@dataclass
class _ForwardPass:
    """State of one dense forward pass, stored as an attribute of the model during the pass."""
    image_size: Sequence[int] | None
    last_map: torch.Tensor | None = None  # for models whose forward_features returns class tokens only
    prediction: torch.Tensor | tuple[torch.Tensor, ...] | None = None  # output of forward_head
    dense: tuple[torch.Tensor, torch.Tensor | None] | None = None  # logits at every position, and attention


class _MultiMixModel:
    """Mixin for an attached model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _MultiMixModel):  # a wrapper can call this method after the model was detached
            return type(self).forward(self, *args, **kwargs)
        settings = self._multimix
        if not ((self.training and settings.enabled) or settings.in_evaluation):
            return super().forward(*args, **kwargs)
        if settings.mode == 'pooled':
            return MultiMixOutput(_checked_logits(self, super().forward(*args, **kwargs)))
        if not settings.head.belongs_to(self):
            _inspect_again(self, settings)
        batch_norms = settings.head.batch_norms
        self._multimix_pass = _ForwardPass(_image_size(*args))
        try:
            set_phase(self, batch_norms, 'record')
            return _with_prediction(self, super().forward(*args, **kwargs))
        finally:
            set_phase(self, batch_norms, None)
            del self._multimix_pass

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        current = self.__dict__.get('_multimix_pass')
        if current is None or self._multimix.head.map_norm is None:
            return super().forward_features(*args, **kwargs)
        features, maps = self.forward_intermediates(*args, indices=1, **kwargs)
        current.last_map = maps[-1]
        return features

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        prediction = super().forward_head(*args, **kwargs)
        current = self.__dict__.get('_multimix_pass')
        if current is not None and current.prediction is None:
            features, *others = [value for value in (*args, *kwargs.values()) if value is not None]
            masks = [value for value in others if isinstance(value, torch.Tensor)]
            if len(masks) > 1:
                raise ValueError(
                    'Dense MultiMix supports one tensor besides the features in forward_head, the mask of valid '
                    f"positions (b, r), got {len(masks)}: attach with mode='pooled'.")
            current.prediction = prediction  # first, because the logits at positions come from forward_head too
            current.dense = _dense_logits_and_attention(self, features, *masks)
        return prediction


def _image_size(*args: Any) -> Sequence[int] | None:
    is_image = args and isinstance(args[0], torch.Tensor) and args[0].ndim == 4
    return args[0].shape[-2:] if is_image else None


def _checked_logits(model: nn.Module, output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) and not hasattr(model, 'distilled_training'):
        raise ValueError(
            f'MultiMix requires logits (b, c), and {type(model).__name__} returned a {type(output).__name__}: return '
            'only the logits in training mode.')
    logits = mean_of_heads(output)
    if logits.ndim != 2:
        raise ValueError(
            f'MultiMix requires logits (b, c), and {type(model).__name__} returned {tuple(logits.shape)}: '
            "create the model with pooling, not with global_pool=''.")
    return logits


def _with_prediction(model: nn.Module, prediction: Any) -> MultiMixOutput:
    """Return the output of a dense pass with the prediction of forward."""
    current = model._multimix_pass
    if current.prediction is None or prediction is not current.prediction:
        raise TypeError(
            f'Dense MultiMix requires that {type(model).__name__}.forward returns the output of forward_head, and it '
            "does not: attach with mode='pooled'.")
    return MultiMixOutput(_checked_logits(model, prediction), *current.dense)


def _dense_logits_and_attention(
        model: nn.Module,
        features: Features,
        mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    settings, current = model._multimix, model._multimix_pass
    head = settings.head
    set_phase(model, head.batch_norms, 'apply')
    if head.map_norm is None:
        positions = position_features(head, features, current.image_size)
    else:
        positions = [model.get_submodule(head.map_norm)(current.last_map.flatten(2).transpose(1, 2))]
    dense = position_logits(model, head, features, positions)
    token = None
    if settings.attention == 'token':
        token = torch.cat([stream[:, 0] for stream in as_streams(features)], dim=-1)
    placed = [stream for stream, layout in zip(positions, head.layouts, strict=True) if layout.has_positions]
    keys = placed[0] if len(placed) == 1 else torch.cat(placed, dim=-1)
    attention = None
    if settings.attention != 'uniform' or mask is not None:
        attention = attention_map(keys, query=settings.attention, norm=settings.attention_norm, token=token, mask=mask)
    return dense, attention


class MultiMixHandle:
    """Handle of an attached model, returned by attach. As a context manager it calls remove() on exit.

    Attributes:
        model: The attached model.
    """

    def __init__(self, model: nn.Module, settings: _Settings):
        self.model = model
        self._settings = settings

    def __repr__(self) -> str:
        settings = f'mode={self._settings.mode!r}, attention={self._settings.attention!r}'
        return f'MultiMixHandle({type(self.model).__name__}, {settings}{"" if self._is_attached else ", removed"})'

    def __enter__(self) -> 'MultiMixHandle':
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @property
    def enabled(self) -> bool:
        """Whether the model returns a MultiMixOutput in training mode. Set it to False for batches without MultiMix.

        If False, the model works as without attach, at the same cost. A compiled model has one graph for each value. A
        copy of the model has its own setting.

        Raises:
            RuntimeError: If it is set after the model was detached or attached again.
        """
        return self._is_attached and self._settings.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if not self._is_attached:
            raise RuntimeError('The model was detached, or attached again: use the handle of the last attach().')
        self._settings.enabled = bool(enabled)

    @property
    def reads_positions(self) -> bool:
        """Whether the ordinary prediction depends on the positions only, and not on a class token.

        If False, the dense loss does not train all layers of the prediction, and the loss should include the pooled
        term. True in pooled mode.
        """
        return self._settings.head is None or self._settings.head.reads_positions

    @property
    def _is_attached(self) -> bool:
        return self.model.__dict__.get('_multimix') is self._settings

    def remove(self) -> None:
        """Restore the model. Nothing happens if the model was detached or attached again.

        Raises:
            RuntimeError: If the model was sharded with fully_shard after it was attached.
        """
        if self._is_attached:
            detach(self.model)


def detach(model: nn.Module) -> None:
    """Undo attach. The model keeps its current weights.

    Args:
        model: A model. Wrappers for compilation and distribution are removed first. Nothing happens if the model is
            not attached.

    Raises:
        RuntimeError: If the model was sharded with fully_shard after it was attached.
    """
    model = unwrap_model(model)
    settings = getattr(model, '__dict__', {}).get('_multimix')
    if settings is None:
        return
    restore_class(model)  # first, since it may raise
    restore_batch_norms(model)
    del model._multimix


def _check_protocol(model: nn.Module) -> None:
    """Raise TypeError if the model does not follow timm's protocol, and ValueError if it has no classifier."""
    # A compiled model forwards attribute access, so it seems to have both methods.
    is_compiled = isinstance(getattr(model, '_orig_mod', None), nn.Module)
    if is_compiled or not all(callable(getattr(model, name, None)) for name in ('forward_features', 'forward_head')):
        raise TypeError(
            f"{type(model).__name__} does not have timm's forward_features and forward_head. Attach before you wrap "
            'the model for compilation or distribution. For models of other libraries use pooled MultiMix: pass the '
            'logits (b, c) to MultiMixLoss.')
    classifier = model.get_classifier() if callable(getattr(model, 'get_classifier', None)) else None
    if getattr(model, 'num_classes', None) == 0 or isinstance(classifier, nn.Identity):
        raise ValueError(
            f'{type(model).__name__} has no classifier (num_classes=0): create it with the number of classes, '
            'or call reset_classifier.')


def _inspect(model: nn.Module, mode: str, attention: str) -> Head | None:
    """Check that the model can be attached, and return the description of its head for the dense mode."""
    _check_protocol(model)
    replaced = [name for name in ('forward', 'forward_features', 'forward_head') if name in vars(model)]
    if replaced:
        raise TypeError(
            f'{" and ".join(replaced)} of this {type(model).__name__} was replaced on the instance, and attach cannot '
            'override it: attach before you replace, wrap or compile it, or override it in a subclass.')
    if mode == 'pooled':
        return None
    head = find_head(model)
    if attention == 'token' and not head.has_class_token:
        raise ValueError(
            f"attention='token' requires a class token, which {type(model).__name__} does not have: use 'gap' or "
            "'uniform'.")
    return head


@torch.compiler.disable
def _inspect_again(model: nn.Module, settings: _Settings) -> None:
    """Inspect the head again after it was replaced."""
    settings.head = _inspect(model, settings.mode, settings.attention)
    restore_batch_norms(model)
    swap_batch_norms(model, settings.head.batch_norms)


def attach(
        model: nn.Module,
        mode: str = 'dense',
        attention: str = 'gap',
        attention_norm: str = 'relu',
) -> MultiMixHandle:
    """Make a timm model return a MultiMixOutput in training mode. Evaluation mode does not change.

    The class name, the signatures, the parameters and the keys of the state_dict do not change. After attaching, the
    model can be copied, pickled, compiled, exported, wrapped for distributed training and sharded. Attaching again
    replaces the settings. The logits of the output are the ordinary prediction. For distilled models they are the mean
    of the two heads, also with distilled_training. In dense mode a copy of the model on the meta device runs on one
    image to inspect the features and the head. If the head is replaced later, the next forward pass inspects it again.
    The modules of the head, and their hooks, run for the prediction and for the positions.

    If a model passes a tensor to forward_head besides the features, it is the mask of valid positions (b, r), True for
    valid. The attention of padding is 0, so that padding has no effect on MultiMixLoss. timm's NaFlex models do so.

    Args:
        model: A timm model, or a model with timm's forward_features and forward_head.
        mode: 'dense' (logits at every position and attention) or 'pooled' (ordinary logits only).
        attention: Query of the attention: average-pooled features ('gap'), class token ('token'), or 'uniform'.
        attention_norm: 'relu' (followed by l1 normalization) or 'softmax'.

    Returns:
        A handle. handle.remove() restores the model. As a context manager the handle does so on exit.

    Raises:
        TypeError: If the model does not follow timm's protocol, or its forward, forward_features or forward_head was
            replaced on the instance, for example by Accelerate's prepare().
        ValueError: If an option is unknown, or the head cannot be applied at a position. The message gives the reason.

    Examples:

        ```python
        with attach(model):
            for images, target in loader:
                output = model(images)
                loss = criterion(output, target)
                correct = output.logits.argmax(1) == target
                ...
        ```
    """
    if mode not in ATTACH_MODES:
        raise ValueError(f'mode must be one of {", ".join(ATTACH_MODES)}, got {mode!r}.')
    check_attention(attention, attention_norm)
    if attention == 'cam':
        raise ValueError(
            "attention='cam' requires the target, so the loss computes it: attach with attention='uniform' and pass "
            "attention='cam' to MultiMixLoss or MultiMixTask.")
    settings = _Settings(mode, attention, attention_norm, _inspect(model, mode, attention))
    detach(model)
    if settings.head is not None:
        swap_batch_norms(model, settings.head.batch_norms)
    swap_class(model, _MultiMixModel)
    model._multimix = settings
    return MultiMixHandle(model, settings)


@contextmanager
def outputs_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model, if it is attached, returns a MultiMixOutput in evaluation mode too."""
    settings = getattr(model, '_multimix', None)
    if settings is not None:
        settings.in_evaluation = True
    try:
        yield
    finally:
        if settings is not None:
            settings.in_evaluation = False


def dense_logits(
        model: nn.Module,
        features: Features,
        image_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute the logits of a timm model at every position of its feature map.

    On a constant feature map, the logits at every position equal the output of forward_head. If the head is average
    pooling and an affine classifier, the mean of the logits over positions equals the output of forward_head. Dropout
    in the head draws a mask for each position. In training mode, BatchNorm in the head uses the statistics of the
    pooled batch, and the running statistics are not updated. If the model is not attached, every call inspects the
    head: attach the model in a training loop.

    Args:
        model: A timm model, or a model with timm's forward_features and forward_head.
        features: Output of model.forward_features(images).
        image_size: Height and width of the images. Required only for multi-scale models that return tokens, if images
            are not square.

    Returns:
        Logits (b, r, c), positions in row-major order.

    Raises:
        TypeError: If the model does not have forward_features and forward_head.
        ValueError: If the head cannot be applied at a position. The message gives the reason.
    """
    _check_protocol(model)
    head = getattr(getattr(model, '_multimix', None), 'head', None)
    if head is None or not head.belongs_to(model):
        head = find_head(model)
    positions = position_features(head, features, image_size)
    if not head.batch_norms or not model.training:
        return position_logits(model, head, features, positions)
    attached = hasattr(model.get_submodule(head.batch_norms[0]), '_multimix_statistics')
    swap_batch_norms(model, head.batch_norms)
    try:
        set_phase(model, head.batch_norms, 'measure')
        model.forward_head(features)
        set_phase(model, head.batch_norms, 'apply')
        return position_logits(model, head, features, positions)
    finally:
        set_phase(model, head.batch_norms, None)
        if not attached:
            restore_batch_norms(model)
