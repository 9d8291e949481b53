"""MultiMix for timm: train image classifiers on a thousand interpolations of every mini-batch, for almost no time."""
from .attention import attention_map
from .calibration import calibrate
from .hook import attach
from .losses import MultiMixLoss, MultiMixOutput, multimix_binary_cross_entropy, multimix_cross_entropy
from .options import add_multimix_args, multimix_kwargs
from .positions import dense_logits
from .task import MultiLabelMultiMixTask, MultiMixTask
from .weights import attend, manifold_mixup_weights, sample_weights

__all__ = [
    'MultiLabelMultiMixTask',
    'MultiMixLoss',
    'MultiMixOutput',
    'MultiMixTask',
    'add_multimix_args',
    'attach',
    'attend',
    'attention_map',
    'calibrate',
    'dense_logits',
    'manifold_mixup_weights',
    'multimix_binary_cross_entropy',
    'multimix_cross_entropy',
    'multimix_kwargs',
    'sample_weights',
]
