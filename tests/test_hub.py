"""Pushing models with the real huggingface_hub client to a Hub on loopback, and loading them with plain timm."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from hub_server import File, HubServer, User, metadata_errors, serve
from huggingface_hub import ModelCard

import timm_multimix.hub as hub
from timm_multimix import attach, push_to_hub
from timm_multimix.evaluation.models import load_candidate
from timm_multimix.hub import HubError, HubRepository, with_retries
from timm_multimix.training import hub as training_hub
from timm_multimix.training.config import parse_args
from timm_multimix.training.errors import UsageError

pytest_plugins = ['training_helpers']

TOKEN = 'hf_writewritewritewrite'
READ_TOKEN = 'hf_readreadreadreadread'


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub where `user` has a token, and this process is sent to it."""
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
        monkeypatch.setattr(training_hub.HubPush, 'retry_waits', (0.01, 0.01))
        yield running
        huggingface_hub.close_session()


def small_model(name: str = 'test_resnet', **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing that an initialisation would make
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
sys.modules['timm_multimix'] = None  # not installed
with torch.no_grad():
    model = timm.create_model(sys.argv[1], pretrained=True).eval()
    images = torch.randn(2, 3, int(sys.argv[2]), int(sys.argv[2]), generator=torch.Generator().manual_seed(0))
    torch.save(model(images), sys.argv[3])
json.dump([timm.data.resolve_model_data_config(model), model.pretrained_cfg['label_names']], sys.stdout)
"""


def load_elsewhere(server: HubServer, name: str, tmp_path: Path, size: int = 64, token: str = TOKEN):
    """Logits, data configuration and class names of a model, loaded in a process without this package."""
    done = subprocess.run(
        [sys.executable, '-c', LOAD, name, str(size), str(tmp_path / 'logits.pt')], text=True, capture_output=True,
        cwd=tmp_path, env={**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, 'HF_ENDPOINT': server.url,
                           'HF_TOKEN': token, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
                           'HF_HUB_DISABLE_TELEMETRY': '1'})
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / 'logits.pt'), *json.loads(done.stdout)


# From Python.

@pytest.mark.parametrize('name, kwargs', [
    ('test_resnet', dict(global_pool='max')),
    ('test_vit', dict(img_size=96, class_token=False, global_pool='avg')),
    ('test_convnext', dict(drop_path_rate=0.2)),
    ('test_efficientnet', dict(in_chans=1)),
], ids=lambda value: value if isinstance(value, str) else '')
def test_timm_gives_the_same_model_back(server, name, kwargs):
    model = small_model(name, **kwargs)
    size, channels = kwargs.get('img_size', 64), kwargs.get('in_chans', 3)
    expected = logits(model, size, channels)
    model.to(memory_format=torch.channels_last)
    attach(model, 'pooled')
    push_to_hub(model, 'user/model')
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    assert torch.equal(logits(loaded, size, channels), expected)
    assert {'model.safetensors', 'config.json', 'README.md'} <= set(server.repos['user/model'].head().files)


def test_config_says_how_images_were_prepared(server):
    data = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='nearest',
                crop_pct=0.77, crop_mode='center')
    push_to_hub(small_model(), 'user/model', data_config=data, label_names=['a', 'b', 'c'])
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    for use_test_size in (False, True):
        resolved = timm.data.resolve_model_data_config(loaded, use_test_size=use_test_size)
        assert {name: tuple(value) if isinstance(value, list) else value for name, value in resolved.items()} == data
    assert list(loaded.pretrained_cfg['label_names']) == ['a', 'b', 'c'] and loaded.num_classes == 3


def test_name_without_user_private_and_revision(server):
    push_to_hub(small_model(), 'model', private=True, revision='try/1', commit_message='First try')
    repository = server.repos['user/model']
    assert repository.private and 'config.json' not in repository.head('main').files
    assert repository.head('try/1').title == 'First try'
    assert 'hf-hub:user/model@try/1' in server.file('user/model', 'README.md', 'try/1').decode()


def test_a_model_that_timm_cannot_make_again_is_refused_before_anything_is_sent(server):
    model = small_model()
    model.layer1.append(torch.nn.BatchNorm2d(3))
    with pytest.raises(HubError, match='another model from the configuration'):
        push_to_hub(model, 'user/model')
    assert not server.requests


def test_own_card_and_own_fields(server):
    push_to_hub(small_model(), 'user/model', card_fields=dict(license='mit', datasets=['user/images'], tags=['digits']))
    data = ModelCard(server.file('user/model', 'README.md').decode()).data
    assert data.license == 'mit' and data.datasets == ['user/images'] and {'timm', 'digits'} <= set(data.tags)
    with pytest.raises(ValueError, match='licence'):
        push_to_hub(small_model(), 'user/model', card_fields=dict(licence='mit'))
    push_to_hub(small_model(), 'user/other', card='---\nlicense: mit\n---\nMine.')
    assert server.file('user/other', 'README.md').endswith(b'Mine.')


# What is there already.

def test_existing_repository_is_updated_by_a_commit(server):
    server.create('user/model')
    push_to_hub(small_model(), 'user/model', commit_message='one')
    server.repos['user/model'].commit('main', 'notes', {
        **server.repos['user/model'].head().files, 'NOTES': File(b'kept', False)})
    push_to_hub(small_model(), 'user/model', commit_message='two')
    assert server.repos['user/model'].titles == ['initial commit', 'one', 'notes', 'two']
    assert server.file('user/model', 'NOTES') == b'kept'


def test_another_architecture_is_refused_unless_forced(server):
    push_to_hub(small_model(), 'user/model')
    other = small_model('test_convnext')
    with pytest.raises(HubError, match='holds a test_resnet, and this is a test_convnext'):
        push_to_hub(other, 'user/model')
    assert len(server.repos['user/model'].titles) == 2
    push_to_hub(other, 'user/model', force=True)
    assert json.loads(server.file('user/model', 'config.json'))['architecture'] == 'test_convnext'


@pytest.mark.parametrize('config', [None, b'{"model_type": "bert"}', b'[1]', b'no json'])
def test_weights_of_something_else_are_refused(server, config):
    repository = server.create('user/model')
    files = {'model.safetensors': File(b'x', True), **({'config.json': File(config, False)} if config else {})}
    repository.commit('main', 'bert', {**repository.head().files, **files})
    with pytest.raises(HubError, match='not a timm model'):
        push_to_hub(small_model(), 'user/model')
    assert server.file('user/model', 'model.safetensors') == b'x'


def test_card_written_by_hand_is_kept_and_one_of_ours_renewed(server):
    push_to_hub(small_model(), 'user/model')
    first = server.file('user/model', 'README.md')
    push_to_hub(small_model(), 'user/model', card_fields=dict(license='mit'))
    assert server.file('user/model', 'README.md') != first
    repository = server.repos['user/model']
    repository.commit('main', 'mine', {**repository.head().files, 'README.md': File(b'My own words.', False)})
    push_to_hub(small_model(), 'user/model')
    assert server.file('user/model', 'README.md') == b'My own words.'
    repository.commit('main', 'web', {**repository.head().files, 'README.md': File(b'---\nlicense: mit\n---\n', False)})
    push_to_hub(small_model(), 'user/model')
    assert b'hf-hub:user/model' in server.file('user/model', 'README.md')


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()

    def write(seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = small_model()
        hub.save_config(model, folder / 'config.json')
        hub.save_weights(model.state_dict(), folder / 'model.safetensors')
        return folder
    return write


def opened(**options) -> HubRepository:
    repository = HubRepository('user/model', **options)
    repository.log_in()
    repository.open('test_resnet')
    return repository


def test_commit_of_somebody_else_in_between_is_not_overwritten_unseen(server, model_folder):
    """Their notes stay, their weights are not replaced, and a push between look and commit is noticed."""
    repository, folder = opened(), model_folder()
    repository.commit(folder, 'ours')
    theirs = server.repos['user/model']

    def note():
        theirs.commit('main', 'note', {**theirs.head().files, 'NOTES': File(b'note', False)})

    server.fail('POST', '/commit/', note)  # after we looked, before we commit: 412
    repository.commit(model_folder(1), 'ours again')
    assert theirs.titles == ['initial commit', 'ours', 'note', 'ours again'] and 'NOTES' in theirs.head().files

    server.fail('POST', '/commit/', lambda: theirs.commit(
        'main', 'theirs', {**theirs.head().files, 'model.safetensors': File(b'theirs', True)}))
    with pytest.raises(HubError, match='Somebody else pushed weights') as error:
        repository.commit(model_folder(2), 'ours')
    assert not error.value.is_temporary and theirs.titles[-1] == 'theirs'
    repository.force = True
    repository.commit(folder, 'forced')
    assert theirs.titles[-1] == 'forced'


def test_commit_whose_answer_was_lost_is_not_made_twice(server, model_folder):
    repository, folder = opened(), model_folder()
    committed = server.repos['user/model']

    def lose_the_answer():
        head = committed.head().files
        weights = (folder / 'model.safetensors').read_bytes()
        committed.commit('main', 'ours', {
            **head, 'model.safetensors': File(weights, True),
            'config.json': File((folder / 'config.json').read_bytes(), False)})

    server.fail('POST', '/commit/', lose_the_answer, 500)
    server.fail('POST', '/commit/', 'cut')
    with_retries(lambda: repository.commit(folder, 'ours'), (0, 0), lambda seconds: None)
    assert committed.titles == ['initial commit', 'ours']


# Errors.

def test_without_a_token(server, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(HubError, match=r'hf auth login.*HF_TOKEN'):
        push_to_hub(small_model(), 'user/model')
    assert not server.requests


@pytest.mark.parametrize('token, repo_id, message', [
    ('hf_unknownunknownunknown', 'user/model', 'token is not valid.*hf auth login'),
    (READ_TOKEN, 'user/model', 'may only read.*settings/tokens'),
    (TOKEN, 'somebody/model', 'namespace of yours.*rights to create'),
    ('hf_finefinefinefine', 'user/model', 'may not do this'),
])
def test_tokens_that_do_not_do(server, monkeypatch, token, repo_id, message):
    server.tokens['hf_finefinefinefine'] = User('user', 'fineGrained', writable=('user/other',))
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(HubError, match=message) as error:
        push_to_hub(small_model(), repo_id)
    assert not error.value.is_temporary and token not in str(error.value) and not server.repos


def test_repository_that_others_may_write_only(server):
    server.create('somebody/model')
    with pytest.raises(HubError, match='may not do this'):
        push_to_hub(small_model(), 'somebody/model')
    assert not server.count('POST', '/preupload/')  # found out before anything is sent
    server.create('somebody/secret', private=True)
    with pytest.raises(HubError, match='namespace of yours'):
        push_to_hub(small_model(), 'somebody/secret')


def test_fine_grained_token_for_this_repository(server, monkeypatch):
    server.tokens['hf_finefinefinefine'] = User('user', 'fineGrained', writable=('team/model',))
    monkeypatch.setenv('HF_TOKEN', 'hf_finefinefinefine')
    push_to_hub(small_model(), 'team/model')
    assert server.repos['team/model'].titles[-1] == 'Add model'


@pytest.mark.parametrize('name', ['', 'a/b/c', 'user/my model', '-x', 'user/a--b', 'user/' + 'x' * 100])
def test_names_that_are_none(server, name):
    with pytest.raises(HubError, match='repository name'):
        push_to_hub(small_model(), name)
    assert not server.requests


@pytest.mark.parametrize('name', [
    'bad branch~', 'a b', 'a..b', 'a//b', '/a', 'a/', 'a.lock', '.a', 'a/.b', '-a', 'a^', 'a:b', 'a?', 'a*', 'a[b',
    'a\\b', 'a@{b', '@', '', 'a.', 'a\nb', 'a\x7f'])
def test_names_that_are_no_branch(server, script, image_folder, name):
    with pytest.raises(HubError, match='name of a branch'):
        push_to_hub(small_model(), 'user/model', revision=name)
    assert not server.requests


def test_names_of_branches():
    for name in ('main', 'v1.0', 'a/b-c_d', '0' * 40, 'try/1', 'a@b'):
        assert HubRepository('user/model', revision=name).revision == name


def test_private_repository_without_a_token(server, monkeypatch):
    push_to_hub(small_model(), 'user/secret', private=True)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        timm.create_model('hf-hub:user/secret', pretrained=True)


@pytest.mark.parametrize('method, path, actions', [
    ('POST', '/commit/', [500]),
    ('POST', '/commit/', [503, 'cut']),
    ('POST', '/commit/', [(429, {'Retry-After': '7'})]),
    ('POST', '/commit/', [409, 412]),
    ('POST', '/preupload/', [500] * 7),  # the client gives up after six
    ('POST', '/objects/batch', [(429, {'Retry-After': '3'})]),
    ('PUT', '/', ['cut']),
    ('PUT', '/', ['cut'] * 7),
    ('PUT', '/', [500, 'cut', 503]),
    ('POST', '/lfs/verify', [500] * 6),
    ('GET', '/api/models/user/model/revision|/api/models/user/model$', [500]),
], ids=str)
def test_errors_that_pass_are_overcome(server, model_folder, method, path, actions):
    repository, folder = opened(), model_folder()
    server.fail(method, path, *actions)
    waits = []
    with_retries(lambda: repository.commit(folder, 'ours'), (1, 2), waits.append)
    assert not server.faults[0].actions
    assert server.repos['user/model'].titles == ['initial commit', 'ours']
    if actions == [(429, {'Retry-After': '7'})]:
        assert waits == [7]
    assert server.file('user/model', 'model.safetensors') == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('status, temporary, calls, message', [
    (401, False, 1, 'hf auth login'), (403, False, 1, 'may write to this repository'), (400, False, 1, '400'),
    (404, False, 1, 'no such repository'), (409, True, 15, 'somebody else'), (429, True, 3, 'too many requests'),
    (500, True, 3, '500')])
def test_errors_that_stay(server, model_folder, status, temporary, calls, message):
    """Tried again if that can help, told with what to do; the repository is as it was."""
    repository, folder = opened(), model_folder()
    server.fail('POST', '/commit/', *[status] * 50)
    with pytest.raises(HubError, match=message) as error:
        with_retries(lambda: repository.commit(folder, 'ours'), (0, 0), lambda seconds: None)
    assert error.value.is_temporary == temporary and error.value.status == status
    assert server.count('POST', '/commit/') == calls
    assert server.repos['user/model'].titles == ['initial commit']


def test_nobody_listens(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(HubError, match='Logging in to the Hugging Face Hub: no connection to http:') as error:
        push_to_hub(small_model(), 'user/model')
    assert 'http://127.0.0.1:9' in str(error.value)
    assert error.value.is_temporary


def test_cards_pass_the_hubs_own_validation(server, trained, script):
    assert training_hub.command(['push', str(trained), 'user/model']) == 0
    card = ModelCard.load('user/model')
    card.validate()
    card.data.license = 'none of them'
    with pytest.raises(ValueError, match='license'):
        card.validate()


def test_no_token_in_an_error():
    assert 'hf_' + 'abcdefghij' not in str(HubError('Bearer hf_' + 'abcdefghij said no'))


# Runs.

@pytest.fixture
def trained(script, image_folder):
    """A run of two epochs that was not pushed."""
    assert script.train(image_folder, '--model-ema', multimix='dense', epochs=2, mean='0.4', crop_pct=0.9) == 0
    return script.run_folder()


def test_run_is_pushed_at_its_end(server, script, image_folder, tmp_path):
    options = dict(multimix='dense', epochs=3, mean='0.4', crop_pct=0.9, interpolation='bilinear', seed=3)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end', **options) == 0, \
        script.text
    assert server.repos['user/model'].titles[1:] == [server.repos['user/model'].head().title]
    best = script.checkpoint('model_best.pth.tar')
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(best['state_dict'])
    there, data, names = load_elsewhere(server, 'hf-hub:user/model', tmp_path, size=32)
    assert torch.equal(there, logits(model, 32)) and names == ['a', 'b', 'c']
    assert data == dict(input_size=[3, 32, 32], interpolation='bilinear', mean=[0.4] * 3, std=[0.5] * 3,
                        crop_pct=0.9, crop_mode='center')
    assert f'epoch {best["epoch"]}, top1 {best["metric"]:.4g}' in server.repos['user/model'].head().title
    assert 'training_curve.png' in server.repos['user/model'].head().files
    assert not [name for name in script.written() if '.hub-' in name]


@pytest.mark.parametrize('strategy', ['every_save', 'best'])
def test_strategies(server, script, image_folder, strategy):
    script.train(image_folder, '--push-to-hub', '--hub-always-push', hub_model_id='user/model', hub_strategy=strategy,
                 epochs=3)
    rows = [float(row['eval_top1']) for row in script.summary()]
    bests = [epoch for epoch in range(3) if all(rows[epoch] > earlier for earlier in rows[:epoch])]
    epochs = [int(title.split('epoch ')[1].split(',')[0]) for title in server.repos['user/model'].titles[1:]]
    during = [0, 1, 2] if strategy == 'every_save' else bests
    assert epochs[:len(during)] == during
    assert epochs[len(during):] in ([], [bests[-1]])  # the best one at the end, with the whole curve
    assert epochs[-1] == bests[-1]
    assert script.status == 0 and 'Finish the upload' not in script.text


def test_a_push_under_way_is_not_waited_for(server, script, image_folder):
    """Training ends while the first upload hangs; what was skipped is covered by the last push."""
    server.gate = threading.Event()
    released = []

    def release(*args):
        released.append(len(script.summary()))
        server.gate.set()

    original = training_hub.HubPush.finish
    training_hub.HubPush.finish = lambda self: (release(), original(self))
    try:
        script.train(image_folder, '--push-to-hub', hub_model_id='user/model', epochs=4)
    finally:
        training_hub.HubPush.finish = original
    assert released == [4] and script.status == 0
    assert len(server.repos['user/model'].titles) <= 3
    assert f'epoch {script.checkpoint("model_best.pth.tar")["epoch"]},' in server.repos['user/model'].head().title


@pytest.mark.parametrize('status', [401, 403, 409, 429, 500, 'cut'])
def test_failed_uploads_do_not_stop_training_and_are_finished_later(server, script, image_folder, status):
    path = ('PUT', '/') if status == 'cut' else ('POST', '/commit/')
    server.fail(*path, *[status] * 500)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model') == 0
    assert len(script.summary()) == 1 and script.checkpoint()['epoch'] == 0
    assert server.repos['user/model'].titles == ['initial commit']
    assert not [name for name in script.written() if '.hub-' in name]
    assert 'The run itself is complete' in script.text and TOKEN not in script.text
    command = script.lines[-1].split()
    assert command[:4] == ['python', '-m', 'timm_multimix.hub', 'push']
    server.faults.clear()
    assert training_hub.command(command[3:]) == 0
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict'])
    assert torch.equal(logits(loaded), logits(model))


def test_stopped_run_is_left_alone(server, script, image_folder, monkeypatch):
    from timm_multimix.training import loop
    steps, step = [], loop._train_step

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, '_train_step', interrupted)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end', epochs=3) == 130
    assert server.repos['user/model'].titles == ['initial commit']
    assert script.lines[-1].endswith('--resume auto')


def test_interrupt_while_the_last_upload_is_under_way(server, script, image_folder):
    def interrupt():
        import _thread
        _thread.interrupt_main()

    server.fail('PUT', '/', interrupt)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end') == 130
    assert 'Finish the upload with' in script.text and script.checkpoint('model_best.pth.tar')['epoch'] == 0
    assert training_hub.command(script.lines[-1].split()[3:]) == 0
    assert len(server.repos['user/model'].titles) == 2


@pytest.mark.parametrize('arguments, message', [
    (dict(token=None), 'hf auth login'),
    (dict(token=READ_TOKEN), 'may only read'),
    (dict(hub_model_id='somebody/model'), 'namespace of yours'),
    (dict(hub_model_id='user/a--b'), 'repository name'),
    (dict(taken=True), 'holds a test_convnext'),
    (dict(down=True), '503'),
    (dict(hub_revision='0' * 40), 'Invalid branch name'),
])
def test_stops_before_training(server, script, image_folder, monkeypatch, arguments, message):
    arguments = dict(hub_model_id='user/model', **arguments) if 'hub_model_id' not in arguments else dict(arguments)
    token = arguments.pop('token', TOKEN)
    monkeypatch.setenv('HF_TOKEN', token or '')
    if arguments.pop('taken', False):
        push_to_hub(small_model('test_convnext'), 'user/model')
    if arguments.pop('down', False):
        server.fail('GET', 'whoami', *[503] * 9)
    assert script.train(image_folder, '--push-to-hub', **arguments) == 2
    assert message in script.lines[-1] and not any('Epoch 0' in line for line in script.lines)
    assert not any(name.endswith('.pth.tar') for name in script.written())


@pytest.mark.parametrize('rank', [0, 1])
def test_only_the_first_process_talks_to_the_hub(server, script, image_folder, monkeypatch, rank):
    args = parse_args(['--data-dir', str(image_folder), '--push-to-hub', '--hub-model-id', 'user/model'])
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setenv('LOCAL_RANK', str(rank))
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert (training_hub.HubPush.start(args) is None) == bool(server.requests == []) == bool(rank)


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_killed_while_uploading(server, script, image_folder):
    """SIGKILL in the middle of an upload: the run continues from its files, and what the upload left is removed."""
    server.gate = threading.Event()  # the first upload never ends
    command = [
        sys.executable, str(Path(__file__).parent.parent / 'train_timm.py'), '--data-dir', str(image_folder), '--model',
        'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '300', '-j', '0', '--experiment', 'run', '--lr',
        '0.01', '--push-to-hub', '--hub-model-id', 'user/model']
    environment = {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
                   'HF_HOME': str(script.folder / 'home')}
    process = subprocess.Popen(command, cwd=script.folder, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if ': validation ' in line and server.count('PUT', '/'):
            process.kill()
            break
    process.communicate()
    assert any('.hub-' in name for name in script.written())
    server.gate.set()
    epochs = script.checkpoint()['epoch'] + 2
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', epochs=epochs, resume='auto') == 0, \
        script.text
    assert not any('.hub-' in name for name in script.written())
    assert len(script.summary()) == epochs and len(server.repos['user/model'].titles) > 1


def test_name_of_the_repository_defaults_to_that_of_the_run(server, script, image_folder):
    assert script.train(image_folder, '--push-to-hub', experiment='nice-model', hub_strategy='end') == 0
    assert 'user/nice-model' in server.repos


def test_token_on_the_command_line_is_refused_and_not_repeated(script, server, image_folder):
    assert script.train(image_folder, '--push-to-hub', hub_token=TOKEN) == 2
    assert 'HF_TOKEN' in script.text and TOKEN not in script.text
    assert training_hub.command(['push', str(image_folder), 'user/model', '--token', TOKEN]) == 2
    assert TOKEN not in script.capsys.readouterr().err


def test_no_token_is_written(server, script, image_folder):
    script.train(image_folder, '--push-to-hub', hub_model_id='user/model', epochs=2)
    for name in script.written():
        path = script.folder / name
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), name
    for file in server.repos['user/model'].head().files.values():
        assert TOKEN.encode() not in file.content
    assert TOKEN not in script.text and 'signature' not in script.text


def test_training_is_the_same_with_uploads(server, script, image_folder):
    script.train(image_folder, experiment='alone', multimix='dense', epochs=2)
    script.train(image_folder, '--push-to-hub', experiment='pushed', hub_model_id='user/model', multimix='dense',
                 epochs=2)
    alone, pushed = (script.checkpoint(name=name)['state_dict'] for name in ('alone', 'pushed'))
    assert all(torch.equal(alone[name], pushed[name]) for name in alone)


# The command.

def test_push_command(server, trained, script, tmp_path):
    assert training_hub.command(['push', str(trained), 'user/model', '--private', '--revision', 'v1']) == 0
    assert server.repos['user/model'].private and server.repos['user/model'].head('v1').title.startswith('test_resnet')
    checkpoint = script.checkpoint('model_best.pth.tar')
    for weights, key in dict(best='state_dict_ema', student='state_dict', ema='state_dict_ema').items():
        assert training_hub.command(['push', str(trained), f'user/{weights}', '--weights', weights]) == 0
        model = timm.create_model('test_resnet', num_classes=3)
        model.load_state_dict(checkpoint[key])
        assert torch.equal(logits(timm.create_model(f'hf-hub:user/{weights}', pretrained=True)), logits(model))
    assert training_hub.command(['push', str(trained), 'user/x', '--weights', 'teacher']) == 2
    told = script.capsys.readouterr().err
    assert 'does not hold the weights of the teacher. Choose others: best, or ema or student' in told
    assert 'user/x' not in server.repos
    assert training_hub.command(['push', str(trained), 'user/x', '--revision', 'bad branch~']) == 2
    assert 'name of a branch' in script.capsys.readouterr().err and 'user/x' not in server.repos


def test_metrics_are_those_of_the_weights_that_are_pushed(server, trained, script):
    checkpoint = script.checkpoint('model_best.pth.tar')
    assert checkpoint['metrics'].keys() == {'state_dict', 'state_dict_ema'}
    checkpoint.update(metric=47.04, metrics=dict(state_dict=dict(top1=80.56), state_dict_ema=dict(top1=47.04)))
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    for weights, shown, other in (('best', '47.04', '80.56'), ('student', '80.56', '47.04'), ('ema', '47.04', '80.56')):
        assert training_hub.command(['push', str(trained), f'user/{weights}', '--weights', weights]) == 0
        card = server.file(f'user/{weights}', 'README.md').decode()
        assert f'top1 {shown}' in server.repos[f'user/{weights}'].head().title and f'| {shown} %' in card
        assert other not in server.repos[f'user/{weights}'].head().title + card
        assert f'top1 {shown}' in script.capsys.readouterr().err
    del checkpoint['metrics']['state_dict']
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    assert training_hub.command(['push', str(trained), 'user/unknown', '--weights', 'student']) == 0
    assert 'top1' not in server.repos['user/unknown'].head().title


def test_what_is_there_already_is_not_committed_again(server, script, image_folder, trained, capsys):
    for _ in range(2):
        assert training_hub.command(['push', str(trained), 'user/model']) == 0
    assert server.count('POST', '/commit/') == 1 and 'No files have been modified' not in capsys.readouterr().err
    assert script.train(  # one epoch: the end has nothing to add
        image_folder, '--push-to-hub', '--hub-always-push', hub_model_id='user/other', experiment='other') == 0
    assert len([line for line in script.lines if line.startswith('Pushed ')]) == 1, script.text
    assert server.count('POST', '/commit/') == 2 and 'No files have been modified' not in script.text


def test_export_command(server, script, trained, tmp_path):
    """Exactly the weights to ship, as a folder that plain timm loads; without a network."""
    server.close()
    checkpoint = script.checkpoint('model_best.pth.tar')
    model = timm.create_model('test_resnet', num_classes=3)
    for weights, key in dict(best='state_dict_ema', student='state_dict').items():
        target = tmp_path / 'models' / weights
        assert training_hub.command(['export', str(trained), str(target), '--weights', weights]) == 0
        told = script.capsys.readouterr().err
        model.load_state_dict(checkpoint[key])
        there, data, names = load_elsewhere(server, f'local-dir:{target}', tmp_path)
        assert torch.equal(there, logits(model)) and names == ['a', 'b', 'c'] and data['crop_pct'] == 0.9
        assert f"timm.create_model('local-dir:{target}', pretrained=True)" in told and 'model_best.pth.tar' in told
    assert {'model.safetensors', 'config.json', 'README.md'} <= {path.name for path in target.iterdir()}
    assert sorted(path.name for path in target.parent.iterdir()) == ['best', 'student'] and not server.requests
    assert training_hub.command(['export', str(trained), str(target)]) == 2
    assert 'is there already' in script.capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    assert training_hub.command(['export', str(trained), str(tmp_path / 'empty'), '--weights', 'teacher']) == 2
    assert not list((tmp_path / 'empty').iterdir())
    assert training_hub.command(['export', str(trained), str(tmp_path / 'empty')]) == 0


def test_command_that_the_end_of_a_run_names(server, script, image_folder, tmp_path):
    assert script.train(image_folder, '--model-ema', model_ema_decay=0.5) == 0
    command = next(line for line in script.lines if 'timm_multimix.hub export' in line).split()
    assert training_hub.command(command[3:]) == 0
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict_ema'])
    assert torch.equal(logits(timm.create_model(f'local-dir:{command[-1]}', pretrained=True)), logits(model))


def test_weights_that_gave_the_metric_and_calibrated_ones_come_first(server, script, trained):
    checkpoint = script.checkpoint('model_best.pth.tar')
    checkpoint['metric_of'] = 'state_dict'
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    assert training_hub.command(['push', str(trained), 'user/model']) == 0
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(checkpoint['state_dict'])
    assert torch.equal(logits(timm.create_model('hf-hub:user/model', pretrained=True)), logits(model))
    checkpoint['state_dict']['fc.weight'] *= 0.5
    torch.save(checkpoint, trained / 'model_calibrated.pth.tar')
    assert training_hub.command(['push', str(trained), 'user/model']) == 0
    model.load_state_dict(checkpoint['state_dict'])
    assert torch.equal(logits(timm.create_model('hf-hub:user/model', pretrained=True)), logits(model))


def test_folder_of_timms_own_script(server, script, trained):
    """It has no config.json: the model is made again from the arguments in the checkpoint."""
    (trained / 'config.json').unlink()
    assert training_hub.command(['push', str(trained), 'user/model']) == 0
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict_ema'])
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.pretrained_cfg['crop_pct'] == 0.9 and tuple(loaded.pretrained_cfg['mean']) == (0.4,) * 3


@pytest.mark.parametrize('argv, message', [
    (['push', 'nowhere', 'user/model'], 'no such folder'),
    (['push', '.', 'user/model'], 'no checkpoint of a run'),
    (['push', '.'], 'Where to'),
    (['pull', '.'], 'invalid choice'),
    ([], 'required'),
])
def test_command_mistakes(server, script, argv, message):
    assert training_hub.command(argv) == 2
    assert message in script.capsys.readouterr().err


def test_card_needs_no_network(trained, script, server, tmp_path):
    server.close()
    script.capsys.readouterr()
    assert training_hub.command(['card', str(trained)]) == 0
    card, told = script.capsys.readouterr()
    assert 'The card of the average of the weights, from' in told and 'model_best.pth.tar' in told
    assert metadata_errors(card) == [] and '# run' in card and not server.requests
    assert training_hub.command(['card', str(trained), 'user/model', '--output', str(tmp_path / 'card')]) == 0
    assert {path.name for path in (tmp_path / 'card').iterdir()} == {'README.md', 'training_curve.png'}


# Loading.

def test_initial_checkpoint_from_the_hub(server, script, image_folder):
    model = small_model()
    push_to_hub(model, 'user/model', revision='v1')
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/new', hub_strategy='end', lr=1e-12, epochs=1,
                        weight_decay=0, initial_checkpoint='hf-hub:user/model@v1') == 0, script.text
    state = script.checkpoint()['state_dict']
    assert all(torch.equal(state[name], value) for name, value in model.named_parameters())
    assert ModelCard(server.file('user/new', 'README.md').decode()).data.base_model == 'user/model'


def test_resume_from_the_hub(server, script, image_folder, tmp_path):
    """Weights alone start anew, and say so; a checkpoint in the repository is continued with all of its state."""
    model = small_model()
    push_to_hub(model, 'user/model')
    assert script.train(image_folder, '--model-ema', lr=1e-12, weight_decay=0, resume='hf-hub:user/model') == 0, \
        script.text
    assert 'holds weights alone' in script.text
    state = script.checkpoint()['state_dict']
    assert all(torch.equal(state[name], value) for name, value in model.named_parameters())

    repository = server.repos['user/model']
    repository.commit('main', 'checkpoint', {
        **repository.head().files, 'last.pth.tar': File((script.run_folder() / 'last.pth.tar').read_bytes(), True)})
    assert script.train(image_folder, '--model-ema', experiment='more', epochs=2, weight_decay=0,
                        resume='hf-hub:user/model') == 0, \
        script.text
    assert 'with epoch 1.' in script.text


def test_evaluation_of_a_model_of_the_hub(server):
    model = small_model()
    push_to_hub(model, 'user/model', data_config=dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    candidate = load_candidate('hf-hub:user/model')
    images = torch.rand(2, 3, 64, 64)
    expected = model((images - torch.tensor([[[0.1]], [[0.2]], [[0.3]]])) / torch.tensor([[[0.4]], [[0.5]], [[0.6]]]))
    torch.testing.assert_close(candidate.pixel_model(images), expected)
    assert candidate.num_classes == 3
    with pytest.raises(UsageError, match='hf-hub:user/nothing'):
        load_candidate('hf-hub:user/nothing')


@pytest.mark.parametrize('option', ['initial_checkpoint', 'resume'])
@pytest.mark.parametrize('name, message', [
    ('hf-hub:user/nothing', 'no such repository'), ('hf-hub:user/model@v9', 'no such repository or revision'),
    ('hf-hub:user/empty', 'has none of the files'), ('hf-hub:user/other', 'layer1')])
def test_loading_mistakes(server, script, image_folder, option, name, message):
    push_to_hub(small_model(), 'user/model')
    push_to_hub(small_model('test_convnext'), 'user/other')
    server.create('user/empty')
    assert script.train(image_folder, **{option: name}) == 2
    assert message in script.lines[-1] and name.partition('@')[0] in script.lines[-1]
    assert not script.written()


def test_recipe_file_may_say_what_the_card_says(server, script, image_folder, tmp_path):
    config = tmp_path / 'recipe.yaml'
    config.write_text(yaml.safe_dump(dict(multimix='pooled', card=dict(
        license='cc-by-4.0', datasets=['user/images'], dataset_name='Coloured noise', tags=['noise']))))
    assert script.train(image_folder, '--push-to-hub', '--config', config, hub_model_id='user/model') == 0, script.text
    data = ModelCard(server.file('user/model', 'README.md').decode()).data
    assert data.license == 'cc-by-4.0' and data.datasets == ['user/images'] and 'noise' in data.tags
    assert data.eval_results[0].dataset_name == 'Coloured noise'
    config.write_text('card: {licence: mit}')
    assert script.train(image_folder, '--config', config, experiment='other') == 2
    assert "no field 'licence'" in script.lines[-1]
