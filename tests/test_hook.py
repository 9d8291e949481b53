"""Tests of attach() and of the handle that it returns."""
import copy
import io
import pickle

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from timm_multimix.dense.hook import attach, dense_logits
from timm_multimix.dense.positions import position_features
from timm_multimix.losses.module import MultiMixOutput


def build(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).train()


@pytest.fixture
def images():
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def reference(model, images):
    """Output of a copy of the model without attach, with the same random state."""
    state = torch.get_rng_state()
    features = copy.deepcopy(model).forward_features(images)
    torch.set_rng_state(state)
    logits = copy.deepcopy(model)(images)
    torch.set_rng_state(state)
    return features, logits


@pytest.mark.parametrize('kwargs', [{}, {'drop_rate': 0.3}])
def test_dense_output(images, kwargs):
    model = build(**kwargs)
    features, logits = reference(model, images)
    handle = attach(model)
    output = model(images)
    assert isinstance(output, MultiMixOutput)
    assert torch.equal(output.logits, logits)
    assert output.dense_logits.shape == (3, 9, 7)
    if not kwargs:
        torch.testing.assert_close(output.dense_logits, dense_logits(model, features), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.attention.sum(1), torch.ones(3))
    assert output.attention.requires_grad
    assert handle.reads_positions


def test_pooled_output_has_no_logits_at_positions(images):
    model = build()
    logits = reference(model, images)[1]
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    attach(model, 'pooled')
    output = model(images)
    assert torch.equal(output.logits, logits)
    assert output.dense_logits is None
    assert output.attention is None
    assert len(calls) == 1


