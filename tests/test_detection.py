"""Test detectors on timm backbones and `timm-multimix detect`, with tiny models and images."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from test_detection_data import write_coco
from torch import nn

from timm_multimix.common.errors import RunError, UsageError
from timm_multimix.detection.detectors import DETECTORS, Settings, create_detector, create_features
from timm_multimix.detection.main import main
from timm_multimix.detection.training import predict, train_detector
from timm_multimix.evaluation.models import RANDOM, Candidate, load_candidate

CONFIG = dict(input_size=(3, 224, 224), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
SMALL = dict(num_train=4, num_test=2, epochs=1, batch_size=2)


def source(model_name, **options) -> Candidate:
    return Candidate(model_name, model_name, RANDOM, dict(model_name=model_name, **options), nn.Identity(), CONFIG)


def batch(size=(64, 96)):
    """Return two images with boxes and one without."""
    boxes = [[[4.0, 4, 40, 30], [50, 20, 80, 60]], [[0.0, 0, 20, 64]], []]
    targets = [dict(boxes=torch.tensor(one).view(-1, 4), labels=torch.ones(len(one), dtype=torch.int64))
               for one in boxes]
    return [torch.rand(3, *size) for _ in boxes], targets


# Families, options that make them small, and the strides that their pyramids can have.
FAMILIES = [
    ('test_resnet', {}, [4, 8, 16, 32]),
    ('swin_tiny_patch4_window7_224', dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)), [4, 8, 16, 32]),
    ('test_efficientnet', {}, [4, 8, 16, 32]),
    ('test_vit', {}, [4, 8, 16, 32]),
    ('eva02_tiny_patch14_224', dict(depth=3), [7, 14, 28]),
    ('test_resnet', dict(output_stride=8), [4, 8]),
]


@pytest.mark.parametrize('name, options, strides, kind', [
    *((*family, 'fcos') for family in FAMILIES), *((*FAMILIES[index], 'fasterrcnn') for index in (0, 4))])
def test_families_train_and_predict(name, options, strides, kind):
    model = source(name, **options)
    settings = Settings(kind, frozen=False, fpn_channels=32, min_size=64)
    detector = create_detector(model, 1, settings)
    strides = [stride for stride in strides if stride >= DETECTORS[kind]]  # FCOS starts at 8
    assert detector.backbone.strides == strides
    images, targets = batch()
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    trained = [p for p in detector.backbone.features.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) > 2
    with torch.no_grad():
        predictions = detector.eval()(images)
        padded = detector.transform(images)[0].tensors
        maps = list(detector.backbone(padded).values())
    assert len(predictions) == 3 and all(one['boxes'].shape[1] == 4 for one in predictions)
    for one, stride in zip(maps, strides, strict=True):
        assert one.shape == (3, 32, *(side // stride for side in padded.shape[2:]))
    # neither resized
    torch.testing.assert_close(padded[0, :, :4, :4], model.normalize(images[0])[:, :4, :4])


@pytest.mark.parametrize('seed', range(5))
def test_distances_to_the_sides_of_boxes_have_a_gradient_from_the_start(seed):
    torch.manual_seed(seed)
    model, settings = source('test_resnet'), Settings(fpn_channels=32, min_size=64)
    detector = create_detector(model, 1, settings)
    distances = detector.head.regression_head(list(detector.backbone(torch.rand(2, 3, 64, 64)).values()))[0]
    assert (distances > 0).float().mean() > 0.9


def test_maps_of_one_stride_are_merged():
    model = source('test_resnet', output_stride=8)
    levels = create_detector(model, 1, Settings('fasterrcnn')).backbone.levels
    channels = create_features(model).feature_info.channels()
    assert [(level.stride, level.maps, level.channels) for level in levels] == [
        (4, (1,), channels[1]), (8, (2, 3, 4), sum(channels[2:]))]


def test_boxes_are_pooled_from_levels_of_their_size():
    model = source('eva02_tiny_patch14_224', depth=3)
    settings = Settings('fasterrcnn', min_size=56, max_size=96)
    align = create_detector(model, 1, settings).roi_heads.box_roi_pool
    boxes = [torch.tensor([[0.0, 0, side, side] for side in (5, 98, 196, 400)])]
    assert align.scales == [1 / 7, 1 / 14, 1 / 28] and align.map_levels(boxes).tolist() == [0, 0, 1, 2]


def test_large_images_get_coarser_levels():
    model = source('test_resnet')
    detector = create_detector(model, 1, Settings(min_size=800, max_size=800, fpn_channels=32))
    assert detector.backbone.strides == [8, 16, 32, 64, 128]


@pytest.mark.parametrize('name, message', [
    ('mixer_s32_224', 'does not accept images of 128 x 192 pixels'),  # it accepts images of one size only
    pytest.param('inception_v3', 'cannot be located exactly', marks=pytest.mark.slow),
    ('test_resnetttt', 'timm has no such model. Did you mean'),
    ('folder/missing', 'no such folder or file'),
])
def test_unusable_models_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        create_detector(load_candidate(name, pretrained=False), 1, Settings())


class Noise(torch.utils.data.Dataset):
    """Random images with one box each."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(3, 64, 64), dict(boxes=torch.tensor([[5.0, 5, 30, 40]]), labels=torch.tensor([1]))


