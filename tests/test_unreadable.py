"""Unreadable and 16-bit images, hidden and empty folders, class maps, and runs that fail on images."""
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from training_helpers import make_images

from timm_multimix.data.class_names import dataset_classes
from timm_multimix.data.demo import Part, create_dataset
from timm_multimix.data.image_files import open_image, unreadable_images
from timm_multimix.evaluation import main as evaluate

pytest_plugins = ['training_helpers']

SCRIPT = Path(__file__).parent.parent / 'train_timm.py'


def _chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack('>I', len(data) if length is None else length) + kind + data + struct.pack(
        '>I', zlib.crc32(kind + data))


def _png(*extra: bytes, size: int = 8) -> bytes:
    header = struct.pack('>IIBBBBB', size, size, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(size * (size + 1)))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        (_chunk(b'IHDR', header), *extra, _chunk(b'IDAT', pixels), _chunk(b'IEND', b'')))


def _tiff() -> bytes:
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 0), (279, 4, 64)]
    entries = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + b'\0' * 200


DAMAGED = {
    'text.png': b'not an image',
    'empty.png': b'',
    'truncated.png': _png()[:44],
    'chunk.png': _png(b'\0\0\0\4\1\2\3\4abcdefgh'),
    'second_chunk.png': _png(_chunk(b'IDAT', zlib.compress(bytes(72))[:4]) + b'\0\0\0\4\1\2\3\4abcdefgh'),
    'length.png': _png(_chunk(b'gAMA', b'1234', length=3)),
    'compressed_text.png': _png(_chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10 ** 8)))),
    'tiff.png': _tiff(),
    'huge.png': _png().replace(
        struct.pack('>II', 8, 8), struct.pack('>II', 30000, 30000), 1).replace(
        struct.pack('>I', zlib.crc32(b'IHDR' + struct.pack('>IIBBBBB', 8, 8, 8, 0, 0, 0, 0))),
        struct.pack('>I', zlib.crc32(b'IHDR' + struct.pack('>IIBBBBB', 30000, 30000, 8, 0, 0, 0, 0)))),
    'short.jpg': b'\xff\xd8\xff\xe0' + bytes(30),
    'webp.png': b'RIFF\x10\0\0\0WEBPVP8 ' + bytes(8),
    'ppm.png': b'P6\n8 8\n70000\n' + bytes(200),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_any_error_of_a_decoder_makes_an_image_unreadable(tmp_path, caplog, name):
    make_images(tmp_path / 'train', count=2)
    (tmp_path / 'train' / 'a' / name).write_bytes(DAMAGED[name])
    dataset = create_dataset('', root=str(tmp_path), split='train')
    for _ in range(2):  # named once
        assert all(np.asarray(dataset[index][0]).shape == (32, 32, 3) for index in range(len(dataset)))
    assert [record.getMessage().split(' cannot')[0] for record in caplog.records] == [
        str(tmp_path / 'train' / 'a' / name)]
    record = unreadable_images(dataset)
    assert len(record) == 7 and record.names(record.in_run()) == f'a/{name}'


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted_and_named(script, tmp_path, workers):
    make_images(tmp_path / 'train')
    make_images(tmp_path / 'validation', count=4)
    broken = [f'train/{name}/{index}.png' for name in 'ac' for index in range(2, 6)] + ['validation/b/0.png']
    for path in broken:
        (tmp_path / path).write_bytes(b'junk')
    assert script.train(tmp_path, epochs=2, workers=workers) == 0, script.text
    assert [row['train_unreadable'] for row in script.summary()] == ['8', '8']
    for epoch in range(2):
        line = next(line for line in script.lines if f'Epoch {epoch}: 8 images could not be read in training' in line)
        assert 'a/2.png' in line and 'c/5.png' in line
        assert any(f'Epoch {epoch}: 1 images could not be read in validation' in line and 'b/0.png' in line
                   for line in script.lines)
    totals = next(line for line in script.lines if 'Images that could not be read' in line)
    assert '8 of 24 in training' in totals and '1 of 12 in validation (b/0.png)' in totals
    path = script.run_folder() / 'last.pth.tar'
    assert script.train(tmp_path, validate=path) == 0
    assert '1 images could not be read in validation' in script.text and 'b/0.png' in script.text


def test_readable_images_are_not_mentioned(script, image_folder):
    assert script.train(image_folder) == 0
    assert 'read' not in script.text.replace('unreadable', '').replace('thread', '')


