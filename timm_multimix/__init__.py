"""MultiMix for timm: train image classifiers on a thousand interpolations of every mini-batch, for almost no time."""
from .attention import attention_map
from .calibration import calibrate
from .hook import attach, detach
from .hub import push_to_hub
from .losses import MultiMixLoss, MultiMixOutput, multimix_binary_cross_entropy, multimix_cross_entropy
from .options import add_multimix_args, multimix_kwargs
from .positions import dense_logits
from .task import MultiLabelMultiMixTask, MultiMixTask
from .teacher import EMATeacher, PretrainedTeacher, SelfDistillationLoss
from .version import __version__
from .views import TwoViews, add_second_view, split_views
from .weights import attend, manifold_mixup_weights, sample_weights

__all__ = [
    'EMATeacher',
    'MultiLabelMultiMixTask',
    'MultiMixLoss',
    'MultiMixOutput',
    'MultiMixTask',
    'PretrainedTeacher',
    'SelfDistillationLoss',
    'TwoViews',
    '__version__',
    'add_multimix_args',
    'add_second_view',
    'attach',
    'attend',
    'attention_map',
    'calibrate',
    'dense_logits',
    'detach',
    'manifold_mixup_weights',
    'multimix_binary_cross_entropy',
    'multimix_cross_entropy',
    'multimix_kwargs',
    'push_to_hub',
    'sample_weights',
    'split_views',
]
