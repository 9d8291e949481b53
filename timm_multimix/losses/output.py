"""Output of an attached model, the input of the losses."""
from typing import NamedTuple

import torch


class MultiMixOutput(NamedTuple):
    """Output of an attached model in training mode.

    Attributes:
        logits: Ordinary logits of the model (b, c). None if the loss has targets at every position only.
        dense_logits: Logits at every position (b, r, c), positions in row-major order, or None in pooled mode.
        attention: Attention of each example over its positions (b, r), or None for uniform attention. Positions with
            attention 0, such as padding, have no effect on the loss.
    """
    logits: torch.Tensor | None
    dense_logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


def as_output(output: MultiMixOutput | torch.Tensor, name: str = 'MultiMixLoss') -> MultiMixOutput:
    """Return an output of a model as MultiMixOutput."""
    if isinstance(output, torch.Tensor):
        return MultiMixOutput(output)
    if not isinstance(output, MultiMixOutput):
        raise TypeError(
            f'{name} expects logits (b, c) or the MultiMixOutput of an attached model, got {type(output).__name__}: if '
            'the model returns several values, pass its logits.')
    return output
