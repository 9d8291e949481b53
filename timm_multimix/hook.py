"""attach(): makes a timm model return a MultiMixOutput while it trains."""
from collections.abc import Sequence

import torch
from torch import nn

from .attention import attention_map, check_attention
from .head_norm import restore_batch_norms, set_phase, swap_batch_norms
from .heads import Head, evaluating, inspect_head, mean_of_heads
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


class _MultiMixModel:
    """Mixin for an attached model."""

    def forward(self, *args, **kwargs):
        settings = self._multimix
        if not self.training:
            return super().forward(*args, **kwargs)
        if settings.mode == 'pooled':
            return MultiMixOutput(_checked_logits(self, super().forward(*args, **kwargs)))
        head = settings.head
        self._multimix_captured = None
        try:
            set_phase(self, head.batch_norms, 'record')
            output = super().forward(*args, **kwargs)
            captured = self._multimix_captured
            if captured is None or captured[1] is not output:
                raise TypeError(
                    f'{type(self).__name__}.forward does not return what its forward_head returns, so what its '
                    "prediction comes from is unknown: attach with mode='pooled'.")
            set_phase(self, head.batch_norms, 'apply')
            return _dense_output(self, settings, captured[0], output, _image_size(*args))
        finally:
            set_phase(self, head.batch_norms, None)
            del self._multimix_captured

    def forward_head(self, *args, **kwargs):
        output = super().forward_head(*args, **kwargs)
        if '_multimix_captured' in self.__dict__ and self._multimix_captured is None:
            features, *others = [value for value in (*args, *kwargs.values()) if value is not None]
            if any(isinstance(value, torch.Tensor) for value in others):
                raise ValueError(
                    'Dense MultiMix needs features whose positions are all valid, and got a mask: '
                    "train on images of one size, or attach with mode='pooled'.")
            self._multimix_captured = (features, output)
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
        features: Features,
        output: torch.Tensor | tuple[torch.Tensor, ...],
        image_size: Sequence[int] | None,
) -> MultiMixOutput:
    logits = _checked_logits(model, output)
    positions = position_features(settings.head, features, image_size)
    dense = position_logits(model, settings.head, features, positions)
    token = None
    if settings.attention == 'token':
        token = torch.cat([stream[:, 0] for stream in as_streams(features)], dim=-1)
    joined = positions[0] if len(positions) == 1 else torch.cat(positions, dim=-1)
    attention = attention_map(joined, query=settings.attention, norm=settings.attention_norm, token=token)
    return MultiMixOutput(logits, dense, attention)


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
    def reads_positions(self) -> bool:
        """Whether the ordinary prediction reads the positions: False if it comes from class tokens alone.

        Then the dense loss does not train the path that the model predicts with, and the pooled loss on the ordinary
        logits has to be part of the objective. True in pooled mode, where nothing else is trained.
        """
        return self._settings.head is None or self._settings.head.reads_positions

    def remove(self) -> None:
        """Restore the model. Nothing happens if it has been restored, or attached anew, since."""
        if self.model.__dict__.get('_multimix') is self._settings:
            _detach(self.model)


def _detach(model: nn.Module) -> None:
    restore_batch_norms(model)
    restore_class(model)
    del model._multimix


def _install(model: nn.Module, settings: _Settings) -> None:
    check_protocol(model)
    if settings.mode == 'dense':
        settings.head = inspect_head(model, example_features(model))
        if settings.attention == 'token' and not settings.head.has_class_token:
            raise ValueError(
                f"attention='token' needs a class token, and {type(model).__name__} has none: use 'gap' or 'uniform'.")
        swap_batch_norms(model, settings.head.batch_norms)
    swap_class(model, _MultiMixModel)
    model._multimix = settings


def _image_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image sizes that a model says it takes, then common ones."""
    sizes = [getattr(model, 'img_size', None), getattr(getattr(model, 'patch_embed', None), 'img_size', None)]
    config = getattr(model, 'pretrained_cfg', None) or {}
    sizes += [(config.get('input_size') or (None,))[-2:], 224, 256, 32]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size]
    return [size for size in dict.fromkeys(sizes) if len(size) == 2]


@torch.no_grad()
def example_features(model: nn.Module) -> Features:
    """Features of one grey image, in evaluation mode.

    Args:
        model: A model with timm's forward_features.

    Returns:
        What forward_features returns.

    Raises:
        ValueError: if it runs at none of the sizes that the model declares, nor at 224, 256 or 32.
    """
    parameter = next(model.parameters())
    channels = getattr(model, 'in_chans', None) or next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)
    errors = []
    with evaluating(model):
        for size in _image_sizes(model):
            try:
                return model.forward_features(parameter.new_zeros(1, channels, *size))
            except (RuntimeError, ValueError, AssertionError) as error:
                errors.append(f'{size[0]} x {size[1]}: {error}')
    raise ValueError(
        f'{type(model).__name__}.forward_features ran at no image size tried, so its features are unknown. Set '
        f'model.img_size to the size it takes. {"; ".join(errors)}')


def attach(
        model: nn.Module,
        mode: str = 'dense',
        attention: str = 'gap',
        attention_norm: str = 'relu',
) -> MultiMixHandle:
    """Make a timm model return a MultiMixOutput while it trains; in evaluation mode nothing changes.

    The model keeps its class name, its parameters and the keys of its state_dict; it can be copied, pickled, compiled
    and wrapped for distribution, after attaching. Attaching again replaces the settings. The ordinary logits are what
    the model computes untouched; models with two distilled heads give their mean, also with distilled_training. In
    dense mode the model runs once on one grey image in evaluation mode, to find out what its features are.

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
