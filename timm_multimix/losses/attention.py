"""Attention of each example over the positions of its feature map."""
import torch

from .targets import loss_dtype
from .weights import check_mask

ATTENTION_QUERIES = ('uniform', 'gap', 'token', 'cam')
ATTENTION_NORMS = ('relu', 'softmax')


def check_attention(query: str, norm: str) -> None:
    """Raise ValueError if the query or the norm is unknown."""
    for name, value, allowed in (('query', query, ATTENTION_QUERIES), ('norm', norm, ATTENTION_NORMS)):
        if value not in allowed:
            raise ValueError(f'attention {name} must be one of {", ".join(allowed)}, got {value!r}.')


def _cam_scores(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.is_floating_point():  # soft targets: expected logit
        return torch.einsum('brc,bc->br', logits, target.to(logits.dtype))
    return logits.gather(2, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def _uniform(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1).to(dtype)


def _normalize(scores: torch.Tensor, norm: str, mask: torch.Tensor) -> torch.Tensor:
    if norm == 'softmax':
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(~mask, 0)
    scores = scores.relu()
    total = scores.sum(dim=1, keepdim=True)
    empty = total == 0
    return torch.where(empty, _uniform(mask, scores.dtype), scores / total.masked_fill(empty, 1))


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
    """Compute the attention a_i = h(z_i^T u_i) of each example over its positions (P2, eq. 9).

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
    source = logits if query == 'cam' else features
    context = {'cam': target, 'token': token}.get(query, source)
    if source is None or source.ndim != 3 or context is None:
        inputs = {'cam': 'logits (b, r, c) and target', 'token': 'features (b, r, d) and token (b, d)'}
        raise ValueError(f'attention query {query!r} requires {inputs.get(query, "features with shape (b, r, d)")}.')
    if mask is None:
        mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
    else:
        mask = check_mask(mask, source.shape[:2])
        source = source.masked_fill(~mask.unsqueeze(2), 0)
    dtype = loss_dtype(source)
    if query == 'uniform':
        return _uniform(mask, dtype)
    if query == 'cam':
        return _normalize(_cam_scores(source, context).to(dtype), norm, mask)
    key = source.to(dtype)
    if query == 'gap':
        context = key.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    with torch.autocast(device_type=source.device.type, enabled=False):
        return _normalize(torch.einsum('brd,bd->br', key, context.to(dtype)), norm, mask)
