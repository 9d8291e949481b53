"""Attached models that are wrapped, exported, or changed after attach()."""
import copy
import functools
import inspect
import types

import pytest
import timm
import torch
from torch import nn

from timm_multimix import MultiMixLoss, MultiMixOutput, MultiMixTask, attach, dense_logits, detach


def build(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).train()


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


def _partial(model):
    model.forward = functools.partial(model.forward)


def _closure(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _compiled(model):
    model.forward = torch.compile(model.forward, backend='eager')


def _mixed_precision(model):
    """As Accelerate's prepare(): autocast around forward, and the output converted to float32."""
    autocast = torch.autocast('cpu', torch.bfloat16)(model.forward.__func__)

    def forward(*args, **kwargs):
        output = autocast(*args, **kwargs)
        if isinstance(output, MultiMixOutput):
            return MultiMixOutput(*(value if value is None else value.float() for value in output))
        return output.float()
    model.forward = types.MethodType(forward, model)


WRAPPERS = [_partial, _closure, _compiled, _mixed_precision]


@pytest.mark.parametrize('mode', ['dense', 'pooled'])
@pytest.mark.parametrize('wrap', WRAPPERS)
def test_wrapping_the_forward_of_an_attached_model(wrap, mode, images):
    model = build()
    handle = attach(model, mode)
    wrap(model)
    output = model(images)
    assert isinstance(output, MultiMixOutput) and output.logits.dtype == torch.float32
    MultiMixLoss(10)(output, torch.arange(3)).backward()
    assert model.conv1[0].weight.grad is not None
    assert isinstance(model.eval()(images), torch.Tensor)
    detach(model.train())
    assert 'removed' in repr(handle)
    assert isinstance(model(images), torch.Tensor)


def test_wrapped_forward_and_batch_norm_in_the_head():
    model = build('levit_128s')
    attach(model)
    _mixed_precision(model)
    output = model(torch.randn(2, 3, 224, 224))
    torch.testing.assert_close(output.dense_logits.float().mean(1), output.logits, atol=0.02, rtol=0.1)


@pytest.mark.parametrize('name', ['forward', 'forward_head', 'forward_features'])
def test_methods_replaced_on_the_instance_are_refused(name):
    model = build()
    setattr(model, name, functools.partial(getattr(model, name)))
    for mode in ('dense', 'pooled'):
        with pytest.raises(TypeError, match=f'{name} of this ResNet was replaced'):
            attach(model, mode)
    assert isinstance(model(torch.randn(2, 3, 64, 64)), torch.Tensor)


class TwoOutputs(timm.models.resnet.ResNet):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits

    def forward_head(self, x, pre_logits=False):
        return (super().forward_head(x),) * 2


def test_models_with_several_outputs_are_refused(images):
    model = TwoOutputs(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=7).train()
    with pytest.raises(ValueError, match=r'forward_head must return logits .* got a tuple'):
        attach(model)
    attach(model, 'pooled')
    with pytest.raises(ValueError, match='returned a tuple: return only the logits'):
        model(images)


class AttentionHead(timm.models.resnet.ResNet):
    def __init__(self, **kwargs):
        super().__init__(timm.models.resnet.BasicBlock, (1, 1, 1, 1), **kwargs)
        self.attention = torch.nn.MultiheadAttention(512, 4, batch_first=True)

    def forward_head(self, x, pre_logits=False):
        x = x.flatten(2).mT
        return self.fc(self.attention(x, x, x)[0].mean(1))


def test_head_with_a_module_that_is_not_called(images):
    """nn.MultiheadAttention uses the weight of its last layer without a call of the layer."""
    model = AttentionHead(num_classes=7).train()
    attach(model)
    model(images).dense_logits.sum().backward()
    assert model.attention.out_proj.weight.grad.any()


@pytest.mark.parametrize(('name', 'mode'), [('test_resnet', 'dense'), ('test_resnet', 'pooled'), ('test_vit', 'dense')])
def test_signatures_do_not_change(name, mode):
    model = build(name)
    methods = ('forward', 'forward_features', 'forward_head')
    expected = {method: inspect.signature(getattr(model, method)) for method in methods}
    attach(model, mode)
    assert {method: inspect.signature(getattr(model, method)) for method in methods} == expected


@pytest.mark.parametrize(('mode', 'strict'), [('dense', False), ('dense', True), ('pooled', False)])
def test_attached_model_exports_with_dynamic_shapes(strict, mode, images):
    model = build().eval()
    attach(model, mode)
    shapes = {'x': {0: torch.export.Dim('batch', min=1, max=64)}}
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)
    more = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(more), model(more))


