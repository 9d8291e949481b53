"""Attention of each example over the positions of its feature map."""
from typing import Any

import torch

from .targets import loss_dtype
from .weights import check_mask

ATTENTION_QUERIES = ('uniform', 'gap', 'token', 'cam')
ATTENTION_NORMS = ('relu', 'softmax')


def check_attention(query: str, norm: str) -> None:
    """Raise ValueError if the query or the norm is unknown."""
    if query not in ATTENTION_QUERIES:
        raise ValueError(f'attention query must be one of {", ".join(ATTENTION_QUERIES)}, got {query!r}.')
    if norm not in ATTENTION_NORMS:
        raise ValueError(f'attention norm must be one of {", ".join(ATTENTION_NORMS)}, got {norm!r}.')


def _cam_scores(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.is_floating_point():  # soft targets: expected logit
        return torch.einsum('brc,bc->br', logits, target.to(logits.dtype))
    return logits.gather(2, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def _uniform(like: torch.Tensor, mask: torch.Tensor | None) -> float | torch.Tensor:
    """Return the attention that is equal at all valid positions."""
    if mask is None:
        return 1 / like.shape[1]
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(like.dtype)


def _normalize(scores: torch.Tensor, norm: str, mask: torch.Tensor | None) -> torch.Tensor:
    if norm == 'softmax':
        if mask is None:
            return scores.softmax(dim=1)
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(~mask, 0)
    scores = scores.relu()  # zero at padding, whose features are zero
    total = scores.sum(dim=1, keepdim=True)
    empty = total == 0
    return torch.where(empty, _uniform(scores, mask), scores / total.masked_fill(empty, 1))


def attention_map(
        features: torch.Tensor | None,
        logits: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        *,
        query: str = 'gap',
        norm: str = 'relu',
        token: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention a_i = h(z_i^T u_i) of each example over its positions (P2, eq. 9).

    Args:
        features: Embeddings z at every position (b, r, d). Can be None for 'cam'.
        logits: Logits at every position (b, r, c), for 'cam' only.
        target: Class indices (b,) or soft targets (b, c), for 'cam' only.
        query: u_i is the average-pooled embedding ('gap'), the class token ('token'), or the classifier weight of the
            true class ('cam'). For 'cam', z^T u is the logit of the true class at the position. 'uniform' gives the
            same attention to all positions.
        norm: h is ReLU followed by l1 normalization ('relu') or softmax ('softmax').
        token: Class tokens (b, d), for 'token' only.
        mask: Valid positions (b, r), True for valid. The attention of padding is zero and does not depend on its
            content.

    Returns:
        Attention (b, r) in float32 (float64 for float64 input). It is non-negative and every row sums to 1. A row is
        uniform if ReLU sets all its scores to zero. A row without valid positions is zero.

    Raises:
        ValueError: If the query or the norm is unknown, an input required by the query is missing, or the mask does
            not fit.
    """
    check_attention(query, norm)
    source: Any = logits if query == 'cam' else features
    classes: Any = target
    key_query: Any = token
    if query != 'cam' and features is None:
        raise ValueError(f'attention query {query!r} requires features with shape (b, r, d).')
    if source is not None and source.ndim != 3:
        raise ValueError(f'attention_map expects a tensor (b, r, d), got shape {tuple(source.shape)}.')
    if query == 'token' and token is None:
        raise ValueError("attention query 'token' requires token with shape (b, d).")
    if query == 'cam' and (logits is None or target is None):
        raise ValueError("attention query 'cam' requires the logits at every position and the target.")

    if mask is not None:
        mask = check_mask(mask, source.shape[:2])
        source = source.masked_fill(~mask.unsqueeze(2), 0)
    if query == 'uniform':
        ones: torch.Tensor = source.new_ones(source.shape[:2], dtype=loss_dtype(source))
        return ones * _uniform(ones, mask)
    if query == 'cam':
        scores = _cam_scores(source, classes)
        return _normalize(scores.to(loss_dtype(scores)), norm, mask)
    key = source.to(loss_dtype(source))
    if query == 'gap':
        key_query = key.mean(dim=1) if mask is None else key.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    with torch.autocast(device_type=source.device.type, enabled=False):
        return _normalize(torch.einsum('brd,bd->br', key, key_query.to(key.dtype)), norm, mask)
