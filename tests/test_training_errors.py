"""User errors end the script with a one-line message and exit status 2, before files are written."""
import argparse
import logging
import signal
import sys

import pytest
import timm
import torch
from training_helpers import make_images

pytest_plugins = ['training_helpers']

WRONG_OPTIONS = {
    'misspelt option': (['--multimx', 'dense'], 'Did you mean --multimix'),
    'misspelt model': (['--model', 'resnt50'], 'Did you mean resnet50'),
    'model name with a slash': (['--model', 'timm/resnet50'], 'hf-hub:timm/resnet50'),
    'wrong choice': (['--multimix', 'sparse'], 'invalid choice'),
    'wrong number': (['--lr', 'fast'], 'invalid float'),
    'batch of one': (['--multimix', 'dense', '-b', '1'], '--batch-size'),
    'scheduled batch of one': (
        ['--multimix', 'dense', '--train-img-sizes', '32', '64', '--train-batch-sizes', '8', '1'], '--batch-size'),
    'long tuples': (['--multimix', 'pooled', '--multimix-tuple-length', '9', '-b', '8'], 'batch size 8, got 9'),
    'clean weight above 1': (
        ['--multimix', 'dense', '--multimix-clean-weight', '2'], ': --multimix-clean-weight must be in'),
    'decreasing alpha range': (['--multimix', 'dense', '--multimix-alpha', '2', '1'], ': --multimix-alpha must be'),
    'no epoch left': (['--multimix', 'dense', '--multimix-start-epoch', '2', '--multimix-off-epoch', '1'],
                      'and --multimix-off-epoch 1 leave no epoch'),
    'MultiMix with TorchScript': (['--multimix', 'dense', '--torchscript'], 'torchcompile'),
    'MultiMix with distillation': (['--multimix', 'dense', '--kd-model-name', 'resnet18'], 'distillation'),
    'NaFlex, MultiMix on some batches': (
        ['--multimix', 'dense', '--naflex-loader', '--multimix-prob', '0.5'], 'use --multimix-prob 1.'),
    'NaFlex, two views': (
        ['--multimix', 'dense', '--naflex-loader', '--multimix-teacher', 'ema', '--multimix-views', '2'],
        'use --multimix-views 1.'),
    'NaFlex, another teacher': (
        ['--multimix', 'dense', '--naflex-loader', '--multimix-teacher', 'test_vit'],
        'supports --multimix-teacher ema'),
    'MultiMix with JSD': (['--multimix', 'dense', '--jsd-loss', '--aug-splits', '2'], 'jsd'),
    'MultiMix with an asymmetric loss': (['--multimix', 'dense', '--loss', 'asl'], 'AsymmetricLoss'),
    'missing folder': (['--data-dir', 'nowhere'], 'nowhere: no such folder'),
    'empty folder name': (['--data-dir', ''], 'embedded digits'),
    'unknown dataset': (['--dataset', 'cifar10'], 'torch/'),
    'two datasets': (['--data-dir', '.', '--dataset', 'demo/digits'], "--dataset ''"),
    'no mixes': (['--multimix', 'dense', '--multimix-n', '0'], ': --multimix-n must be at least 1, got 0.'),
    'unknown demo': (['--dataset', 'demo/numbers'], 'demo/digits'),
    'class count': (['--num-classes', '7'], '10 classes'),
    'misspelt type of dataset': (['--dataset', 'torhc/cifar10', '--data-dir', '.'], 'Did you mean torch?'),
    'misspelt demo': (['--dataset', 'demo/digts'], 'Did you mean demo/digits'),
    'demo without its type': (['--dataset', 'digits'], 'Did you mean demo/digits?'),
    'torchvision without a folder': (['--dataset', 'torch/cifar10'], 'give --data-dir too.'),
    'dataset to download': (['--dataset', 'torch/cifar10', '--data-dir', '.'], 'You can use --dataset-download'),
    'misspelt loss': (['--loss', 'bec'], 'Did you mean bce?'),
    'misspelt choice that looks like a token': (['--kd-distill-type', 'tokn'], 'Did you mean token?'),
    'reduction of a loss': (
        ['--model', 'test_resnet', '--loss', 'asl', '--asl-reduction', 'sum'], '--asl-reduction batchmean'),
    'probability': (['--hflip', '2'], '--hflip must be between 0 and 1, got 2.0'),
    'one ratio of CutMix': (['--cutmix-minmax', '0.3'], '--cutmix-minmax takes a lowest and a highest value'),
    'smoothing': (['--smoothing', '1'], '--smoothing must be 0 or more and below 1'),
    'misspelt interpolation': (['--train-interpolation', 'bicubc'], 'Did you mean bicubic?'),
    'misspelt metric': (['--eval-metric', 'topp1'], 'Did you mean top1'),
    'misspelt image mode': (['--input-img-mode', 'RBG'], 'Did you mean RGB'),
    'misspelt teacher': (['--multimix', 'dense', '--multimix-teacher', 'emma'], 'Did you mean ema?'),
    'misspelt model to distil from': (['--kd-model-name', 'resnt18'], 'Did you mean resnet18'),
    'misspelt backend of a compiler': (
        ['--model', 'test_resnet', '--torchcompile', 'inductr'], '--torchcompile inductr: Invalid backend'),
    'no position to train': (
        ['--model', 'test_vit', '--multimix', 'dense', '--multimix-pooled-weight', '0'],
        'set --multimix-pooled-weight or --multimix-clean-weight above 0, or for example --multimix-prob 0.5'),
    'schedule longer than the run': (
        ['--sched', 'wsd', '--epochs', '3', '--decay-epochs', '9'], '--sched wsd: wsd schedule requires'),
    'missing config': (['--config', 'nothing.yaml'], 'nothing.yaml'),
    'empty config': (['--config', ''], '--config is empty'),
    'first epoch below 0': (['--start-epoch', '-1'], '--start-epoch must be 0 or more, got -1'),
    'first epoch after the last one': (
        ['--model', 'test_resnet', '--start-epoch', '9'], '--start-epoch 9 must be less than the 9 epochs'),
    'patch sequences for another model': (
        ['--model', 'test_resnet', '--naflex-loader'], '--naflex-loader needs a model for patch sequences'),
    'all images held out': (['--model', 'test_resnet', '--calibrate', '0.9999'], 'is too large'),
    'missing checkpoint': (['--resume', 'nothing.pth.tar'], 'nothing.pth.tar'),
    'missing weights': (['--initial-checkpoint', 'nothing.pth'], 'nothing.pth'),
    'nothing to resume': (['--resume', 'auto'], '--experiment'),
    'unknown optimizer': (['--model', 'test_resnet', '--opt', 'sdg'], 'Did you mean sgd'),
    'unknown optimizer in lookahead': (['--opt', 'lookahead_adamv'], 'Did you mean adam'),
    'experiment above the output folder': (['--experiment', '../../x'], 'outside of the output folder'),
    'experiment elsewhere': (['--experiment', '/tmp/x'], 'outside of the output folder'),
    'negative limit': (['--max-nonfinite', '-1'], '--max-nonfinite'),
    'unknown schedule': (['--model', 'test_resnet', '--sched', 'cosin'], 'Did you mean cosine?'),
    'unknown model argument': (['--model', 'test_resnet', '--model-kwargs', 'deep=3'], 'deep'),
    'unknown metric': (['--eval-metric', 'top3'], 'top1'),
    'unknown augmentation': (['--model', 'test_resnet', '--aa', 'rnd-m9'], 'Did you mean rand?'),
    'unknown crop': (['--train-crop-mode', 'x'], 'rkrc'),
    'late start of MultiMix': (
        ['--model', 'test_resnet', '--epochs', '2', '--multimix', 'dense', '--multimix-start-epoch', '2'], '2 epochs'),
    'late stop': (['--model', 'test_resnet', '--epochs', '2', '--stop-epoch', '3'], 'stop-epoch'),
    'jsd without splits': (['--jsd-loss'], '--aug-splits'),
    'two losses': (['--bce-loss', '--loss', 'asl'], '--loss asl'),
    'image smaller than a patch': (['--model', 'test_vit', '--img-size', '8'], '8'),
    'size that the model does not accept': (
        ['--model', 'test_vit', '--img-size', '40', '--model-kwargs', 'img_size=32'], 'img'),
    'mean of too many channels': (['--model', 'test_resnet', '--mean', '1', '2'], '--mean'),
    'attention by a missing class token': (
        ['--model', 'test_resnet', '--multimix', 'dense', '--multimix-attention', 'token'], 'class token'),
    'batch larger than the data': (['--model', 'test_resnet', '-b', '2000'], '--batch-size'),
    'zero epochs': (['--epochs', '0'], '--epochs'),
    'learning rate that is not a number': (['--lr', 'nan'], '--lr must be a finite number'),
    'negative learning rate': (['--lr', '-1'], '--lr must be 0 or more, got -1'),
    'infinite learning rate': (['--lr-base', 'inf'], '--lr-base must be a finite number'),
    'infinite mixup': (['--mixup', 'inf'], '--mixup must be a finite number, got inf'),
    'negative mixup': (['--mixup', '-1'], '--mixup must be 0 or more'),
    'infinite momentum': (['--momentum=-inf'], '--momentum must be a finite number'),
    'list with an infinite value': (['--cutmix-minmax', '0.1', 'inf'], '--cutmix-minmax must be a finite number'),
    'list with a value that is not a number': (['--opt-betas', '0.9', 'nan'], '--opt-betas must be a finite number'),
    'weight decay that is not a number': (['--weight-decay', 'nan'], '--weight-decay must be a finite number'),
    'weights in a folder': (['--initial-checkpoint', '.'], '. is a folder'),
    'stochastic depth of every layer': (['--drop-path', '1'], '--drop-path must be 0 or more and below 1'),
    'decay in the past': (['--decay-epochs', '-1'], '--decay-epochs must be above 0'),
    'a single beta': (['--opt', 'adamw', '--opt-betas', '0.9'], '--opt-betas takes at least two numbers'),
    'device without data': (['--device', 'meta'], '--device meta: '),
    'channels that images do not have': (['--model', 'test_resnet', '--in-chans', '7'], 'images of mode L have 1'),
}


