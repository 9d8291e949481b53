"""Tests of the logits at every position: constant maps, averages, BatchNorm, dropout and layouts."""
import pytest
import timm
import torch
from torch import nn

from timm_multimix.dense.heads import blueprint, find_head
from timm_multimix.dense.hook import dense_logits
from timm_multimix.dense.positions import Layout, align_streams, grid_size

MODELS = {
    'linear after average pooling': ('test_resnet', {}),
    'norm after pooling': ('test_convnext', {}),
    'linear after a convolution': ('test_efficientnet', {}),
    'hidden layer after pooling': ('mobilenetv3_small_050', {}),
    'channels last': ('swin_tiny_patch4_window7_224', {'img_size': 64, 'window_size': 2}),
    'class token': ('test_vit', {}),
    'average of tokens': ('test_vit', {'global_pool': 'avg'}),
    'attention pooling': ('test_vit', {'global_pool': 'map'}),
    'attention pooling with position embedding': ('resnet50_clip', {}),
    'concatenated average and maximum': ('test_resnet', {'global_pool': 'catavgmax'}),
    'average plus maximum': ('test_resnet', {'global_pool': 'avgmax'}),
    'convolution as classifier': ('resnetv2_18', {}),
    'two distilled heads': ('deit_tiny_distilled_patch16_224', {'img_size': 32}),
    'BatchNorm after pooling': ('levit_128s', {}),
    'BatchNorm before pooling': ('efficientvit_b0', {}),
    'streams of tokens': ('crossvit_tiny_240', {}),
}


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs)


def image(model, batch_size=2):
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or model.pretrained_cfg['input_size'][1:]
    return torch.randn(batch_size, 3, *size)


def constant_like(features):
    """Constant features of the same shapes."""
    if not isinstance(features, torch.Tensor):
        return [constant_like(stream) for stream in features]
    if features.ndim == 4 and features.shape[1] > features.shape[-1]:
        return torch.randn(*features.shape[:2], 1, 1).expand_as(features)
    return torch.randn(len(features), *[1] * (features.ndim - 2), features.shape[-1]).expand_as(features)


@pytest.mark.parametrize('head', MODELS)
def test_constant_map(head):
    name, kwargs = MODELS[head]
    model = build(name, **kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.1)  # initial weights of a head can be zero
    with torch.no_grad():
        features = constant_like(model.forward_features(image(model)))
        expected = model.forward_head(features)
        dense = dense_logits(model, features)
    assert dense.shape[::2] == expected.shape
    torch.testing.assert_close(dense, expected[:, None].expand_as(dense), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('head', [
    'linear after average pooling', 'linear after a convolution', 'channels last', 'convolution as classifier',
    'BatchNorm after pooling'])
def test_average_pooling_with_affine_head_averages_to_the_prediction(head):
    name, kwargs = MODELS[head]
    model = build(name, **kwargs).eval()
    with torch.no_grad():
        features = model.forward_features(image(model))
        torch.testing.assert_close(
            dense_logits(model, features).mean(1), model.forward_head(features), atol=1e-5, rtol=1e-4)


def test_order_is_row_major():
    model = build('test_resnet').eval()
    features = torch.randn(2, model.num_features, 3, 5)
    dense = dense_logits(model, features)
    torch.testing.assert_close(dense[:, 7], model.fc(features[:, :, 1, 2]))


def test_hooks_and_parametrizations_of_the_classifier_are_applied():
    model = build('test_resnet').eval()
    with torch.no_grad():
        features = model.forward_features(image(model))
        plain = dense_logits(model, features)
        hook = model.get_classifier().register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(dense_logits(model, features), plain + 1)
        hook.remove()
        nn.utils.parametrize.register_parametrization(model.get_classifier(), 'weight', nn.Tanh())
        torch.testing.assert_close(dense_logits(model, features).mean(1), model.forward_head(features))


def test_class_token_model_reads_the_position():
    model = build('test_vit').eval()
    with torch.no_grad():
        features = model.forward_features(image(model))
        torch.testing.assert_close(dense_logits(model, features)[:, 3], model.head(features[:, 4]))


def test_batch_norm_in_head_uses_the_pooled_batch():
    model = build('levit_128s').train()
    for module in (model.head.bn, model.head_dist.bn):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    features = torch.randn(4, 16, model.num_features, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = dense_logits(model, features)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.head.bn) is nn.BatchNorm1d
    assert not hasattr(model.head.bn, '_multimix_statistics')

    expected = model.forward_head(features)
    torch.testing.assert_close(dense.mean(1), expected, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad(dense.mean(1).square().sum(), features)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), features)[0], atol=1e-5, rtol=1e-3)