@pytest.mark.parametrize('frozen', [True, False])
def test_frozen_backbones_do_not_change(frozen):
    model = source('test_resnet')
    settings = Settings(frozen=frozen, epochs=1, batch_size=2, fpn_channels=32, min_size=64)
    detector = create_detector(model, 1, settings)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    train_detector(detector, Noise(), settings, torch.device('cpu'))
    changed = {name for name, value in detector.state_dict().items() if not value.equal(before[name])}
    of_backbone = {name for name in changed if name.startswith('backbone.features')}
    assert any(name.startswith('backbone.pyramid') for name in changed) and any('head' in name for name in changed)
    assert bool(of_backbone) is not frozen
    assert not any('running' in name or 'num_batches' in name for name in of_backbone)
    assert not any(m.training for m in detector.modules() if isinstance(m, nn.BatchNorm2d))
    predictions, targets = predict(detector, Noise(), 2, torch.device('cpu'))
    assert len(predictions) == len(targets) == 4


def test_bfloat16_and_losses_that_are_not_finite():
    model = source('test_resnet')
    settings = Settings(epochs=1, batch_size=2, fpn_channels=32, min_size=64, amp=True)
    detector = create_detector(model, 1, settings)
    train_detector(detector, Noise(), settings, torch.device('cpu'))
    nn.init.constant_(detector.head.regression_head.bbox_reg.bias, math.nan)
    with pytest.raises(RunError, match='lower --lr'):
        train_detector(detector, Noise(), settings, torch.device('cpu'))


def save_run(folder, entry='state_dict'):
    """Write the folder of a run of a grayscale model with three classes. The metric belongs to `entry`."""
    options = dict(num_classes=3, in_chans=1)
    models = {name: timm.create_model('test_resnet', **options) for name in ('state_dict', 'state_dict_ema')}
    folder.mkdir()
    torch.save(dict(
        {name: model.state_dict() for name, model in models.items()}, metric_of=entry,
        args=dict(model='test_resnet', img_size=32, mean=[0.3], std=[0.6], **options)), folder / 'last.pth.tar')
    return models[entry]


@pytest.mark.parametrize('entry', ['state_dict', 'state_dict_ema'])
def test_runs_give_their_weights_without_the_classifier(tmp_path, entry):
    model = save_run(tmp_path / 'run', entry).eval()
    for path in (tmp_path / 'run', tmp_path / 'run' / 'last.pth.tar'):
        found = load_candidate(str(path))
        config = found.data_config
        assert (config['mean'], config['std'], found.img_mode) == ((0.3,), (0.6,), 'L')
        assert config['input_size'] == (1, 32, 32)
        images = torch.rand(1, 1, 64, 64)
        maps = create_features(found).eval()(images)
        assert torch.equal(maps[-1], model.forward_features(images))
        assert ('ema' in found.weights) is ('ema' in entry)