@pytest.mark.parametrize('argv,word', WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_user_error_is_one_line(script, argv, word):
    assert script(*argv) == 2
    errors = [line for line in script.lines if line.startswith('ERROR')]
    assert len(errors) == 1 and script.lines[-1] == errors[0], script.text
    assert word in errors[0]
    assert 'Traceback' not in script.text
    assert script.written() == []


def test_misspelt_choice_in_a_config_file(script, tmp_path):
    (tmp_path / 'config.yaml').write_text('loss: bec')
    assert script('--config', tmp_path / 'config.yaml') == 2
    assert 'argument --loss' in script.lines[-1] and script.lines[-1].endswith('Did you mean bce?')


@pytest.mark.parametrize('argv, purpose, command', [
    (['--dataset', 'hfds/x/y'], '--dataset hfds/x/y needs the package datasets,', 'pip install datasets'),
    (['--dataset', 'hfids/x'], '--dataset hfids/x needs the package datasets,', 'pip install datasets'),
    (['--dataset', 'TFDS/x'], '--dataset TFDS/x needs the packages tensorflow and tensorflow-datasets,',
     'pip install tensorflow tensorflow-datasets'),
    (['--dataset', 'wds/x', '--data-dir', '.'], '--dataset wds/x needs the package webdataset,',
     'pip install webdataset'),
    (['--log-wandb'], '--report-to wandb needs the package wandb,', 'pip install wandb'),
])
def test_missing_package_is_named_with_the_command_that_installs_it(script, monkeypatch, argv, purpose, command):
    for package in ('datasets', 'tensorflow', 'tensorflow_datasets', 'webdataset', 'wandb'):
        monkeypatch.setitem(sys.modules, package, None)
    assert script(*argv) == 2
    number = 'are' if 'packages' in purpose else 'is'
    assert script.lines == [f'ERROR: {purpose} which {number} not installed: {command}']


def test_only_the_missing_package_is_named(script, monkeypatch):
    for package in ('tensorflow', 'tensorflow_datasets'):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, 'tensorflow', argparse)
    assert script('--dataset', 'tfds/x') == 2
    assert script.lines[-1].endswith('the package tensorflow-datasets, which is not installed: '
                                     'pip install tensorflow-datasets')


