"""Test push_to_hub with the real huggingface_hub client and a Hub on loopback."""
import json
import logging
import traceback
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
import pytest
import timm
import torch
from hub_helpers import READ_TOKEN, TOKEN, logits, small_model
from hub_server import File, User, metadata_errors
from huggingface_hub import ModelCard

from timm_multimix import attach, push_to_hub
from timm_multimix.build.hub_files import download
from timm_multimix.hub import HubError
from timm_multimix.hub.command import main as hub_command
from timm_multimix.hub.models import save_config, save_weights
from timm_multimix.hub.repository import HubRepository, limit_waiting

pytest_plugins = ['training_helpers', 'hub_helpers']


# push_to_hub.

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
    with pytest.raises(HubError, match=r'(?s)cannot rebuild this model.*layer1'):
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


# Existing repositories.

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
    with pytest.raises(HubError, match='contains a test_resnet, but this model is a test_convnext'):
        push_to_hub(other, 'user/model')
    assert len(server.repos['user/model'].titles) == 2
    push_to_hub(other, 'user/model', force=True)
    assert json.loads(server.file('user/model', 'config.json'))['architecture'] == 'test_convnext'


@pytest.mark.parametrize('config', [None, b'{"model_type": "bert"}'])
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
        save_config(model, folder / 'config.json')
        save_weights(model.state_dict(), folder / 'model.safetensors')
        return folder
    return write


def opened(**options) -> HubRepository:
    repository = HubRepository('user/model', **options)
    repository.log_in()
    repository.open('test_resnet')
    return repository


def test_commit_of_somebody_else_in_between_is_not_overwritten_unseen(server, model_folder):
    """Other files are kept, other weights are not replaced, and a commit after the check is detected."""
    repository, folder = opened(), model_folder()
    repository.push(folder, 'ours')
    theirs = server.repos['user/model']

    def note():
        theirs.commit('main', 'note', {**theirs.head().files, 'NOTES': File(b'note', False)})

    server.fail('POST', '/commit/', note)  # between check and commit: status 412
    repository.push(model_folder(1), 'ours again')
    assert theirs.titles == ['initial commit', 'ours', 'note', 'ours again'] and 'NOTES' in theirs.head().files

    server.fail('POST', '/commit/', lambda: theirs.commit(
        'main', 'theirs', {**theirs.head().files, 'model.safetensors': File(b'theirs', True)}))
    with pytest.raises(HubError, match='Other weights were pushed') as error:
        repository.push(model_folder(2), 'ours')
    assert not error.value.is_temporary and theirs.titles[-1] == 'theirs'
    repository.force = True
    repository.push(folder, 'forced')
    assert theirs.titles[-1] == 'forced'


def test_card_that_cannot_be_read_is_not_replaced(server, model_folder):
    """huggingface_hub raises an EntryNotFoundError for a failed download, as for a missing file."""
    repository, folder = opened(), model_folder()
    (folder / 'README.md').write_text('<!-- Written by timm-multimix. -->')
    theirs = server.repos['user/model']
    theirs.commit('main', 'mine', {**theirs.head().files, 'README.md': File(b'My own words.', False)})
    server.fail('HEAD', 'README.md', *[500] * 100)
    with pytest.raises(HubError, match='500') as error:
        repository.push(folder, 'ours')
    assert error.value.is_temporary and theirs.titles[-1] == 'mine'
    server.faults.clear()
    repository.push(folder, 'ours')
    assert theirs.titles[-1] == 'ours' and server.file('user/model', 'README.md') == b'My own words.'


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
    repository.push(folder, 'ours')
    assert committed.titles == ['initial commit', 'ours']


# Errors.

