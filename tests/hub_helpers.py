"""Fixtures for tests of the Hub: a server on loopback, models and runs."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer, User, serve

from timm_multimix.hub import repository
from timm_multimix.training import main

TOKEN = 'hf_writewritewritewrite'
READ_TOKEN = 'hf_readreadreadreadread'


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Start a Hub on loopback for this process, with tokens of `user`."""
    constants = huggingface_hub.constants
    with serve() as running:
        running.tokens = {TOKEN: User('user', orgs=('team',)), READ_TOKEN: User('user', 'read')}
        monkeypatch.setattr(constants, 'ENDPOINT', running.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            running.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_STORED_TOKENS_PATH', str(tmp_path / 'stored_tokens'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        monkeypatch.setattr(repository, 'RETRY_WAITS', (0.01, 0.01))
        yield running
        huggingface_hub.close_session()


def small_model(name: str = 'test_resnet', **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # values that no initialization creates
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    return model


def logits(model: torch.nn.Module, size: int = 64, channels: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)))


LOAD = """
import json, sys
import timm, torch
sys.modules['timm_multimix'] = None  # simulate that it is not installed
with torch.no_grad():
    model = timm.create_model(sys.argv[1], pretrained=True).eval()
    images = torch.randn(2, 3, int(sys.argv[2]), int(sys.argv[2]), generator=torch.Generator().manual_seed(0))
    torch.save(model(images), sys.argv[3])
json.dump([timm.data.resolve_model_data_config(model), model.pretrained_cfg['label_names']], sys.stdout)
"""


def load_elsewhere(server: HubServer, name: str, tmp_path: Path, size: int = 64, token: str = TOKEN):
    """Load a model in a process without this package. Return its logits, data configuration and class names."""
    done = subprocess.run(
        [sys.executable, '-c', LOAD, name, str(size), str(tmp_path / 'logits.pt')], text=True, capture_output=True,
        cwd=tmp_path, env={**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, 'HF_ENDPOINT': server.url,
                           'HF_TOKEN': token, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
                           'HF_HUB_DISABLE_TELEMETRY': '1'})
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / 'logits.pt'), *json.loads(done.stdout)


@pytest.fixture(scope='session')
def trained_run(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp('trained')
    assert main([
        '--data-dir', str(image_folder), '--model', 'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '2',
        '--warmup-epochs', '0', '--lr', '0.01', '--opt', 'sgd', '--workers', '0', '--multimix-n', '20', '--multimix',
        'dense', '--model-ema', '--mean', '0.4', '--crop-pct', '0.9', '--output', str(folder), '--experiment', 'run',
    ]) == 0
    return folder / 'run'


@pytest.fixture
def trained(script, trained_run):
    """Folder of a run of two epochs that was not pushed."""
    shutil.copytree(trained_run, script.run_folder())
    return script.run_folder()