def test_pooled_ignores_options_of_dense_with_a_warning(script, image_folder):
    checkpoint = script.folder / 'none.pth.tar'
    torch.save({'state_dict': timm.create_model('test_resnet', num_classes=3).state_dict()}, checkpoint)
    argv = ['--multimix', 'pooled', '--validate', checkpoint]
    options = ['--multimix-attention', 'cam', '--multimix-attention-norm', 'softmax', '--multimix-attention-grad',
               '--multimix-shared-weights', '--multimix-pooled-weight', '0.3']
    assert script.train(image_folder, *argv, *options) == 0, script.text
    [warning] = [line for line in script.lines if 'without effect' in line]
    names = sorted(option for option in options if option.startswith('--'))
    assert sorted(warning.removeprefix('WARNING: ').partition(': without')[0].split(', ')) == names
    assert script.train(image_folder, *argv, '--multimix-preset', 'paper') == 0
    assert 'without effect' not in script.text


def test_another_run_is_not_overwritten(script, image_folder):
    assert script.train(image_folder) == 0
    before = {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')}
    assert script.train(image_folder) == 2
    assert '--resume auto' in script.lines[-1]
    assert {path: path.stat().st_mtime_ns for path in script.folder.rglob('*')} == before
    assert script.train(image_folder, '--resume', 'auto', epochs=2) == 0
    assert script.train(image_folder, resume=script.run_folder() / 'last.pth.tar', epochs=3) == 0


def test_checkpoint_of_another_model_is_named(script, image_folder):
    assert script.train(image_folder) == 0
    path = script.run_folder() / 'last.pth.tar'
    assert script.train(image_folder, model='test_convnext', resume=path, experiment='other') == 2
    assert 'is a checkpoint of test_resnet, not of --model test_convnext' in script.lines[-1]


def test_validated_checkpoint_of_another_model_is_named(script, image_folder):
    assert script.train(image_folder) == 0
    path = script.run_folder() / 'last.pth.tar'
    assert script.train(image_folder, model='test_convnext', validate=path) == 2
    assert script.lines[-1].endswith('is a checkpoint of test_resnet, not of --model test_convnext.')


def _spoil_images(folder):
    for path in folder.rglob('*.png'):
        path.write_bytes(b'noise')


def test_worker_error_during_shutdown(script, tmp_path):
    """PyTorch raises the error of a dead worker at any point of the main process, such as while the run is ending."""
    def handler(number, frame):
        raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed.')

    def send_signal(record):
        if 'A batch could not be loaded' in record.getMessage():
            signal.raise_signal(signal.SIGCHLD)
        return True

    _spoil_images(make_images(tmp_path / 'images' / 'train'))
    previous = signal.signal(signal.SIGCHLD, handler)
    logger = logging.getLogger('timm_multimix.common.command_line')
    logger.addFilter(send_signal)
    try:
        assert script.train(tmp_path / 'images', val_split='') == 1
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, previous)
        logger.removeFilter(send_signal)
    assert 'ERROR: A batch could not be loaded: 10 images in a row cannot be read' in script.text
    assert script.lines[-1] == 'No checkpoint has been written yet.'