def test_evaluation_does_not_change(images):
    model = build().eval()
    expected = model(images)
    attach(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(('name', 'kwargs'), [('test_resnet', {}), ('levit_128s', {}), ('test_vit', {})])
def test_remove_restores_classes_and_attributes(name, kwargs):
    model = build(name, **kwargs)
    before = [(module, type(module), set(module.__dict__), module.training) for module in model.modules()]
    keys = list(model.state_dict())
    handle = attach(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model, before[0][1])
    assert type(model).__name__ == before[0][1].__name__
    handle.remove()
    assert [(module, type(module), set(module.__dict__), module.training) for module in model.modules()] == before
    handle.remove()


def test_attaching_again_replaces_the_settings(images):
    model = build()
    original = type(model)
    first = attach(model)
    second = attach(model, 'pooled')
    assert model(images).dense_logits is None
    first.remove()
    assert isinstance(model(images), MultiMixOutput)
    second.remove()
    assert type(model) is original


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(('duplicate', 'name', 'size'), [
    (copy.deepcopy, 'test_resnet', 96), (_saved, 'test_resnet', 96), (_pickled, 'levit_128s', 224)])
def test_copies_are_attached_and_independent(duplicate, name, size):
    model = build(name)
    attach(model)
    twin = duplicate(model)
    images = torch.randn(3, 3, size, size)
    expected, output = copy.deepcopy(model)(images), twin(images)
    torch.testing.assert_close(output.dense_logits, expected.dense_logits)
    attach(twin, 'pooled').remove()
    assert isinstance(model(images), MultiMixOutput)
    assert isinstance(twin(images), torch.Tensor)


def test_batch_norm_in_head_sees_the_pooled_batch_once():
    model, plain = build('levit_128s'), build('levit_128s')
    attach(model)
    images = torch.randn(4, 3, 224, 224)
    output, logits = model(images), plain(images)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(output.dense_logits.mean(1), logits, atol=1e-5, rtol=1e-4)
    state, expected = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert model.head.bn._multimix_statistics is None


class NormHead(nn.Module):
    """Model with average pooling, BatchNorm with or without an activation, and a linear classifier."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = norm
        self.fc = nn.Linear(8, 5)

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x):
        return self.fc(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), BatchNormAct2d(8), nn.BatchNorm2d(8, affine=False)])
def test_evaluation_agrees_with_the_objective_of_training(norm):
    torch.manual_seed(0)
    model = NormHead(norm).train()
    with torch.no_grad():
        model.stem.weight *= 10  # make positions differ more than their averages
    images = torch.randn(64, 3, 16, 16)
    attach(model)
    for _ in range(150):  # let the running statistics converge to those of this batch
        trained = model(images)
    model.eval()
    torch.testing.assert_close(model(images), trained.logits, atol=0.03, rtol=0.03)
    dense = dense_logits(model, model.forward_features(images))
    torch.testing.assert_close(dense, trained.dense_logits, atol=0.1, rtol=0.03)


def test_backward_after_another_forward_pass():
    model = NormHead(nn.BatchNorm2d(8)).train()
    attach(model)
    images, others = torch.randn(2, 8, 3, 16, 16)

    def gradient(between):
        model.zero_grad()
        loss = model(images).dense_logits.square().mean()
        between()
        loss.backward()
        return model.fc.weight.grad.clone(), model.stem.weight.grad.clone()

    torch.testing.assert_close(gradient(lambda: model(others * 9)), gradient(lambda: None))


def test_distributed(images, tmp_path):
    model = build()
    attach(model)
    expected = copy.deepcopy(model)(images)
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        output = nn.parallel.DistributedDataParallel(model)(images)
        for value, wanted in zip(output, expected, strict=True):
            torch.testing.assert_close(value, wanted)
        (output.dense_logits * output.attention[..., None]).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attach_does_not_run_the_model():
    model = build('levit_128s')
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    attach(model)
    assert not any(module.__dict__.get('attention_bias_cache') for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not calls


def test_attention_token(images):
    model = build('test_vit')
    images = torch.randn(2, 3, 160, 160)
    handle = attach(model, attention='token', attention_norm='softmax')
    assert not handle.reads_positions
    output = model(images)
    features = model.forward_features(images)
    scores = torch.einsum('brd,bd->br', features[:, 1:], features[:, 0])
    torch.testing.assert_close(output.attention, scores.softmax(1))
    with pytest.raises(ValueError, match='class token'):
        attach(build(), attention='token')


def test_attention_uniform(images):
    model = build()
    attach(model, attention='uniform')
    assert model(images).attention is None


@pytest.mark.parametrize(('name', 'kwargs', 'size'), [
    ('test_resnet', {}, 64), ('test_convnext', {}, 64), ('test_vit', {}, 160),
    pytest.param('shvit_s1', {}, 64, marks=pytest.mark.slow),
    pytest.param(
        'swin_tiny_patch4_window7_224',
        {'img_size': 64, 'window_size': 2, 'depths': (1, 1, 1, 1), 'drop_path_rate': 0}, 64, marks=pytest.mark.slow)])
def test_compile_without_graph_break(name, kwargs, size):
    model = build(name, **kwargs)
    images = torch.randn(2, 3, size, size)
    attach(model)
    expected = copy.deepcopy(model)(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    output = compiled(images)
    for value, wanted in zip(output, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-3)
    (output.dense_logits.sum() + output.attention.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_channels_last(images):
    model = build()
    attach(model)
    expected = copy.deepcopy(model)(images)
    output = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for value, wanted in zip(output, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-3)


def test_autocast(images):
    model = build()
    attach(model)
    with torch.autocast('cpu', torch.bfloat16):
        output = model(images)
    assert output.dense_logits.dtype == torch.bfloat16
    assert output.attention.dtype == torch.float32


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_gradient_checkpointing(name):
    model = build(name)
    images = torch.randn(2, 3, 160, 160)
    attach(model)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    gradients = []
    for each in (model, twin):
        output = each(images)
        (output.dense_logits.square().mean() + (output.attention * output.attention).sum()).backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_logits_of_distilled_heads_are_averaged():
    model = build('deit_tiny_distilled_patch16_224', img_size=32)
    images = torch.randn(2, 3, 32, 32)
    attach(model)
    expected = model(images)
    model.set_distilled_training()
    for value, wanted in zip(model(images), expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(('name', 'kwargs', 'image_size', 'grid'), [
    ('test_resnet', {}, (64, 96), (2, 3)), ('test_resnet', {}, (160, 64), (5, 2)),
    ('test_vit', {'img_size': (64, 96)}, (64, 96), (4, 6)), ('test_vit', {'dynamic_img_size': True}, (64, 96), (4, 6)),
    ('swin_tiny_patch4_window7_224', {'img_size': (64, 128), 'window_size': 2, 'depths': (1, 1, 1, 1)}, (64, 128),
     (2, 4)),
    ('coat_lite_tiny', {'img_size': (64, 128)}, (64, 128), (2, 4)),
    ('efficientvim_m1', {}, (128, 256), (2, 4)),
    ('crossvit_9_240', {}, (64, 128), (14, 14))])
def test_other_image_sizes(name, kwargs, image_size, grid):
    model = build(name, **kwargs)
    attach(model)
    output = model(torch.randn(2, 3, *image_size))
    assert output.dense_logits.shape[1] == grid[0] * grid[1]


def test_streams_align_on_images_that_are_not_square():
    model = build('coat_tiny', img_size=(64, 128)).eval()
    handle = attach(model)
    head = model._multimix.head
    features = [torch.zeros(1, 1 + 4 ** (2 - scale) * 8, 152) for scale in range(3)]
    features[0][0, 1:] = torch.arange(16.0).repeat_interleave(8)[:, None]  # two values in each row of the 8 x 16 grid
    rows = position_features(head, features, (64, 128))[0][0, :, 0].unflatten(0, (2, 4))
    torch.testing.assert_close(rows, torch.tensor([[3.0, 3, 4, 4], [11, 11, 12, 12]]))
    handle.remove()


def test_hidden_states_are_not_positions():
    model = build('efficientvim_m1').eval()
    attach(model)
    head = model._multimix.head
    assert [layout.has_positions for layout in head.layouts] == [False, False, False, True]
    features = model.forward_features(torch.randn(1, 3, 192, 192))
    positions = position_features(head, features)
    assert {stream.shape[1] for stream in positions} == {features[-1].shape[-1]}
    torch.testing.assert_close(positions[0][:, 1], features[0].mean(-1))
    torch.testing.assert_close(positions[-1], features[-1].mT)


class Handmade(nn.Module):
    """Custom channels-last model that has only forward_features and forward_head of timm's protocol."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward_features(self, x):
        return self.embed(x).permute(0, 2, 3, 1)

    def forward_head(self, x):
        return self.fc(self.norm(x.mean((1, 2))))

    def forward(self, x):
        return self.forward_head(self.forward_features(x - x.mean()))


def test_custom_model():
    torch.manual_seed(0)
    model = Handmade().train()
    images = torch.randn(2, 3, 16, 24)
    logits = model(images)
    attach(model)
    output = model(images)
    assert torch.equal(output.logits, logits)
    positions = model.forward_features(images - images.mean()).flatten(1, 2)
    torch.testing.assert_close(output.dense_logits, model.fc(model.norm(positions)))


def test_models_outside_the_protocol():
    class Plain(nn.Sequential):
        pass

    with pytest.raises(TypeError, match='MultiMixLoss'):
        attach(Plain(nn.Linear(3, 4)))
    for wrapped in (nn.DataParallel(build()), torch.compile(build(), backend='eager')):
        with pytest.raises(TypeError, match='before you wrap the model'):
            attach(wrapped)
    with pytest.raises(ValueError, match='num_classes=0'):
        attach(timm.create_model('test_resnet', num_classes=0))
    with pytest.raises(ValueError, match='global_pool'):
        attach(timm.create_model('test_resnet', num_classes=7, global_pool=''))


@pytest.mark.parametrize(('options', 'message'), [
    ({'mode': 'deep'}, 'pooled, dense'), ({'attention': 'cam'}, 'MultiMixLoss'), ({'attention': 'key'}, 'uniform'),
    ({'attention_norm': 'l2'}, 'softmax')])
def test_bad_options(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert not hasattr(model, '_multimix')
