"""Dense MultiMix of models whose images have different numbers of positions: timm's NaFlex models."""
import pytest
import timm
import torch
from timm.data.naflex_dataset import NaFlexCollator
from timm.models.naflexvit import batch_patchify

from timm_multimix import EMATeacher, MultiMixLoss, MultiMixOutput, MultiMixTask, SelfDistillationLoss, attach

SIZES = (24, 16), (8, 32)  # 6 and 4 patches of 8 x 8 pixels
NUM_CLASSES = 3


def build(**options):
    torch.manual_seed(0)
    return timm.create_model(
        'naflexvit_base_patch16_gap', num_classes=NUM_CLASSES, embed_dim=16, depth=1, num_heads=2, patch_size=8,
        **options).train()


@pytest.fixture(scope='module')
def images():
    """Two images of different aspect ratios, as sequences of patches."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for height, width in SIZES:
        patches, (rows, columns) = batch_patchify(torch.randn(1, 3, height, width, generator=generator), (8, 8))
        coordinates = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        sequences.append(dict(
            patches=patches[0], patch_coord=coordinates, patch_valid=torch.ones(len(coordinates), dtype=torch.bool)))
    return sequences


@pytest.fixture(scope='module')
def target():
    return torch.tensor([0, 2])


def collate(images, length):
    return NaFlexCollator(max_seq_len=length)([(image, 0) for image in images])[0]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def unpadded(model, images):
    """Output of the attached model for each image alone, padded, and the mask."""
    outputs = [model(collate([image], len(image['patches']))) for image in images]
    mask = torch.nn.utils.rnn.pad_sequence([image['patch_valid'] for image in images], batch_first=True)
    dense, attention = (
        torch.nn.utils.rnn.pad_sequence([getattr(output, name)[0] for output in outputs], batch_first=True)
        for name in ('dense_logits', 'attention'))
    return MultiMixOutput(torch.cat([output.logits for output in outputs]), dense, attention), mask


@pytest.mark.parametrize('kwargs, options', [
    (dict(), dict()),
    (dict(), dict(attention='uniform')),
    (dict(), dict(attention='cam')),
    (dict(global_pool='map'), dict(tuple_length=1, shared_weights=True)),
    (dict(global_pool='token', class_token=True), dict(attention='token', attention_norm='softmax', tuple_length=1)),
])
def test_step_on_padded_images_equals_that_of_single_images(images, target, kwargs, options):
    model = build(**kwargs)
    task = MultiMixTask(model, num_mixes=30, verbose=False, **options)
    batch = collate(images, 8)  # the longest image has 6 patches
    torch.manual_seed(0)
    padded = task(batch, target)
    padded['loss'].backward()
    found = gradients(model)

    model.zero_grad()
    output, mask = unpadded(model, images)
    # All images have padding at the last two positions. Mixes are drawn for them too.
    output = output._replace(
        dense_logits=torch.nn.functional.pad(output.dense_logits, (0, 0, 0, 2)),
        attention=torch.nn.functional.pad(output.attention, (0, 2)))
    mask = torch.nn.functional.pad(mask, (0, 2))
    torch.manual_seed(0)
    terms = task.loss.terms(output, target, mask=mask)
    terms['loss'].backward()
    torch.testing.assert_close(padded['output'], output.logits)
    torch.testing.assert_close({name: padded[name] for name in ('dense', 'pooled')}, {
        name: terms[name].detach() for name in ('dense', 'pooled')})
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


def test_attention_of_the_output_is_0_at_padding(images, target):
    model = build()
    attach(model)
    batch = collate(images, 8)
    output = model(batch)
    assert output.dense_logits.shape == (2, 8, NUM_CLASSES)
    assert torch.equal(output.attention > 0, batch['patch_valid'])
    criterion = SelfDistillationLoss(MultiMixLoss(30, tuple_length=2))
    polluted = output.dense_logits.masked_fill(~batch['patch_valid'].unsqueeze(2), torch.nan)
    assert criterion(output._replace(dense_logits=polluted), target, EMATeacher(model)(batch)).isfinite()


def test_masks_that_do_not_fit_are_refused():
    class Model(timm.create_model('test_vit', num_classes=3).__class__):
        def forward(self, x, *others):
            return self.forward_head(self.forward_features(x), False, *others)

        def forward_head(self, x, pre_logits=False, mask=None, other=None):
            return super().forward_head(x, pre_logits)

    model = timm.create_model('test_vit', num_classes=3, dynamic_img_size=True)
    model.__class__ = Model
    attach(model.train())
    images = torch.randn(2, 3, 32, 32)
    positions = model(images).attention.shape[1]
    mask = torch.ones(2, positions, dtype=torch.bool)
    mask[1, 1:] = False
    assert torch.equal(model(images, mask).attention > 0, mask)
    with pytest.raises(ValueError, match=r'mask must be boolean with shape \(b, r\)'):
        model(images, mask[:, 1:])
    with pytest.raises(ValueError, match='one tensor besides the features'):
        model(images, mask, mask)
