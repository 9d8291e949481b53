"""Reference implementation of MultiMix on embeddings, as in the papers. It is slow and used by the tests.

fused.py computes the same values on logits, in tiles. Symbols as in docs/method.md:

    z  embeddings before the last affine classifier   (b, d), dense (b, r, d)
    y  targets, one row per example                   (b, c)
    w  interpolation weights Λ, rows on the simplex   (n, b), dense (r, n, b)
    a  attention over positions                       (b, r)

P1 is arXiv 2206.14868, P2 is arXiv 2311.05538.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

Classifier = Callable[[torch.Tensor], torch.Tensor]


def one_hot(target: torch.Tensor, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Convert class indices (b,) to rows (b, c). Soft targets are cast."""
    return target.to(dtype) if target.is_floating_point() else F.one_hot(target, num_classes).to(dtype)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return H(y, softmax(logits)) of every row, (..., c) -> (...)."""
    return -(y * logits.log_softmax(dim=-1)).sum(dim=-1)


def binary_cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of every row, mean over classes, (..., c) -> (...)."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction='none').mean(dim=-1)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1)


def pooled_multimix(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor, classifier: Classifier, loss=cross_entropy):
    """Pooled MultiMix (P1 and P2, sec. 3.2)."""
    z_mixed = w @ z                                                     # eq. 6, (n, d)
    y_mixed = w @ y                                                     # eq. 7, (n, c)
    return loss(classifier(z_mixed), y_mixed).mean()


def attention_weights(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Scale the weights by the attention and normalize them (P2, eqs. 10-11)."""
    m = torch.stack([w_j @ torch.diag(a_j) for w_j, a_j in zip(w, a.T, strict=True)])  # eq. 10, (r, n, b)
    total = m.sum(dim=2, keepdim=True)
    return torch.where(total > 0, m / total, w)                         # eq. 11; w if all attention is 0


def dense_multimix(
        z: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        a: torch.Tensor,
        classifier: Classifier,
        loss=cross_entropy,
):
    """Dense MultiMix (P2, sec. 3.3)."""
    m = attention_weights(w, a)
    z_mixed = torch.einsum('rnb,brd->rnd', m, z)                        # eq. 12
    y_mixed = torch.einsum('rnb,bc->rnc', m, y)                         # eq. 13
    return loss(classifier(z_mixed), y_mixed).mean()                    # eq. 14


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
        loss=cross_entropy,
        predict=softmax,
):
    """Dense MultiMix with a teacher (P1, sec. 3.3, eq. 9).

    Student and teacher are mixed with the same weights, attended with the student's attention. The factor T² of the
    distillation term is from Hinton et al., as in timm. For binary cross-entropy `predict` is the sigmoid.
    """
    m = attention_weights(w, a)
    z_mixed = torch.einsum('rnb,brd->rnd', m, z)
    y_mixed = torch.einsum('rnb,bc->rnc', m, y)
    z_teacher_mixed = torch.einsum('rnb,brd->rnd', m, z_teacher.detach())
    teacher = predict(classifier_teacher(z_teacher_mixed) / temperature)
    student = classifier(z_mixed)
    classification = loss(student, y_mixed).mean()
    distillation = temperature ** 2 * loss(student / temperature, teacher).mean()
    return (1 - weight) * classification + weight * distillation


def manifold_mixup(z: torch.Tensor, y: torch.Tensor, lam: torch.Tensor, partners: torch.Tensor, classifier: Classifier):
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
    w = m.mean(dim=0)
    common = torch.outer(w, grad.sum(dim=0))                            # w (1ᵀG)
    mean_square = m.square().sum(dim=1).mean()                          # S
    spread = mean_square - w.square().sum()
    if spread <= 8 * torch.finfo(m.dtype).eps * mean_square:            # equal rows: C is 0, κ undefined
        return grad
    kappa = (1 - w.square().sum()) / spread
    return common + kappa * (grad - common)