def test_failure_of_validate_is_reported(script, tmp_path):
    images = make_images(tmp_path / 'images' / 'train').parent
    make_images(images / 'validation')
    assert script.train(images) == 0
    _spoil_images(images / 'validation')
    assert script.train(images, validate=script.run_folder() / 'last.pth.tar') == 1
    assert script.lines[-1].startswith('ERROR: A batch could not be loaded: 10 images in a row')


def test_multimix_options_without_multimix_are_reported(script, image_folder):
    assert script.train(image_folder, '--no-multimix-balance') == 0
    assert any('--no-multimix-balance' in line and 'without effect' in line for line in script.lines)


def test_unavailable_cuda(script):
    if torch.cuda.is_available():
        pytest.skip('CUDA is available')
    assert script('--device', 'cuda') == 2
    assert '--device cpu' in script.text


@pytest.fixture
def mistake(script, tmp_path):
    """Return a function that trains on a folder of images and expects one error line."""
    def check(word, *argv, classes=('a', 'b'), **options):
        if not (tmp_path / 'data' / 'train').exists():
            make_images(tmp_path / 'data' / 'train', classes)
        assert script.train(tmp_path / 'data', *argv, **options) == 2, script.text
        assert word in script.lines[-1] and script.lines[-1].startswith('ERROR'), script.text
        assert script.written() == []
    return check