def test_attached_model_is_traced_by_fx(images):
    model = build().eval()
    attach(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.name for node in traced.graph.nodes if node.op == 'placeholder'] == ['x']
    torch.testing.assert_close(traced(images), model(images))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext'])
def test_attached_model_without_classifier_gives_features_in_evaluation_only(name, images):
    model = build(name)
    attach(model)
    model.reset_classifier(0)
    assert model.eval()(images).shape == (3, model.num_features)
    with pytest.raises(ValueError, match='num_classes=0'):
        model.train()(images)
    model.reset_classifier(5)
    assert model(images).dense_logits.shape[2] == 5
    detach(model)
    assert model(images).shape == (3, 5)


def test_attaching_again_without_success_keeps_the_settings(images):
    model = build()
    handle = attach(model)
    with pytest.raises(ValueError, match='class token'):
        attach(model, attention='token')
    assert model(images).dense_logits is not None
    handle.remove()
    assert isinstance(model(images), torch.Tensor)


def _sequential(width):
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 4))


def _normalized(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))


@pytest.mark.parametrize('head', [_sequential, _normalized, lambda width: nn.Linear(width, 4)])
@pytest.mark.parametrize(('name', 'owner'), [('test_resnet', ''), ('test_vit', ''), ('test_convnext', 'head')])
def test_head_replaced_after_attach_is_inspected_again(name, owner, head, images):
    images = torch.randn(3, 3, 160, 160) if name == 'test_vit' else images
    model, plain = build(name), build(name)
    handle = attach(model)
    classifier = head(model.num_features)
    attribute = 'fc' if owner or name == 'test_resnet' else 'head'
    setattr(model.get_submodule(owner), attribute, classifier)
    setattr(plain.get_submodule(owner), attribute, copy.deepcopy(classifier))
    expected = attach(plain) and plain(images)
    for value, wanted in zip(model(images), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    features = model.eval().forward_features(images)
    assert dense_logits(model, features).shape == expected.dense_logits.shape
    handle.remove()
    assert all(type(module).__module__.startswith(('torch', 'timm')) for module in model.modules())
    assert isinstance(model(images), torch.Tensor)


def test_layer_added_to_the_head_is_found(images):
    model = build()
    model.fc = nn.Sequential(nn.Linear(model.num_features, 7))
    attach(model)
    before = model(images).dense_logits
    model.fc.insert(0, nn.BatchNorm1d(model.num_features))
    assert model(images).dense_logits.shape == before.shape


def test_unsupported_new_head_is_refused(images):
    model = build()
    attach(model)
    model.fc = nn.Sequential(nn.SyncBatchNorm(model.num_features), nn.Linear(model.num_features, 4))
    with pytest.raises(ValueError, match='does not support a SyncBatchNorm in the head'):
        model(images)
    detach(model)
    model.fc = nn.Linear(model.num_features, 4)
    assert model(images).shape == (3, 4)


def test_copies_do_not_inspect_again():
    """A copy's head consists of the copied modules, so that training a copy costs no inspection."""
    model = build()
    attach(model)
    twin = copy.deepcopy(model)
    calls = []
    twin.fc.register_forward_hook(lambda *_: calls.append(1))
    twin(torch.randn(2, 3, 64, 64))
    assert len(calls) <= 2


def test_detach():
    model = build()
    kind = type(model)
    detach(model)
    attach(model)
    detach(nn.DataParallel(model))
    assert type(model) is kind and not hasattr(model, '_multimix')
    handle = attach(model, 'pooled')
    detach(model)
    detach(model)
    handle.remove()
    assert type(model) is kind


def test_handle_shows_its_settings_and_is_a_context_manager(images):
    model = build()
    with pytest.raises(KeyError), attach(model, attention='uniform') as handle:
        assert repr(handle) == "MultiMixHandle(ResNet, mode='dense', attention='uniform')"
        raise KeyError
    assert repr(handle) == "MultiMixHandle(ResNet, mode='dense', attention='uniform', removed)"
    assert isinstance(model(images), torch.Tensor)


def test_task_detaches_a_model_that_was_attached(images):
    model = build()
    attach(model)
    MultiMixTask(model, mode='off', verbose=False)
    assert isinstance(model(images), torch.Tensor)
