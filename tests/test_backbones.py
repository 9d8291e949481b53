"""The smallest model of every timm module, at its smallest image size with more than one position."""
import copy
import functools
import importlib.util
import pathlib
import pickle
import re
import types

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_multimix import MultiMixLoss, attach
from timm_multimix.calibration.temperature import fold_temperature, scalable_classifier
from timm_multimix.dense.hook import dense_logits
from timm_multimix.dense.positions import position_logits

BACKBONES = {
    'beit': ('beit_base_patch16_224', 32),
    'byoanet': ('eca_botnext26ts_256', 64),
    'byobnet': ('mobileone_s0', 64),
    'cait': ('cait_xxs24_224', 32),
    'coat': ('coat_tiny', 64),
    'convit': ('convit_tiny', 32),
    'convmixer': ('convmixer_768_32', 32),
    'convnext': ('convnext_atto_rms', 64),
    'cpubone': ('cpubone_nano', 64),
    'crossvit': ('crossvit_tiny_240', 240),
    'csatv2': ('csatv2', 128),
    'cspnet': ('cs3darknet_focus_s', 64),
    'cspnext': ('cspnext_tiny', 64),
    'davit': ('davit_tiny', 64),
    'deepseek_vit': ('deepseek_vit_412m', 112),
    'deit': ('deit_tiny_patch16_224', 32),
    'densenet': ('densenet121', 64),
    'dla': ('dla102x', 64),
    'dpn': ('dpn48b', 64),
    'edgenext': ('edgenext_x_small', 64),
    'efficientformer': ('efficientformer_l1', 224),
    'efficientformer_v2': ('efficientformerv2_s0', 64),
    'efficientnet': ('tinynet_c', 64),
    'efficientvim': ('efficientvim_m1', 96),
    'efficientvit_mit': ('efficientvit_b0', 64),
    'efficientvit_msra': ('efficientvit_m0', 96),
    'eva': ('eva02_tiny_patch14_224', 32),
    'fasternet': ('fasternet_t0', 64),
    'fastvit': ('fastvit_s12', 64),
    'focalnet': ('focalnet_tiny_srf', 64),
    'gcvit': ('gcvit_xxtiny', 64),
    'gemma4_vit': ('gemma4_vit_167m', 32),
    'ghostnet': ('ghostnet_050', 64),
    'hardcorenas': ('hardcorenas_b', 64),
    'hgnet': ('hgnetv2_b0', 64),
    'hiera': ('hiera_tiny_224', 64),
    'hieradet_sam2': ('sam2_hiera_tiny', 64),
    'hrnet': ('hrnet_w18_small', 64),
    'iformer': ('iformer_s', 64),
    'inception_next': ('inception_next_atto', 64),
    'inception_resnet_v2': ('inception_resnet_v2', 112),
    'inception_v3': ('inception_v3', 112),
    'inception_v4': ('inception_v4', 112),
    'lcnetv2': ('lcnetv2_small', 64),
    'levit': ('levit_384_s8', 64),
    'lowformer': ('lowformer_b0', 64),
    'mambaout': ('mambaout_femto', 64),
    'maxxvit': ('maxvit_pico_rw_256', 64),
    'metaformer': ('caformer_s18', 64),
    'mlp_mixer': ('mixer_s16_224', 32),
    'mobilenetv3': ('mobilenetv3_small_050', 64),
    'mobilenetv5': ('mobilenetv5_base', 32),
    'mobilevit': ('mobilevit_xxs', 64),
    'mvitv2': ('mvitv2_tiny', 64),
    'naflexvit': ('naflexvit_base_patch16_siglip', 32),
    'nasnet': ('nasnetalarge', 64),
    'nest': ('nest_tiny', 32),
    'nextvit': ('nextvit_small', 64),
    'nfnet': ('nf_regnet_b0', 64),
    'pit': ('pit_xs_224', 32),
    'pnasnet': ('pnasnet5large', 64),
    'pvt_v2': ('pvt_v2_b0', 64),
    'qwen3_vit': ('qwen3_vit_306m', 32),
    'rdnet': ('rdnet_tiny', 64),
    'regnet': ('regnetv_040', 64),
    'repghost': ('repghostnet_050', 64),
    'repvit': ('repvit_m1', 64),
    'res2net': ('res2net50_26w_4s', 64),
    'resnest': ('resnest26d', 64),
    'resnet': ('resnet18', 64),
    'resnetv2': ('resnetv2_18', 64),
    'rexnet': ('rexnet_100', 64),
    'selecsls': ('selecsls42', 96),
    'senet': ('legacy_seresnet18', 64),
    'sequencer': ('sequencer2d_s', 32),
    'shvit': ('shvit_s1', 96),
    'sknet': ('skresnet18', 64),
    'starnet': ('starnet_s050', 64),
    'swiftformer': ('swiftformer_xs', 64),
    'swin_transformer': ('swin_tiny_patch4_window7_224', 64),
    'swin_transformer_v2': ('swinv2_tiny_window16_256', 64),
    'swin_transformer_v2_cr': ('swinv2_cr_tiny_224', 64),
    'tiny_vit': ('tiny_vit_11m_224', 64),
    'tnt': ('tnt_s_legacy_patch16_224', 32),
    'tresnet': ('tresnet_m', 64),
    'twins': ('twins_svt_small', 64),
    'vgg': ('vgg11', 64),
    'visformer': ('visformer_tiny', 64),
    'vision_transformer': ('vit_tiny_patch16_224', 32),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', 64),
    'vision_transformer_relpos': ('vit_srelpos_small_patch16_224', 32),
    'vision_transformer_sam': ('samvit_base_patch16_224', 32),
    'vitamin': ('vitamin_small_224', 32),
    'volo': ('volo_d1_224', 32),
    'vovnet': ('ese_vovnet19b_slim_dw', 64),
    'xception': ('legacy_xception', 64),
    'xception_aligned': ('xception41p', 64),
    'xcit': ('xcit_nano_12_p8_224', 32),
}
# Options that make the largest of these models small. Their heads do not change.
SMALLER = {
    **{name: dict(depth=2) for name in (
        'beit_base_patch16_224', 'deepseek_vit_412m', 'gemma4_vit_167m', 'naflexvit_base_patch16_siglip',
        'qwen3_vit_306m', 'samvit_base_patch16_224')},
    'sequencer2d_s': dict(layers=(1, 1, 1, 1)),
    'vgg11': dict(mlp_ratio=1 / 64),
}
# modules whose token features have the channels first
CHANNELS_FIRST_TOKENS = {'efficientvim'}
AVERAGE_POOLING_AND_AFFINE_HEAD = {
    'byoanet', 'byobnet', 'convmixer', 'cspnet', 'cspnext', 'densenet', 'dla', 'dpn', 'efficientformer',
    'efficientformer_v2', 'efficientnet', 'efficientvim', 'efficientvit_msra', 'fastvit', 'focalnet', 'gcvit',
    'hrnet', 'iformer', 'inception_resnet_v2', 'inception_v3', 'inception_v4', 'lcnetv2', 'levit', 'maxxvit',
    'mlp_mixer', 'mobilenetv5', 'mobilevit', 'mvitv2', 'nasnet', 'nest', 'nextvit', 'nfnet', 'pnasnet', 'pvt_v2',
    'regnet', 'repvit', 'res2net', 'resnest', 'resnet', 'resnetv2', 'rexnet', 'selecsls', 'senet', 'sequencer',
    'shvit', 'sknet', 'starnet', 'swiftformer', 'swin_transformer', 'swin_transformer_v2', 'swin_transformer_v2_cr',
    'tresnet', 'twins', 'visformer', 'vision_transformer_relpos', 'vision_transformer_sam', 'vovnet', 'xception',
    'xception_aligned',
}