def test_folder_without_images(script, tmp_path):
    (tmp_path / 'data').mkdir()
    assert script.train(tmp_path / 'data') == 2
    assert '0 images' in script.lines[-1]


def test_single_class(mistake):
    mistake('single class', classes=['a'])


def test_splits_that_disagree(mistake, tmp_path):
    make_images(tmp_path / 'data' / 'validation', ['a', 'c'])
    mistake('different classes')


def test_number_of_classes_that_disagrees(mistake):
    mistake('has 2 classes', num_classes=5)


def test_file_that_is_not_a_checkpoint(mistake, tmp_path):
    path = tmp_path / 'junk.pth.tar'
    path.write_bytes(b'not a checkpoint')
    mistake('junk.pth.tar', resume=path)


def test_checkpoint_with_code(mistake, tmp_path):
    torch.save({'state_dict': print}, tmp_path / 'evil.pth.tar')
    mistake('evil.pth.tar', resume=tmp_path / 'evil.pth.tar')


def test_pretrained_weights_with_code(mistake, tmp_path):
    torch.save({'state_dict': print}, tmp_path / 'evil.pth')
    mistake('objects that are not data', '--pretrained', pretrained_path=tmp_path / 'evil.pth')


@pytest.mark.parametrize('content, reason', [
    (b'not a checkpoint', 'is not a PyTorch checkpoint'), (b'ext', 'is not a PyTorch checkpoint'), (b'', 'is empty')])
def test_file_that_does_not_contain_weights(mistake, tmp_path, content, reason):
    path = tmp_path / 'junk.txt'
    path.write_bytes(content)
    mistake(reason, initial_checkpoint=path)
    teacher = dict(multimix='dense', multimix_teacher='test_resnet', multimix_teacher_path=path)
    mistake(reason, **teacher)


def test_damaged_weights_to_start_from(mistake, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    mistake('differs from its checksum', initial_checkpoint=path)


def test_weights_of_the_format_before_pytorch_1_6(script, image_folder, tmp_path):
    for name, model in (('good', 'test_resnet'), ('other', 'test_vit')):
        state = timm.create_model(model, num_classes=3).state_dict()
        torch.save(state, tmp_path / f'{name}.pth', _use_new_zipfile_serialization=False)
    assert script.train(image_folder, initial_checkpoint=tmp_path / 'good.pth') == 0, script.text
    assert script.train(image_folder, initial_checkpoint=tmp_path / 'other.pth', experiment='other') == 2
    assert 'not a PyTorch checkpoint' not in script.text


@pytest.mark.parametrize('option', ['resume', 'initial_checkpoint'])
def test_checkpoint_of_another_model(mistake, tmp_path, option):
    torch.save({'state_dict': timm.create_model('test_vit').state_dict()}, tmp_path / 'vit.pth.tar')
    mistake('--model' if option == 'initial_checkpoint' else 'does not fit', **{option: tmp_path / 'vit.pth.tar'})


def test_output_that_cannot_be_written(script, image_folder):
    (script.folder / 'file').write_text('')
    for output in ('file', 'file/below'):
        assert script.train(image_folder, output=output) == 2
        assert len(script.lines) == 1 and 'is not a writable folder' in script.lines[0], script.text


def test_validation_on_training_images_is_reported(script, tmp_path):
    make_images(tmp_path / 'data' / 'train', ['a', 'b'])
    assert script.train(tmp_path / 'data') == 0
    assert 'uses the training images' in script.text