@pytest.fixture
def model(tmp_path):
    """Path of a checkpoint of an untrained model."""
    torch.save(dict(
        state_dict=timm.create_model('test_resnet', num_classes=3).state_dict(),
        args=dict(model='test_resnet', num_classes=3, img_size=32)), tmp_path / 'model.pth.tar')
    return str(tmp_path / 'model.pth.tar')


def test_evaluation_names_unreadable_images(script, model, tmp_path, capsys):
    make_images(tmp_path / 'own' / 'validation', count=2)
    make_images(tmp_path / 'others', count=2)
    for root in (tmp_path / 'own' / 'validation', tmp_path / 'others'):
        (root / 'b' / '1.png').write_bytes(DAMAGED['huge.png'])
    assert evaluate.main([
        model, '--data-dir', str(tmp_path / 'own'), '--ood', str(tmp_path / 'others'), '--parts',
        'ood', '--output', str(tmp_path / 'out'), '-j', '0']) == 0
    err = capsys.readouterr().err
    assert err.count('1 images could not be read') == 2 and err.count('b/1.png cannot be read') == 2


def test_unreadable_images_of_a_part_are_replaced_by_images_of_the_part(tmp_path):
    make_images(tmp_path / 'train', count=2)
    dataset = create_dataset('', root=str(tmp_path), split='train')
    for name in ('a/1', 'c/1'):
        (tmp_path / 'train' / f'{name}.png').write_bytes(b'junk')
    part = Part(dataset, [0, 1, 3, 5])
    assert [part[index][1] for index in range(4)] == [0, 1, 1, 0]
    np.testing.assert_array_equal(part[1][0], dataset[3][0])
    np.testing.assert_array_equal(part[3][0], dataset[0][0])
    assert dataset[1][1] == 1 and np.array_equal(dataset[1][0], dataset[2][0])


@pytest.mark.parametrize('workers', [0, 1])
def test_evaluation_without_a_readable_image(script, model, tmp_path, capsys, workers):
    make_images(tmp_path / 'own')
    for path in (tmp_path / 'own').rglob('*.png'):
        path.write_bytes(b'junk')
    assert evaluate.main([model, '--data-dir', str(tmp_path / 'own'), '--parts', '--output',
                          str(tmp_path / 'out'), '-j', str(workers)]) == 2
    err = capsys.readouterr().err
    assert '10 images in a row cannot be read' in err.splitlines()[-1] and 'Traceback' not in err


def _sixteen(folder: Path, kind: str, values: np.ndarray) -> Path:
    path = folder / f'image.{kind.partition(":")[0]}'
    if kind == 'png' or kind == 'tif':
        Image.fromarray(values).save(path)
    elif kind == 'tif:lzw':
        Image.fromarray(values).save(path, compression='tiff_lzw')
    elif kind == 'tif:big':
        Image.frombytes('I;16B', values.shape[::-1], values.astype('>u2').tobytes()).save(path)
    elif kind in ('pgm', 'pgm:4095'):
        top = 65535 if kind == 'pgm' else 4095
        path.write_bytes(f'P5\n{values.shape[1]} {values.shape[0]}\n{top}\n'.encode() + (
            values if kind == 'pgm' else (values.astype(np.int64) * 4095 // 65535)).astype('>u2').tobytes())
    else:
        text = ' '.join(map(str, values.flat))
        path.write_text(f'P2\n{values.shape[1]} {values.shape[0]}\n65535\n{text}\n')
    return path


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('kind', ['png', 'tif', 'tif:lzw', 'tif:big', 'pgm', 'pgm:4095', 'pgm:plain'])
def test_images_of_16_bits_are_scaled(tmp_path, kind, mode):
    expected = np.arange(64, dtype=np.uint8).reshape(8, 8) * 2  # dark: not scaled by the maximum of the image
    path = _sixteen(tmp_path, kind, expected.astype(np.uint16) * 257)
    pixels = np.asarray(open_image(path, mode)).astype(int)
    difference = np.abs(pixels - (expected[..., None] if mode == 'RGB' else expected)).max()
    assert difference <= (1 if kind == 'pgm:4095' else 0)
    assert open_image(path, 'I').getextrema() != (0, 126)  # unchanged


def test_other_images_are_converted_by_pil(tmp_path):
    rng = np.random.default_rng(0)
    for name, image in {
            'gray.png': Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)),
            'palette.png': Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert('P'),
            'int.tif': Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.int32)),
            'alpha.png': Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))}.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(
            open_image(tmp_path / name, 'RGB'), Image.open(tmp_path / name).convert('RGB'), name)