DOCS = pathlib.Path(__file__).parents[1] / 'docs'


@functools.cache
def image_size_argument(name, size):
    try:
        timm.create_model(name, img_size=size, device='meta')
    except TypeError:
        return {}
    return {'img_size': size}


def build(name, size, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        name, num_classes=7, **image_size_argument(name, size), **SMALLER.get(name, {}), **kwargs)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Use one thread: a second thread does not help on such small maps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', params=BACKBONES)
def backbone(request):
    """The attached model of a module with random parameters in its head, images, and features in evaluation mode."""
    name, size = BACKBONES[request.param]
    model = build(name, size).eval()
    handle = attach(model)
    torch.manual_seed(1)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = model.forward_features(images)
    randomize_head(model, features)
    return types.SimpleNamespace(
        module=request.param, model=model, handle=handle, images=images, features=features)


def streams_of(features):
    return list(features) if isinstance(features, (list, tuple)) else [features]


def randomize_head(model, features):
    """Add noise to the parameters of the head, because the parameters of untrained heads are often zero."""
    leaves = [stream.clone().requires_grad_() for stream in streams_of(features)]
    logits = model.forward_head(leaves if isinstance(features, (list, tuple)) else leaves[0])
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.data += 0.1 * torch.randn_like(parameter)


def channel_axis(backbone, stream):
    if stream.ndim == 4:
        return -1 if getattr(backbone.model, 'output_fmt', None) == 'NHWC' else 1
    return 1 if backbone.module in CHANNELS_FIRST_TOKENS else -1