class Detect:
    """Run the command."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.out = self.err = ''

    def __call__(self, *models, **options) -> int:
        self.capsys.readouterr()
        given = [part for name, value in ({'output': self.folder / 'out'} | options).items()
                 for part in ((f'--{name.replace("_", "-")}',) if value is True else
                              (f'--{name.replace("_", "-")}', str(value)))]
        status = main([*map(str, models), *given])
        self.out, self.err = self.capsys.readouterr()
        return status

    def results(self) -> dict:
        return json.loads((self.folder / 'out' / 'results.json').read_text())


@pytest.fixture
def detect(tmp_path, capsys, monkeypatch, restored_logging):
    monkeypatch.chdir(tmp_path)
    return Detect(tmp_path, capsys)


def test_compares_backbones_and_continues(detect, tmp_path):
    save_run(tmp_path / 'run')
    assert detect(tmp_path / 'run', **SMALL) == 0, detect.err
    first = detect.results()
    assert set(first['models']) == {'run'} and detect.out.split()[0] == 'backbone'
    assert {'mAP', 'mAP50', 'mAP75', 'mAP_small', 'std', 'seeds'} <= set(first['models']['run'])
    assert 0 <= first['models']['run']['mAP'] <= 1 and first['models']['run']['mAP_large'] is None
    assert first['conditions']['settings']['frozen'] and first['conditions']['settings']['min_size'] == 96
    # Further backbones and seeds do not repeat the finished rows.
    assert detect(tmp_path / 'run', 'test_resnet', seeds=2, **SMALL) == 0, detect.err
    second = detect.results()
    assert 'already contains 1 of 4 rows' in detect.err and set(second['models']) == {'run', 'test_resnet'}
    assert second['models']['run']['seeds']['0'] == first['models']['run']['seeds']['0']
    assert list(second['models']['test_resnet']['seeds']) == ['0', '1'] and '±' in detect.out
    assert (tmp_path / 'out' / 'predictions-test_resnet.png').read_bytes().startswith(b'\x89PNG')
    # Results of other weights and of other options are not mixed.
    shutil.rmtree(tmp_path / 'run')
    save_run(tmp_path / 'run')
    assert detect(tmp_path / 'run', **SMALL) == 0 and 'other weights' in detect.err
    assert list(detect.results()['models']['run']['seeds']) == ['0']
    second = detect.results()
    assert detect('test_resnet', **{**SMALL, 'epochs': 2}) == 2
    assert 'epochs was 1, is 2' in detect.err and detect.results() == second


def test_trains_on_coco_files(detect, tmp_path):
    images = {f'{index}.png': (64 + 8 * index, 48) for index in range(4)}
    boxes = [dict(image_id=10 * (index + 1), category_id=3 if index else 90, bbox=[2, 3, 30, 30]) for index in range(3)]
    data = write_coco(tmp_path / 'data', images, boxes)
    options = dict(data=data, test_data=data, epochs=1, batch_size=2, fpn_channels=32, workers=0)
    assert detect('test_vit', detector='fasterrcnn', **options) == 0, detect.err
    settings = detect.results()['conditions']['settings']
    assert not settings['frozen'] and settings['hflip'] == 0.5
    assert (settings['min_size'], settings['max_size']) == (48, 80)
    (tmp_path / 'data' / 'images' / '2.png').write_bytes(b'no image')
    assert detect('test_vit', output=tmp_path / 'other', **options) == 1
    assert '2.png cannot be read' in detect.err and len(detect.err.strip().splitlines()) == 2


@pytest.mark.parametrize('models, options, message', [
    (['test_resnet'], dict(data='demo/scene'), 'choose from demo/scenes, coco:'),
    (['test_resnet'], dict(data='coco:images'), 'no test split'),
    (['test_resnet'], dict(data='coco:images:file.json', test_data='demo/scenes'), 'images is not a folder'),
    (['test_resnet'], dict(data='voc:missing'), 'missing does not contain VOCdevkit/VOC2012'),
    (['test_resnet'], dict(test_data='voc:missing'), 'missing does not contain'),
    (['test_resnet'], dict(fpn_channels=40), 'multiple of 32'),
    (['test_resnet'], dict(epochs=0), 'whole number, 1 or more'),
    (['test_resnet'], dict(lr='nan'), 'above 0'),
    (['test_resnet'], dict(hflip=1.5), 'at most 1'),
    (['test_resnet'], dict(frozen=True, finetune=True), 'not allowed with'),
    (['test_resnet'], dict(opt='nonesuch'), '--opt nonesuch'),
    (['test_resnet'], dict(device='nonesuch'), '--device nonesuch'),
    (['test_resnet'], dict(max_size=50), 'less than the shorter side'),
    (['test_resnet', 'test_resnet'], {}, 'given twice'),
    (['nonesuch'], {}, 'Model nonesuch: timm has no such model'),
    (['resnet10t.nonesuch'], dict(pretrained=True), 'resnet10t'),
    (['test_resnet.nonesuch'], {}, 'test_resnet'),
    (['mixer_s32_224'], {}, 'cannot be the backbone of a detector'),
])
def test_mistakes_are_refused_in_one_line(detect, models, options, message):
    assert detect(*models, **{**SMALL, **options}) == 2
    assert message in detect.err and len(detect.err.strip().splitlines()) == 1
    assert not os.listdir(detect.folder)


def test_output_that_is_no_folder_of_ours(detect, tmp_path):
    (tmp_path / 'out').mkdir()
    for text, message in (('{}', 'is not a comparison of detectors'), ('{', 'results.json')):
        (tmp_path / 'out' / 'results.json').write_text(text)
        assert detect('test_resnet', **SMALL) == 2 and message in detect.err
        assert (tmp_path / 'out' / 'results.json').read_text() == text
    assert detect('test_resnet', output=tmp_path / 'out' / 'results.json') == 2
    assert 'not a writable folder' in detect.err


@pytest.mark.slow  # waits for the lock
def test_two_processes_do_not_share_an_output_folder(detect, tmp_path):
    (tmp_path / 'out').mkdir()
    holder = ('import sys; from timm_multimix.common.files import lock_folder; lock_folder(sys.argv[1]); print(); '
              'sys.stdout.flush(); sys.stdin.read()')
    with subprocess.Popen(
            [sys.executable, '-c', holder, tmp_path / 'out'], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert detect('test_resnet', **SMALL) == 2
        assert 'is in use by another run' in detect.err
        assert 'choose another --output' in detect.err and os.listdir(tmp_path / 'out') == ['.lock']


def test_a_missing_extra_is_named(detect, monkeypatch):
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    assert detect('test_resnet', **SMALL) == 2
    assert "faster-coco-eval, which is not installed: pip install 'timm-multimix[detect]'" in detect.err


@pytest.mark.slow
def test_an_interrupted_comparison_continues(detect, tmp_path):
    command = [sys.executable, '-m', 'timm_multimix.detection', 'test_resnet', '--seeds', '50', '--num-train', '8',
               '--num-test', '2', '--epochs', '1', '--output', str(tmp_path / 'out')]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'out' / 'results.json').exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and 'continues' in errors and 'Traceback' not in errors
    kept = detect.results()['models']['test_resnet']['seeds']
    assert detect('test_resnet', num_train=8, num_test=2, epochs=1, seeds=len(kept) + 1) == 0
    now = detect.results()['models']['test_resnet']['seeds']
    assert len(now) == len(kept) + 1 and {seed: now[seed] for seed in kept} == kept


@pytest.mark.slow
def test_several_processes_train_and_count_every_image_once(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29611', '-m',
               'timm_multimix.detection', 'test_resnet', '--num-train', '6', '--num-test', '3', '--epochs', '1', '-b',
               '2', '--device', 'cpu', '--finetune', '--output', str(tmp_path / 'out')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['conditions']['settings']['processes'] == 2 and done.stdout.count('backbone') == 1


@pytest.mark.slow
def test_random_features_learn_to_find_objects(detect):
    assert detect('test_resnet', num_train=200, num_test=50, epochs=6, finetune=True) == 0
    assert detect.results()['models']['test_resnet']['mAP50'] > 0.005
