"""MultiMix as the papers write it: on embeddings, every tensor in the open. Slow, short, and what the tests trust.

Read this page first; `losses.py` computes the same numbers without ever holding a tensor with both n and r, or n and d,
in its shape. Symbols are those of docs/method.md:

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
    """Class indices (b,) as rows (b, c); soft targets pass through."""
    return target.to(dtype) if target.is_floating_point() else F.one_hot(target, num_classes).to(dtype)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """H(y, softmax(logits)) of every row (..., c) -> (...)."""
    return -(y * logits.log_softmax(dim=-1)).sum(dim=-1)


def binary_cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over classes of the binary cross-entropy, of every row (..., c) -> (...)."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction='none').mean(dim=-1)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes, of every row."""
    return logits.softmax(dim=-1)


def pooled_multimix(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor, classifier: Classifier, loss=cross_entropy):
    """Pooled MultiMix (P1 and P2, sec. 3.2)."""
    z_mixed = w @ z                                                     # eq. 6, (n, d)
    y_mixed = w @ y                                                     # eq. 7, (n, c)
    return loss(classifier(z_mixed), y_mixed).mean()


def attention_weights(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The weights at every position, scaled by attention and normalised again (P2, eqs. 10-11)."""
    m = torch.stack([w_j @ torch.diag(a_j) for w_j, a_j in zip(w, a.T, strict=True)])  # eq. 10, (r, n, b)
    total = m.sum(dim=2, keepdim=True)
    return torch.where(total > 0, m / total, w)                         # eq. 11; all attention zero: no attention


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
    """Dense MultiMix with a teacher, which sees another view of the same examples (P1, sec. 3.3, eq. 9).

    Student and teacher are mixed with the same weights, of the student's attention. Hinton et al.'s T² in front of the
    term with temperature T is timm's. For binary cross-entropy `predict` is the sigmoid.
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
    """Manifold mixup at the last layer (Verma et al., ICML 2019): one λ for the batch, one partner each."""
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
    together = torch.outer(w, grad.sum(dim=0))
    mean_square = m.square().sum(dim=1).mean()                          # S
    spread = mean_square - w.square().sum()
    if spread <= 8 * torch.finfo(m.dtype).eps * mean_square:            # all rows alike: C is zero, κ undefined
        return grad
    kappa = (1 - w.square().sum()) / spread
    return together + kappa * (grad - together)
