"""attach(): makes a timm model return a MultiMixOutput while it trains."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .attention import attention_map, check_attention
from .head_norm import restore_batch_norms, set_phase, swap_batch_norms
from .heads import Head, find_head, mean_of_heads
from .layouts import Features, as_streams
from .losses import MultiMixOutput
from .positions import check_protocol, position_features, position_logits
from .swapping import restore_class, swap_class

ATTACH_MODES = ('pooled', 'dense')


class _Settings:
    """What attach was asked for and what it found; one plain attribute of the model."""

    def __init__(self, mode: str, attention: str, attention_norm: str, head: Head | None):
        self.mode = mode
        self.attention = attention
        self.attention_norm = attention_norm
        self.head = head
        self.enabled = True
        self.in_evaluation = False


class _Captured:
    """What one forward pass of an attached model went through."""

    def __init__(self):
        self.features: Features | None = None
        self.last_map: torch.Tensor | None = None
        self.output: torch.Tensor | tuple[torch.Tensor, ...] | None = None


class _MultiMixModel:
    """Mixin for an attached model."""

    def forward(self, *args, **kwargs):
        settings = self._multimix
        if not ((self.training and settings.enabled) or settings.in_evaluation):
            return super().forward(*args, **kwargs)
        if settings.mode == 'pooled':
            return MultiMixOutput(_checked_logits(self, super().forward(*args, **kwargs)))
        head = settings.head
        captured = self._multimix_captured = _Captured()
        try:
            set_phase(self, head.batch_norms, 'record')
            output = super().forward(*args, **kwargs)
            if captured.output is None or captured.output is not output:
                raise TypeError(
                    f'{type(self).__name__}.forward does not return what its forward_head returns, so what its '
                    "prediction comes from is unknown: attach with mode='pooled'.")
            set_phase(self, head.batch_norms, 'apply')
            return _dense_output(self, settings, captured, _image_size(*args))
        finally:
            set_phase(self, head.batch_norms, None)
            del self._multimix_captured

    def forward_features(self, *args, **kwargs):
        if '_multimix_captured' not in self.__dict__ or self._multimix.head.map_norm is None:
            return super().forward_features(*args, **kwargs)
        features, maps = self.forward_intermediates(*args, indices=1, **kwargs)
        self._multimix_captured.last_map = maps[-1]
        return features

    def forward_head(self, *args, **kwargs):
        output = super().forward_head(*args, **kwargs)
        captured = self.__dict__.get('_multimix_captured')
        if captured is not None and captured.output is None:
            features, *others = [value for value in (*args, *kwargs.values()) if value is not None]
            if any(isinstance(value, torch.Tensor) for value in others):
                raise ValueError(
                    'Dense MultiMix needs features whose positions are all valid, and got a mask: '
                    "train on images of one size, or attach with mode='pooled'.")
            captured.features, captured.output = features, output
        return output

    def reset_classifier(self, *args, **kwargs):
        super().reset_classifier(*args, **kwargs)
        settings = self._multimix
        _detach(self)
        _install(self, settings)


def _image_size(*args) -> Sequence[int] | None:
    is_image = args and isinstance(args[0], torch.Tensor) and args[0].ndim == 4
    return args[0].shape[-2:] if is_image else None


def _checked_logits(model: nn.Module, output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    logits = mean_of_heads(output)
    if logits.ndim != 2:
        raise ValueError(
            f'MultiMix needs logits (b, c), and {type(model).__name__} gave {tuple(logits.shape)}: '
            "create the model with pooling, not with global_pool=''.")
    return logits


def _dense_output(
        model: nn.Module,
        settings: _Settings,
        captured: _Captured,
        image_size: Sequence[int] | None,
) -> MultiMixOutput:
    head = settings.head
    if head.map_norm is None:
        positions = position_features(head, captured.features, image_size)
    else:
        positions = [model.get_submodule(head.map_norm)(captured.last_map.flatten(2).transpose(1, 2))]
    dense = position_logits(model, head, captured.features, positions)
    token = None
    if settings.attention == 'token':
        token = torch.cat([stream[:, 0] for stream in as_streams(captured.features)], dim=-1)
    placed = [stream for stream, layout in zip(positions, head.layouts, strict=True) if layout.has_positions]
    keys = placed[0] if len(placed) == 1 else torch.cat(placed, dim=-1)
    attention = attention_map(keys, query=settings.attention, norm=settings.attention_norm, token=token)
    return MultiMixOutput(_checked_logits(model, captured.output), dense, attention)


class MultiMixHandle:
    """What attach returns.

    Attributes:
        model: The attached model.
    """

    def __init__(self, model: nn.Module, settings: _Settings):
        self.model = model
        self._settings = settings

    @property
    def mode(self) -> str:
        """'pooled' or 'dense'."""
        return self._settings.mode

    @property
    def attention(self) -> str:
        """The query of the attention."""
        return self._settings.attention

    @property
    def enabled(self) -> bool:
        """Whether the model returns a MultiMixOutput while training. Set it to False for batches without MultiMix.

        The model then does what it does without attach, at the same cost. A compiled model keeps one graph for each of
        the two settings.
        """
        return self._settings.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._settings.enabled = bool(enabled)

    @property
    def reads_positions(self) -> bool:
        """Whether the ordinary prediction comes from the positions: False if class tokens have a part in it.

        Then the dense loss does not train the whole path that the model predicts with, and the pooled loss on the
        ordinary logits has to be part of the objective. True in pooled mode, where nothing else is trained.
        """
        return self._settings.head is None or self._settings.head.reads_positions

    def remove(self) -> None:
        """Restore the model. Nothing happens if it has been restored, or attached anew, since.

        Raises:
            RuntimeError: if it has been sharded with fully_shard since.
        """
        if self.model.__dict__.get('_multimix') is self._settings:
            _detach(self.model)


def _detach(model: nn.Module) -> None:
    restore_class(model)  # first, since it may refuse
    restore_batch_norms(model)
    del model._multimix


def _install(model: nn.Module, settings: _Settings) -> None:
    check_protocol(model)
    if settings.mode == 'dense':
        settings.head = find_head(model)
        if settings.attention == 'token' and not settings.head.has_class_token:
            raise ValueError(
                f"attention='token' needs a class token, and {type(model).__name__} has none: use 'gap' or 'uniform'.")
        swap_batch_norms(model, settings.head.batch_norms)
    swap_class(model, _MultiMixModel)
    model._multimix = settings


def attach(
        model: nn.Module,
        mode: str = 'dense',
        attention: str = 'gap',
        attention_norm: str = 'relu',
) -> MultiMixHandle:
    """Make a timm model return a MultiMixOutput while it trains; in evaluation mode nothing changes.

    The model keeps its class name, its parameters and the keys of its state_dict; it can be copied, pickled, compiled,
    wrapped for distribution and sharded, after attaching. Attaching again replaces the settings. The ordinary logits
    are what the model computes untouched; models with two distilled heads give their mean, also with
    distilled_training. In dense mode a copy of the model without data runs on one image, to find out what its features
    and its head are.

    Args:
        model: A timm model, or one with timm's forward_features and forward_head.
        mode: 'dense' (logits at every position, and attention over them) or 'pooled' (the ordinary logits only).
        attention: What attention compares positions with: their average ('gap'), the class token ('token'), or
            nothing ('uniform').
        attention_norm: 'relu' (followed by l1 normalisation) or 'softmax'.

    Returns:
        A handle: handle.remove() restores the model.

    Raises:
        TypeError: if the model does not follow timm's protocol.
        ValueError: if an option is unknown, or the head cannot be applied at a position, with the reason.
    """
    if mode not in ATTACH_MODES:
        raise ValueError(f'mode must be one of {", ".join(ATTACH_MODES)}, got {mode!r}.')
    check_attention(attention, attention_norm)
    if attention == 'cam':
        raise ValueError(
            "attention='cam' needs the target, which the model does not see: attach with attention='uniform' and pass "
            "attention='cam' to MultiMixLoss or MultiMixTask.")
    if '_multimix' in getattr(model, '__dict__', ()):
        _detach(model)
    settings = _Settings(mode, attention, attention_norm, None)
    _install(model, settings)
    return MultiMixHandle(model, settings)


@contextmanager
def outputs_in_evaluation(model: nn.Module) -> Iterator[None]:
    """While it lasts, an attached model returns a MultiMixOutput in evaluation mode too, as a teacher has to.

    Args:
        model: A model. One that is not attached returns what it always does.
    """
    settings = getattr(model, '_multimix', None)
    if settings is not None:
        settings.in_evaluation = True
    try:
        yield
    finally:
        if settings is not None:
            settings.in_evaluation = False
