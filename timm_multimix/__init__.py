"""MultiMix for timm: train image classifiers on a thousand interpolations of every mini-batch, for almost no time."""
from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .calibration.temperature import calibrate
    from .data.views import TwoViews, add_second_view, split_views
    from .dense.hook import attach, detach
    from .dense.positions import dense_logits
    from .hub import push_to_hub
    from .losses import (
        MultiMixLoss,
        MultiMixOutput,
        attend,
        attention_map,
        manifold_mixup_weights,
        multimix_binary_cross_entropy,
        multimix_cross_entropy,
        sample_weights,
    )
    from .options import add_multimix_args, multimix_kwargs
    from .task import MultiLabelMultiMixTask, MultiMixTask
    from .teacher import EMATeacher, PretrainedTeacher, SelfDistillationLoss

# The module of each name. Modules are imported when a name is first used: the losses need neither timm nor the Hub.
_MODULES = {
    'EMATeacher': 'teacher',
    'MultiLabelMultiMixTask': 'task',
    'MultiMixLoss': 'losses',
    'MultiMixOutput': 'losses',
    'MultiMixTask': 'task',
    'PretrainedTeacher': 'teacher',
    'SelfDistillationLoss': 'teacher',
    'TwoViews': 'data.views',
    'add_multimix_args': 'options',
    'add_second_view': 'data.views',
    'attach': 'dense.hook',
    'attend': 'losses',
    'attention_map': 'losses',
    'calibrate': 'calibration',
    'dense_logits': 'dense.positions',
    'detach': 'dense.hook',
    'manifold_mixup_weights': 'losses',
    'multimix_binary_cross_entropy': 'losses',
    'multimix_cross_entropy': 'losses',
    'multimix_kwargs': 'options',
    'push_to_hub': 'hub',
    'sample_weights': 'losses',
    'split_views': 'data.views',
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
