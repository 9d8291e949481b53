"""Reference implementation of MultiMix on embeddings, as in the papers. It is slow and used by the tests.

fused.py computes the same values on logits, in tiles. Symbols as in docs/method.md:

    z  embeddings before the last affine classifier   (b, d), dense (b, r, d)
    y  targets, one row per example                   (b, c)
    w  interpolation weights Λ, rows on the simplex   (n, b), dense (r, n, b)
    a  attention over positions                       (b, r)

A mask (b, r) is True at valid positions. Targets can be given for every position, (b, r, c).

P1 is arXiv 2206.14868, P2 is arXiv 2311.05538.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

Classifier = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def one_hot(target: torch.Tensor, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Convert class indices (b,) to rows (b, c). Soft targets are cast."""
    return target.to(dtype) if target.is_floating_point() else F.one_hot(target, num_classes).to(dtype)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return H(y, softmax(logits)) of every row, (..., c) -> (...), with class weights (c,)."""
    weight = torch.ones_like(y) if weight is None else weight
    return -(weight * y * logits.log_softmax(dim=-1)).sum(dim=-1)


def binary_cross_entropy(
        logits: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the binary cross-entropy of every row, mean over classes, (..., c) -> (...)."""
    return F.binary_cross_entropy_with_logits(
        logits, y, weight, pos_weight=pos_weight, reduction='none').mean(dim=-1)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1)


def pooled_multimix(
        z: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        classifier: Classifier,
        loss: Loss = cross_entropy,
) -> torch.Tensor:
    """Pooled MultiMix (P1 and P2, sec. 3.2)."""
    z_mixed = w @ z                                                     # eq. 6, (n, d)
    y_mixed = w @ y                                                     # eq. 7, (n, c)
    return loss(classifier(z_mixed), y_mixed).mean()


def attention_weights(w: torch.Tensor, a: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scale the weights by the attention and normalize them (P2, eqs. 10-11). Weights of padding are 0."""
    if mask is not None:
        w, a = w * mask.T.unsqueeze(1), a * mask
        w = w / w.sum(dim=2, keepdim=True).clamp(min=1e-30)
    m = torch.stack([w_j @ torch.diag(a_j) for w_j, a_j in zip(w, a.T, strict=True)])  # eq. 10, (r, n, b)
    total = m.sum(dim=2, keepdim=True)
    return torch.where(total > 0, m / torch.where(total > 0, total, 1), w)  # eq. 11; w if all attention is 0


def mean(losses: torch.Tensor, m: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean of losses (r, n) over the rows of m that are not zero.

    Args:
        losses: Loss of every mix.
        m: Weights (r, n, b).
        weight: Class weight of the target of every example, (b,) or (b, r), if targets are class indices. The divisor
            is then the sum of the mixed class weights.
    """
    rows = m.sum(dim=2) > 0
    divisor = rows.sum()
    if weight is not None:
        divisor = torch.einsum('rnb,br->rn', m, weight.view(len(weight), -1).expand(-1, len(m))).sum()
    return (losses * rows).sum() / divisor


def mix(m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mix embeddings or targets (b, d) or (b, r, d) with weights (r, n, b) (P2, eqs. 12-13)."""
    return torch.einsum('rnb,bd->rnd', m, x) if x.ndim == 2 else torch.einsum('rnb,brd->rnd', m, x)


def dense_multimix(
        z: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        a: torch.Tensor,
        classifier: Classifier,
        loss: Loss = cross_entropy,
        mask: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense MultiMix (P2, sec. 3.3). See mean for the weight, and attention_weights for the mask."""
    m = attention_weights(w, a, mask)
    z_mixed, y_mixed = mix(m, z), mix(m, y)
    return mean(loss(classifier(z_mixed), y_mixed), m, weight)          # eq. 14


def self_distillation(
        z: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        a: torch.Tensor,
        classifier: Classifier,
        z_teacher: torch.Tensor,
        classifier_teacher: Classifier,
        weight: float,
        temperature: float = 1.0,
        loss: Loss = cross_entropy,
        predict: Classifier = softmax,
) -> torch.Tensor:
    """Dense MultiMix with a teacher (P1, sec. 3.3, eq. 9).

    Student and teacher are mixed with the same weights, attended with the student's attention. The factor T² of the
    distillation term is from Hinton et al., as in timm. For binary cross-entropy `predict` is the sigmoid.
    """
    m = attention_weights(w, a)
    teacher = predict(classifier_teacher(mix(m, z_teacher.detach())) / temperature)
    student = classifier(mix(m, z))
    classification = loss(student, mix(m, y)).mean()
    distillation = temperature ** 2 * loss(student / temperature, teacher).mean()
    return (1 - weight) * classification + weight * distillation


def manifold_mixup(
        z: torch.Tensor,
        y: torch.Tensor,
        lam: torch.Tensor,
        partners: torch.Tensor,
        classifier: Classifier,
) -> torch.Tensor:
    """Manifold mixup at the last layer (Verma et al., ICML 2019), with one λ for the batch."""
    z_mixed = lam * z + (1 - lam) * z[partners]
    y_mixed = lam * y + (1 - lam) * y[partners]
    return cross_entropy(classifier(z_mixed), y_mixed).mean()


def balance_gradient(grad: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Gradient balancing at one position (docs/method.md): G = w (1ᵀG) + C becomes w (1ᵀG) + κC.

    Args:
        grad: Gradient of the loss with respect to the logits of one position (b, c).
        m: Weights used at that position (n, b).
    """
    m = m[m.sum(dim=1) > 0]                                             # without the mixes that are left out
    if not len(m):
        return grad
    w = m.mean(dim=0)
    common = torch.outer(w, grad.sum(dim=0))                            # w (1ᵀG)
    mean_square = m.square().sum(dim=1).mean()                          # S
    spread = mean_square - w.square().sum()
    if spread <= 8 * torch.finfo(m.dtype).eps * mean_square:            # equal rows: C is 0, κ undefined
        return grad
    kappa = (1 - w.square().sum()) / spread
    return common + kappa * (grad - common)