def constant_features(backbone):
    """Return constant features with another vector for each example."""
    filled = []
    for stream in streams_of(backbone.features):
        axis = channel_axis(backbone, stream) % stream.ndim
        shape = [n if i in (0, axis) else 1 for i, n in enumerate(stream.shape)]
        filled.append(torch.randn(shape).expand_as(stream).contiguous())
    return filled if isinstance(backbone.features, (list, tuple)) else filled[0]


def test_list_of_modules_is_complete():
    assert set(BACKBONES) == {
        module for module in timm.list_modules()
        if timm.list_models(module=module) and importlib.util.find_spec(f'timm.models.{module}')}  # not those of tests


@torch.no_grad()
def test_constant_map(backbone):
    model, features = backbone.model, constant_features(backbone)
    expected = model.forward_head(features)
    if backbone.module == 'pit':  # its features are class tokens
        with pytest.raises(ValueError, match='class tokens only'):
            dense_logits(model, features)
        dense = position_logits(model, model._multimix.head, features, [features.expand(-1, 5, -1)])
    else:
        dense = dense_logits(model, features)
    assert len(dense) == len(expected)
    assert expected.std(0).min() > 1e-4  # the head depends on the features
    torch.testing.assert_close(dense, expected[:, None].expand_as(dense), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_average_pooling_with_affine_head_averages_to_the_prediction(backbone):
    if backbone.module not in AVERAGE_POOLING_AND_AFFINE_HEAD:
        pytest.skip('other pooling, or a head that is not affine')
    torch.testing.assert_close(
        dense_logits(backbone.model, backbone.features).mean(1),
        backbone.model.forward_head(backbone.features), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_attach_and_remove_do_not_change_the_model(backbone):
    model = build(*BACKBONES[backbone.module]).eval()
    expected, keys = model(backbone.images), list(model.state_dict())
    before = [(module, type(module), set(module.__dict__)) for module in model.modules()]
    handle = attach(model)
    assert torch.equal(model(backbone.images), expected)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert torch.equal(model(backbone.images), expected)
    assert [(module, type(module), set(module.__dict__)) for module in model.modules()] == before


@pytest.mark.slow
def test_attached_model_pickles_and_copies(backbone):
    model = build(*BACKBONES[backbone.module], device='meta')
    attach(model, attention='uniform')
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        output = twin.train()(backbone.images.to('meta'))
        assert output.logits.shape == (2, 7)
        assert output.dense_logits.ndim == 3 and output.dense_logits.shape[::2] == (2, 7)


def test_dense_step_trains_the_parameters_of_a_plain_step(backbone):
    model, handle, target = backbone.model.train(), backbone.handle, torch.tensor([3, 5])
    torch.manual_seed(0)
    handle.enabled = False
    F.cross_entropy(model(backbone.images), target).backward()
    expected = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    handle.enabled = True
    output = model(backbone.images)
    loss = MultiMixLoss(num_mixes=8)(output, target)
    if not handle.reads_positions:
        loss = loss + F.cross_entropy(output.logits, target)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    assert gradients.keys() >= expected
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@torch.no_grad()
def test_temperature_is_folded_into_the_classifier(backbone, monkeypatch):
    model = backbone.model
    features = [stream.clone().requires_grad_() for stream in streams_of(backbone.features)]
    features = features if isinstance(backbone.features, (list, tuple)) else features[0]
    monkeypatch.setattr(model, 'forward_features', lambda *args, **kwargs: features)  # only the head has to run
    expected = model(backbone.images)
    layers = [model.get_submodule(name) for name in scalable_classifier(model, backbone.images)]
    state = [copy.deepcopy(layer.state_dict()) for layer in layers]
    fold_temperature(model, 1.7, backbone.images)
    logits = model(backbone.images)
    for layer, before in zip(layers, state, strict=True):
        layer.load_state_dict(before)
    torch.testing.assert_close(logits, expected / 1.7, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(backbone.images), expected)


def generator():
    spec = importlib.util.spec_from_file_location('generate_backbones', DOCS / 'generate_backbones.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_matches_the_installed_timm():
    text = (DOCS / 'backbones.md').read_text()
    assert f'timm {timm.__version__}.' in text, 'run `python docs/generate_backbones.py`'
    counts = {module: int(n) for module, n in re.findall(r'^\| (\w+) \| (\d+) \|', text, re.MULTILINE)}
    for n, module in re.findall(r'(\d+) of (\w+)', text):
        counts[module] = counts.get(module, 0) + int(n)
    assert counts == {module: len(timm.list_models(module=module)) for module in BACKBONES}


@pytest.mark.slow
def test_every_architecture_and_the_table():
    generate_backbones = generator()
    results = [
        generate_backbones.try_architecture(name, module) for name, module in generate_backbones.architectures()]
    assert all(result.pooled for result in results if result.classifies)
    assert len({result.module for result in results if result.positions}) == len(BACKBONES)
    assert generate_backbones.render(results) == (DOCS / 'backbones.md').read_text()
