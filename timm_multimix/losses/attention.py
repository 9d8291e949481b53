"""Attention of each example over the positions of its feature map."""
import torch

ATTENTION_QUERIES = ('uniform', 'gap', 'token', 'cam')
ATTENTION_NORMS = ('relu', 'softmax')


def check_attention(query: str, norm: str) -> None:
    """Raise ValueError if the query or the norm is unknown."""
    if query not in ATTENTION_QUERIES:
        raise ValueError(f'attention query must be one of {", ".join(ATTENTION_QUERIES)}, got {query!r}.')
    if norm not in ATTENTION_NORMS:
        raise ValueError(f'attention norm must be one of {", ".join(ATTENTION_NORMS)}, got {norm!r}.')


def _cam_scores(logits: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor:
    if logits is None or target is None:
        raise ValueError("attention query 'cam' requires the logits at every position and the target.")
    if target.is_floating_point():  # soft targets: expected logit
        return torch.einsum('brc,bc->br', logits, target.to(logits.dtype))
    return logits.gather(2, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def _normalize(scores: torch.Tensor, norm: str) -> torch.Tensor:
    if norm == 'softmax':
        return scores.softmax(dim=1)
    scores = scores.relu()
    total = scores.sum(dim=1, keepdim=True)
    empty = total == 0
    return torch.where(empty, 1 / scores.shape[1], scores / total.masked_fill(empty, 1))


def attention_map(
        features: torch.Tensor | None,
        logits: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        *,
        query: str = 'gap',
        norm: str = 'relu',
        token: torch.Tensor | None = None,
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

    Returns:
        Attention (b, r) in float32 (float64 for float64 input). It is non-negative and every row sums to 1. A row is
        uniform if ReLU sets all its scores to zero.

    Raises:
        ValueError: If the query or the norm is unknown, or an input required by the query is missing.
    """
    check_attention(query, norm)
    source = logits if query == 'cam' else features
    if query != 'cam' and features is None:
        raise ValueError(f'attention query {query!r} requires features with shape (b, r, d).')
    if source is not None and source.ndim != 3:
        raise ValueError(f'attention_map expects a tensor (b, r, d), got shape {tuple(source.shape)}.')
    if query == 'token' and token is None:
        raise ValueError("attention query 'token' requires token with shape (b, d).")

    if query == 'uniform':
        return features.new_full(features.shape[:2], 1 / features.shape[1], dtype=_wide_dtype(features))
    if query == 'cam':
        scores = _cam_scores(logits, target)
        return _normalize(scores.to(_wide_dtype(scores)), norm)
    key = features.to(_wide_dtype(features))
    if query == 'gap':
        token = key.mean(dim=1)
    with torch.autocast(device_type=features.device.type, enabled=False):
        return _normalize(torch.einsum('brd,bd->br', key, token.to(key.dtype)), norm)


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