def test_window_slides_over_a_larger_map():
    model = build('vgg11', mlp_ratio=0.05).eval()
    features = torch.randn(2, 512, 8, 9)
    with torch.no_grad():
        dense = dense_logits(model, features)
        assert dense.shape == (2, 6, 7)
        torch.testing.assert_close(dense[:, 4], model.forward_head(features[:, :, 1:8, 1:8]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dense.mean(1), model.forward_head(features), atol=1e-5, rtol=1e-4)


def test_whole_maps_have_the_gradient_of_the_head():
    model = build('resnet50_clip').train()
    features = torch.randn(2, model.num_features, 2, 3, requires_grad=True)
    maps = features.flatten(2).movedim(2, 1)[..., None, None].expand(-1, -1, -1, 2, 3).flatten(0, 1)
    expected = model.forward_head(maps).unflatten(0, (2, 6))
    dense = dense_logits(model, features)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)
    weight, inputs = torch.randn_like(dense), [features, *model.head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((dense * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs),
        atol=1e-4, rtol=1e-3)


class WeightedHead(nn.Module):
    """Custom head that weights positions, scales channels and normalizes before the classifier."""

    def __init__(self):
        super().__init__()
        self.num_classes = 5
        self.stem = nn.Conv2d(3, 8, 32, 32)
        self.places = nn.Parameter(torch.rand(4, 4))
        self.scale = nn.Parameter(torch.ones(8))
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 5)

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x):
        x = (x * self.places[:x.shape[2], :x.shape[3]]).sum((2, 3)) * self.scale
        return self.fc(self.norm(x))


def test_whole_maps_with_batch_norm():
    model = WeightedHead().train()
    features = torch.randn(6, 8, 4, 4, requires_grad=True)
    dense = dense_logits(model, features)
    pooled = (features * model.places).sum((2, 3))
    vectors = features.flatten(2).movedim(2, 1) * model.places.sum()
    expected = model.fc((vectors - pooled.mean(0)) / (pooled.var(0, correction=0) + model.norm.eps).sqrt())
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)
    got, wanted = (torch.autograd.grad(x.square().sum(), [features, model.places]) for x in (dense, expected))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


class ScaledHead(WeightedHead):
    def forward_head(self, x):
        return self.fc(x.mean((2, 3)) * self.scale)


@pytest.mark.parametrize(('head', 'method'), [(WeightedHead, 'whole'), (ScaledHead, 'single')])
def test_method_does_not_depend_on_initial_values(head, method):
    model = head()
    nn.init.zeros_(model.fc.weight)
    assert find_head(model).method == method


def test_blueprint_has_no_data_and_does_not_change_the_model():
    model = build('levit_128s').eval()
    model(image(model))  # caches attention biases with their autograd graph
    assert any(module.__dict__.get('attention_bias_cache') for module in model.modules())
    copied = blueprint(model)
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_dropout_draws_a_mask_for_each_position():
    model = build('test_resnet', drop_rate=0.5).train()
    features = torch.randn(1, model.num_features, 1, 1).expand(1, -1, 4, 4)
    dense = dense_logits(model, features)[0]
    assert len({tuple(row.tolist()) for row in dense}) == 16


def test_inspection_does_not_change_random_state_and_modes():
    model = build('test_vit').train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    features = torch.randn(2, 101, model.num_features)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    dense_logits(model, features)
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_streams_align_by_average_pooling():
    fine, coarse = torch.randn(2, 24, 3), torch.randn(2, 6, 5)
    aligned = align_streams([fine, coarse], [(6, 4), (3, 2)])
    assert [tuple(stream.shape) for stream in aligned] == [(2, 6, 3), (2, 6, 5)]
    assert torch.equal(aligned[1], coarse)
    torch.testing.assert_close(aligned[0].mean(1), fine.mean(1))
    exact = align_streams([torch.arange(16.0).reshape(1, 16, 1), torch.zeros(1, 4, 1)], [(4, 4), (2, 2)])[0]
    torch.testing.assert_close(exact.flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))


def test_grid_has_the_aspect_ratio_of_the_image():
    assert grid_size(49, None) == (7, 7)
    assert grid_size(50, (100, 200)) == (5, 10)
    assert grid_size(50, (200, 100)) == (10, 5)


@pytest.mark.parametrize(('layout', 'shape'), [
    (Layout(True, 4), (2, 3, 4, 5)), (Layout(False, 4), (2, 4, 5, 3)), (Layout(False, 3, 2), (2, 22, 3)),
    (Layout(True, 3), (2, 3, 20))])
def test_layout(layout, shape):
    features = torch.randn(shape)
    positions = layout.positions(features)
    assert positions.shape == (2, 20, 3)
    rows = features.movedim(1, -1) if layout.channels_first else features
    torch.testing.assert_close(positions[:, -1], rows.flatten(1, -2)[:, -1])
    filled = layout.constant(positions[:, 0], layout.size(features))
    assert filled.shape == shape
    assert torch.equal(layout.positions(filled), positions[:, :1].expand(-1, 20, -1))


def test_model_without_the_protocol():
    with pytest.raises(TypeError, match='MultiMixLoss'):
        dense_logits(nn.Linear(3, 4), torch.randn(2, 3))