def test_without_a_token(server, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(HubError, match=r'hf auth login.*HF_TOKEN'):
        push_to_hub(small_model(), 'user/model')
    assert not server.requests


@pytest.mark.parametrize('token, repo_id, message', [
    ('hf_unknownunknownunknown', 'user/model', 'token is not valid.*hf auth login'),
    (READ_TOKEN, 'user/model', 'is read-only.*settings/tokens'),
    (TOKEN, 'somebody/model', 'your own namespace.*rights to create'),
    ('hf_finefinefinefine', 'user/model', 'does not permit this'),
])
def test_invalid_tokens(server, monkeypatch, token, repo_id, message):
    server.tokens['hf_finefinefinefine'] = User('user', 'fineGrained', writable=('user/other',))
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(HubError, match=message) as error:
        push_to_hub(small_model(), repo_id)
    assert not error.value.is_temporary and token not in str(error.value) and not server.repos


def test_repository_that_others_may_write_only(server):
    server.create('somebody/model')
    with pytest.raises(HubError, match='does not permit this'):
        push_to_hub(small_model(), 'somebody/model')
    assert not server.count('POST', '/preupload/')  # nothing was sent
    server.create('somebody/secret', private=True)
    with pytest.raises(HubError, match='your own namespace'):
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
    repository.push(folder, 'ours', sleep=waits.append)
    assert not server.faults[0].actions
    assert server.repos['user/model'].titles == ['initial commit', 'ours']
    if actions == [(429, {'Retry-After': '7'})]:
        assert waits == [7]
    assert server.file('user/model', 'model.safetensors') == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('status, temporary, calls, message', [
    (401, False, 1, 'hf auth login'), (403, False, 1, 'write access to this repository'), (400, False, 1, '400'),
    (404, False, 1, 'no such repository'), (409, True, 3, 'another commit'), (429, True, 3, 'too many requests'),
    (500, True, 3, '500')])
def test_errors_that_stay(server, model_folder, status, temporary, calls, message):
    """Temporary errors are retried. The message contains the remedy, and the repository is unchanged."""
    repository, folder = opened(), model_folder()
    server.fail('POST', '/commit/', *[status] * 50)
    with pytest.raises(HubError, match=message) as error:
        repository.push(folder, 'ours')
    assert error.value.is_temporary == temporary
    assert server.count('POST', '/commit/') == calls
    assert server.repos['user/model'].titles == ['initial commit']


def test_nobody_listens(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(HubError, match='Logging in to the Hugging Face Hub: no connection to http:') as error:
        push_to_hub(small_model(), 'user/model')
    assert 'http://127.0.0.1:9' in str(error.value)
    assert error.value.is_temporary


def test_download_without_a_connection(server):
    server.close()
    with pytest.raises(HubError, match='Downloading from the Hub: no connection to http:') as error:
        download('hf-hub:user/model', 'model.safetensors', 'config.json')
    assert error.value.is_temporary


def test_cards_pass_the_hubs_own_validation(server, trained, script):
    assert hub_command(['push', str(trained), 'user/model']) == 0
    assert server.count('POST', '/api/validate-yaml')  # a push with an invalid card is refused
    card = server.file('user/model', 'README.md').decode()
    assert not metadata_errors(card)
    assert 'license' in metadata_errors(card.replace('library_name:', 'license: none of them\nlibrary_name:'))[0]


# Tokens.

KINDS = ['hf_abcdefghijklmnopqrstuvwxyz01234567', 'hf_oauth_abcDEF123456ghiJKL7890',
         'hf_jwt_eyJhbGciOiJFUzI1NiJ9abcd.eyJzdWIiOi.c2ln-b_F0', 'api_org_abcdefghijklmnopqrstuvwx', 'plainsecret',
         'with/slash+and=', 'a.b-c_d~e']
ECHOES = ['Bearer {} said no', 'https://user:{}@huggingface.co/x', 'https://huggingface.co/x?token={}&y=1', '"{}"',
          'x{}y', 'token%3D{}', '({}).']


@pytest.mark.parametrize('source', ['HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'file'])
@pytest.mark.parametrize('token', KINDS)
def test_tokens_in_use_are_not_repeated(tmp_path, monkeypatch, token, source):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    if source == 'file':
        (tmp_path / 'token').write_text(token + '\n')
    else:
        monkeypatch.setenv(source, token)
    for echo in ECHOES:
        before, after = echo.split('{}')
        for shown in (token, quote(token, safe='')):
            text = str(HubError(echo.format(shown)))
            assert shown not in text and token not in text, text
            assert text.startswith(before) and text.endswith(after.strip('y')), text


@pytest.mark.parametrize('token', [kind for kind in KINDS if kind.startswith(('hf_', 'api_org_'))])
def test_tokens_of_others_are_not_repeated_either(token):
    for echo in ECHOES:
        text = str(HubError(echo.format(token)))
        assert token not in text and token[-6:] not in text, text


@pytest.mark.parametrize('token', ['plainsecretwithoutaprefix', KINDS[1]])
def test_token_that_the_hub_echoes(server, monkeypatch, script, image_folder, token):
    """The token is not in the traceback of an error, the log of a run, or its files."""
    server.tokens[token] = User('user')
    monkeypatch.setenv('HF_TOKEN', token)
    text = f'The token {token} of https://user:{token}@hub may not do this'
    server.fail('POST', '/commit/', *[(400, dict(X_Error_Message=text))] * 4)
    with pytest.raises(HubError, match='may not do this') as error:
        push_to_hub(small_model(), 'user/model')
    shown = ''.join(traceback.format_exception(error.value))
    assert token not in shown
    server.repos.clear()
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end') == 0
    assert 'may not do this' in script.text and token not in script.text
    logging.getLogger('any.library').warning(f'Bearer {token}')
    assert token not in script.capsys.readouterr().err
    for path in script.folder.rglob('*'):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize('token', ['plainsecretwithoutaprefix', 'hf_abcdefghijklmnopqrstuvwxyz01234567'])
@pytest.mark.parametrize('options', [
    dict(experiment='{}'), dict(model_kwargs='token={}'), dict(hub_model_id='user/{}'), dict(dataset='hfds/{}'),
    dict(data_dir='https://user:{}@host/data'), dict(wandb_tags='{}'), dict(config='card: {{description: "{}"}}'),
    dict(config='aa: x{}')])
def test_tokens_in_options_are_refused(server, monkeypatch, script, image_folder, tmp_path, options, token):
    monkeypatch.setenv('HF_TOKEN', 'plainsecretwithoutaprefix')
    options = {name: value.format(token) for name, value in options.items()}
    if 'config' in options:
        (tmp_path / 'recipe.yaml').write_text(options['config'])
        options['config'] = tmp_path / 'recipe.yaml'
    assert script.train(image_folder, '--push-to-hub', **options) == 2
    assert 'contains an access token' in script.lines[-1] and token not in script.text
    assert not script.written() and not server.requests


def test_words_like_tokens_are_no_tokens(script, image_folder):
    assert script.train(image_folder, output='hf_checkpoints', experiment='hf_experiment') == 0
    assert 'hf_checkpoints/hf_experiment/last' in script.text or 'hf_checkpoints/hf_experiment' in script.text


def test_repository_named_like_a_token_is_refused(server):
    with pytest.raises(HubError, match='contains an access token') as error:
        push_to_hub(small_model(), 'hf_abcdefghijklmnopqrstuvwxyz01234567')
    assert 'abcdef' not in str(error.value) and not server.requests


# Timeouts.

def test_requests_time_out(server, model_folder, monkeypatch):
    """The Hub carries out a commit without a response. It is not made twice, and the next weights are accepted."""
    limit_waiting(2)
    try:
        repository, folder = opened(), model_folder()
        server.fail('POST', '/commit/', 'mute')
        repository.push(folder, 'ours')
        assert server.repos['user/model'].titles == ['initial commit', 'ours']
        monkeypatch.setattr('timm_multimix.hub.repository.RETRY_WAITS', ())
        server.fail('POST', '/commit/', 'mute')
        with pytest.raises(HubError, match='no connection'):
            repository.push(model_folder(1), 'second')
        repository.push(model_folder(2), 'third')
        assert server.repos['user/model'].titles == ['initial commit', 'ours', 'second', 'third']
    finally:
        limit_waiting(None)


def test_timeout_keeps_the_settings_of_the_client(server, monkeypatch):
    """Offline mode is a hook of huggingface_hub's client."""
    limit_waiting(60)
    try:
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(HubError, match='offline mode is enabled'):
            push_to_hub(small_model(), 'user/model')
        assert huggingface_hub.get_session().timeout.read == 60 and not server.requests
    finally:
        limit_waiting(None)
