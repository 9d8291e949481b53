"""MultiMix losses and interpolation weights. They depend on PyTorch only."""
from .attention import attention_map
from .functional import multimix_binary_cross_entropy, multimix_cross_entropy
from .module import MultiMixLoss, MultiMixOutput
from .weights import attend, manifold_mixup_weights, sample_weights

__all__ = [
    'MultiMixLoss',
    'MultiMixOutput',
    'attend',
    'attention_map',
    'manifold_mixup_weights',
    'multimix_binary_cross_entropy',
    'multimix_cross_entropy',
    'sample_weights',
]
