"""MultiMix for timm: train image classifiers on a thousand interpolations of every mini-batch, for almost no time."""
from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .calibration.temperature import calibrate
    from .data.views import TwoViews, add_second_view, split_views
    from .dense.hook import attach, dense_logits, detach
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

# Modules are imported when a name is first used: the losses need neither timm nor the Hub.
_NAMES = {
    'calibration': ('calibrate',),
    'data.views': ('TwoViews', 'add_second_view', 'split_views'),
    'dense.hook': ('attach', 'dense_logits', 'detach'),
    'hub': ('push_to_hub',),
    'losses': (
        'MultiMixLoss', 'MultiMixOutput', 'attend', 'attention_map', 'manifold_mixup_weights',
        'multimix_binary_cross_entropy', 'multimix_cross_entropy', 'sample_weights'),
    'options': ('add_multimix_args', 'multimix_kwargs'),
    'task': ('MultiLabelMultiMixTask', 'MultiMixTask'),
    'teacher': ('EMATeacher', 'PretrainedTeacher', 'SelfDistillationLoss'),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    'EMATeacher', 'MultiLabelMultiMixTask', 'MultiMixLoss', 'MultiMixOutput', 'MultiMixTask', 'PretrainedTeacher',
    'SelfDistillationLoss', 'TwoViews', '__version__', 'add_multimix_args', 'add_second_view', 'attach', 'attend',
    'attention_map', 'calibrate', 'dense_logits', 'detach', 'manifold_mixup_weights', 'multimix_binary_cross_entropy',
    'multimix_cross_entropy', 'multimix_kwargs', 'push_to_hub', 'sample_weights', 'split_views',
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