@pytest.mark.parametrize('name', ['', 'torch/image_folder', 'tar'])
def test_hidden_folders_are_not_classes(tmp_path, name):
    make_images(tmp_path / 'train', count=2)
    make_images(tmp_path / 'train' / '.ipynb_checkpoints', ['a'], count=2)
    if name != 'torch/image_folder':
        make_images(tmp_path / 'train' / 'b', ['c'], count=1)  # an ordinary folder inside another one
    (tmp_path / 'train' / 'a' / '.cache').mkdir()
    (tmp_path / 'train' / 'a' / '0.png').rename(tmp_path / 'train' / 'a' / '.cache' / '0.png')
    roots = [str(tmp_path), f'{tmp_path}/train/']
    if name == 'tar':
        subprocess.run(['tar', 'cf', 'images.tar', '-C', 'train', '.'], cwd=tmp_path, check=True)
        name, roots = '', [f'{tmp_path}/images.tar']
    expected = [0, 1, 1, 2, 2] if name else [0, 1, 1, 2, 2, 2]
    for root in roots:
        dataset = create_dataset(name, root=root, split='train')
        assert dataset_classes(dataset) == dict(a=0, b=1, c=2)
        assert sorted(int(dataset[index][1]) for index in range(len(dataset))) == expected


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_folders_outside_a_class_map_are_reported(tmp_path, caplog, name):
    make_images(tmp_path / 'train', count=3)
    (tmp_path / 'train' / 'nothing').mkdir()
    (tmp_path / 'map.txt').write_text('c\na\nz\n')
    dataset = create_dataset(name, root=str(tmp_path), split='train', class_map=str(tmp_path / 'map.txt'))
    assert len(dataset) == 6 and {dataset[index][1] for index in range(6)} == {0, 1}
    assert dataset_classes(dataset) == dict(c=0, a=1, z=2)
    assert '2 of the 4 folders' in caplog.text and 'are ignored: b (3 images), nothing (0 images).' in caplog.text
    assert '1 of the 3 classes' in caplog.text and ': z.' in caplog.text


@pytest.mark.parametrize('name, content, word', [
    ('map.txt', 'x\ny\n', 'Found 0 images'), ('map.csv', 'a,0', 'extension'),
    ('map.pkl', b'cos\nsystem\n(S"true"\ntR.', 'not permitted'), ('missing.txt', None, 'missing.txt'),
    ('map.pkl', pickle.dumps(dict(a='x')), 'must map names to indices'), ('map.pkl', b'noise', 'Training data')])
def test_invalid_class_maps(script, tmp_path, name, content, word):
    make_images(tmp_path / 'data' / 'train')
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert script.train(tmp_path / 'data', class_map=tmp_path / name) == 2
    assert word in script.lines[-1] and 'Traceback' not in script.text and script.written() == []


def _start(folder: Path, data: Path, *argv) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, '--data-dir', data, '--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '2',
         '--epochs', '1', '--opt', 'sgd', '--lr', '0.1', '--experiment', 'run', *argv],
        cwd=folder, stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONUNBUFFERED='1'))


def test_run_without_a_readable_image_ends_at_once(tmp_path):
    make_images(tmp_path / 'data' / 'train')
    for path in (tmp_path / 'data').rglob('*.png'):
        path.write_bytes(b'junk')
    with _start(tmp_path, tmp_path / 'data', '--val-split', '') as process:
        for line in process.stderr:
            if line.startswith('ERROR'):
                failed = time.monotonic()
                break
        rest = process.stderr.read()
        assert process.wait(60) == 1
    assert time.monotonic() - failed < 30
    assert 'images in a row cannot be read' in line
    assert 'Traceback' not in rest and 'Alarm' not in rest


def test_second_signal_ends_a_run_whose_worker_is_blocked(tmp_path):
    make_images(tmp_path / 'data' / 'train')
    (tmp_path / 'data' / 'train' / 'a' / '3.png').unlink()
    os.mkfifo(tmp_path / 'data' / 'train' / 'a' / '3.png')  # opening it waits for a writer that never comes
    with _start(tmp_path, tmp_path / 'data', '--val-split', '') as process:
        for line in process.stderr:
            if line.startswith('Epochs 0'):
                break
        time.sleep(1)  # for the workers to begin
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if line.startswith('Stopping after'):
                break
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(60) == 143
    assert time.monotonic() - sent < 30
    assert 'Traceback' not in rest and 'Alarm' not in rest
