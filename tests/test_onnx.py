"""Export to ONNX, and loading of exported models with transformers. Skipped without the packages."""
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hub_helpers import small_model

from timm_multimix.hub.command import main
from timm_multimix.hub.models import save_config, save_weights

RUN = Path(__file__).parent / 'data' / 'checkpoints_0.1' / 'calibrated'


@pytest.fixture
def export(tmp_path, capsys):
    """Export a calibrated run to ONNX. Return exit status, target folder and error output."""
    shutil.copytree(RUN, tmp_path / 'run')

    def run(*options):
        status = main(['export', str(tmp_path / 'run'), str(tmp_path / 'model'), *options])
        return status, tmp_path / 'model', capsys.readouterr().err
    return run


@pytest.fixture
def exporter():
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package)


def test_export(export, exporter):
    onnxruntime = pytest.importorskip('onnxruntime')
    status, target, errors = export('--format', 'onnx', '--verify')
    assert status == 0, errors
    model = timm.create_model(f'local-dir:{target}', pretrained=True).eval()
    session = onnxruntime.InferenceSession(str(target / 'model.onnx'))
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, *model.pretrained_cfg['input_size'])
        logits, = session.run(['logits'], {'images': images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_wrong_outputs(export, exporter, monkeypatch):
    def run(names, inputs):
        return [np.ones((len(inputs['images']), 10), dtype=np.float32)]

    monkeypatch.setitem(sys.modules, 'onnxruntime', SimpleNamespace(
        __spec__=object(), InferenceSession=lambda path, providers: SimpleNamespace(run=run)))
    status, target, errors = export('--format', 'onnx', '--verify')
    assert status == 2 and 'for a batch of 1 differ' in errors
    assert not target.exists()


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_package(export, monkeypatch, package):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, package, None)
    status, target, errors = export('--format', 'onnx', '--verify')
    assert status == 2
    assert f"needs the package {package}, which is not installed: pip install 'timm-multimix[onnx]'" in errors
    assert not target.exists()


def test_verify_needs_onnx(export):
    status, target, errors = export('--verify')
    assert status == 2 and '--verify needs --format onnx' in errors
    assert not target.exists()


def test_transformers_loads_exported_models(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = small_model()
    save_config(model, tmp_path / 'config.json', label_names=['a', 'b', 'c'])
    save_weights(model.state_dict(), tmp_path / 'model.safetensors')
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images).logits, model(images))
    assert loaded.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
