"""Runs that push to a Hub on loopback, the command line, and loading from the Hub."""
import _thread
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_helpers import READ_TOKEN, TOKEN, load_elsewhere, logits, small_model
from hub_server import File, metadata_errors
from huggingface_hub import ModelCard

from timm_multimix import push_to_hub
from timm_multimix.common.errors import UsageError
from timm_multimix.evaluation.models import load_candidate
from timm_multimix.hub.command import main as hub_command
from timm_multimix.training import hub as training_hub
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers', 'hub_helpers']


# Runs.

def test_run_is_pushed_at_its_end(server, script, image_folder, tmp_path):
    options = dict(multimix='dense', epochs=3, mean='0.4', crop_pct=0.9, interpolation='bilinear', seed=3)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end', **options) == 0, \
        script.text
    assert server.repos['user/model'].titles[1:] == [server.repos['user/model'].head().title]
    best = script.checkpoint('model_best.pth.tar')
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(best['state_dict'])
    loaded, data, names = load_elsewhere(server, 'hf-hub:user/model', tmp_path, size=32)
    assert torch.equal(loaded, logits(model, 32)) and names == ['a', 'b', 'c']
    assert data == dict(input_size=[3, 32, 32], interpolation='bilinear', mean=[0.4] * 3, std=[0.5] * 3,
                        crop_pct=0.9, crop_mode='center')
    assert f'epoch {best["epoch"]}, top1 {best["metric"]:.4g}' in server.repos['user/model'].head().title
    assert 'training_curve.png' in server.repos['user/model'].head().files
    assert not [name for name in script.written() if name.endswith('.tmp')]


@pytest.mark.parametrize('strategy', ['every_save', 'best'])
def test_strategies(server, script, image_folder, strategy):
    """Without --hub-model-id, the repository has the name of the run."""
    script.train(
        image_folder, '--push-to-hub', '--hub-always-push', experiment='model', hub_strategy=strategy, epochs=3)
    rows = [float(row['eval_top1']) for row in script.summary('model')]
    bests = [epoch for epoch in range(3) if all(rows[epoch] > earlier for earlier in rows[:epoch])]
    epochs = [int(title.split('epoch ')[1].split(',')[0]) for title in server.repos['user/model'].titles[1:]]
    during = [0, 1, 2] if strategy == 'every_save' else bests
    assert epochs[:len(during)] == during
    assert epochs[len(during):] in ([], [bests[-1]])  # the best checkpoint again, with the complete curve
    assert epochs[-1] == bests[-1]
    assert script.status == 0 and 'Finish the upload' not in script.text


def test_a_push_under_way_is_not_waited_for(server, script, image_folder, monkeypatch):
    """Training ends while the first upload blocks. The last push replaces the skipped ones."""
    server.gate = threading.Event()
    at_the_end = []
    finish = training_hub.HubPush.finish

    def release(push):
        at_the_end.append(len(script.summary()))
        server.gate.set()
        finish(push)

    monkeypatch.setattr(training_hub.HubPush, 'finish', release)
    script.train(image_folder, '--push-to-hub', hub_model_id='user/model', epochs=4)
    assert at_the_end == [4] and script.status == 0
    assert len(server.repos['user/model'].titles) <= 3
    assert f'epoch {script.checkpoint("model_best.pth.tar")["epoch"]},' in server.repos['user/model'].head().title


@pytest.mark.parametrize('status', [403, 'cut'])
def test_failed_uploads_do_not_stop_training_and_are_finished_later(server, script, image_folder, status):
    path = ('PUT', '/') if status == 'cut' else ('POST', '/commit/')
    server.fail(*path, *[status] * 500)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model') == 0
    assert len(script.summary()) == 1 and script.checkpoint()['epoch'] == 0
    assert server.repos['user/model'].titles == ['initial commit']
    assert not [name for name in script.written() if name.endswith('.tmp')]
    assert 'The run itself is complete' in script.text and TOKEN not in script.text
    assert ' hub push ' in script.lines[-1]
    server.faults.clear()
    assert hub_command(script.lines[-1].partition(' hub ')[2].split()) == 0
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict'])
    assert torch.equal(logits(loaded), logits(model))


def join_hub_threads() -> None:
    """Wait for abandoned uploads of runs in this process."""
    for thread in threading.enumerate():
        if thread.name == 'hub':
            thread.join()


def test_stopped_run_is_left_alone(server, script, image_folder):
    """The checkpoint that is being uploaded is the last one that is pushed."""
    server.gate = threading.Event()
    server.fail('PUT', '/', _thread.interrupt_main)  # during the upload of epoch 0
    assert script.train(
        image_folder, '--push-to-hub', '--hub-always-push', hub_model_id='user/model', epochs=100000) == 130
    assert script.lines[-1].endswith('--resume auto') and 'Finish the upload' not in script.text
    server.gate.set()
    join_hub_threads()
    (title,) = server.repos['user/model'].titles[1:]
    assert 'epoch 0,' in title and not any(name.endswith('.tmp') for name in script.written())


def test_interrupt_while_the_last_upload_is_under_way(server, script, image_folder):
    server.gate = threading.Event()  # the upload cannot end before the signal has arrived
    server.fail('PUT', '/', _thread.interrupt_main)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end') == 130
    assert 'Finish the upload with' in script.text and script.checkpoint('model_best.pth.tar')['epoch'] == 0
    server.gate.set()
    join_hub_threads()
    assert hub_command(script.lines[-1].partition(' hub ')[2].split()) == 0
    assert len(server.repos['user/model'].titles) == 2


@pytest.mark.parametrize('method, path', [('POST', '/commit/'), ('PUT', '/')])
def test_end_of_a_run_does_not_wait_without_limit(server, script, image_folder, monkeypatch, method, path):
    """The Hub carries out a request without a response. The run ends and logs the command that pushes it."""
    monkeypatch.setattr(training_hub.HubPush, 'patience', 0.5)
    begin = training_hub.HubPush.begin

    def mute(push, run):
        begin(push, run)
        server.fail(method, path, 'mute')

    monkeypatch.setattr(training_hub.HubPush, 'begin', mute)
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', hub_strategy='end') == 0
    assert 'took longer than' in script.text and 'The run itself is complete' in script.text
    assert ' hub push ' in script.lines[-1]
    server.unmute.set()
    join_hub_threads()
    assert hub_command(script.lines[-1].partition(' hub ')[2].split()) == 0
    assert len(server.repos['user/model'].titles) == 2  # only the response to the commit was lost


@pytest.mark.slow
def test_process_ends_while_the_hub_is_silent(server, script, image_folder):
    """The upload thread does not keep the process alive."""
    server.fail('POST', '/commit/', 'mute')
    code = ('import sys; from timm_multimix.training import hub, main; hub.HubPush.patience = 0.1; '
            'sys.exit(main(sys.argv[1:]))')
    done = subprocess.run(
        [sys.executable, '-c', code, *training_arguments(image_folder), '--epochs', '1', '--hub-strategy', 'end'],
        cwd=script.folder, env=environment(server, script), capture_output=True, text=True)
    assert done.returncode == 0 and 'took longer than' in done.stderr, done.stderr
    assert not any(name.endswith('.tmp') for name in script.written())


@pytest.mark.parametrize('arguments, message', [
    (dict(token=None), 'hf auth login'),
    (dict(token=READ_TOKEN), 'is read-only'),
    (dict(hub_model_id='somebody/model'), 'your own namespace'),
    (dict(hub_model_id='user/a--b'), 'repository name'),
    (dict(taken=True), 'contains a test_convnext'),
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


def training_arguments(image_folder) -> list[str]:
    return ['--data-dir', str(image_folder), '--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0',
            '--experiment', 'run', '--lr', '0.01', '--push-to-hub', '--hub-model-id', 'user/model']


def environment(server, script) -> dict[str, str]:
    return {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HOME': str(script.folder / 'home')}


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_killed_while_uploading(server, script, image_folder):
    """After SIGKILL during an upload, the run can be resumed, and the files of the upload are removed."""
    server.gate = threading.Event()  # the first upload never ends
    uploading = threading.Event()
    server.fail('PUT', '/', uploading.set)
    command = [sys.executable, str(Path(__file__).parent.parent / 'train_timm.py'), *training_arguments(image_folder),
               '--epochs', '100000']
    process = subprocess.Popen(
        command, cwd=script.folder, stderr=subprocess.PIPE, text=True, env=environment(server, script))
    for line in process.stderr:
        if ': validation ' in line and uploading.is_set():
            process.kill()
            break
    process.communicate()
    assert any(name.endswith('.tmp') for name in script.written())
    server.gate.set()
    epochs = script.checkpoint()['epoch'] + 2
    assert script.train(image_folder, '--push-to-hub', hub_model_id='user/model', epochs=epochs, resume='auto') == 0, \
        script.text
    assert not any(name.endswith('.tmp') for name in script.written())
    assert len(script.summary()) == epochs and len(server.repos['user/model'].titles) > 1


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """The folder of the system for temporary files."""
    folder = tmp_path / 'system'
    folder.mkdir()
    monkeypatch.setenv('TMPDIR', str(folder))
    monkeypatch.setattr('tempfile.tempdir', None)
    return folder


def test_interrupt_of_the_push_command(server, script, trained, temporary_folder):
    """The command removes its copy of the weights."""
    server.gate = threading.Event()
    copies, before = [], script.written()

    def stop():
        copies.extend(temporary_folder.rglob('model.safetensors'))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    server.fail('PUT', '/', stop)
    assert hub_command(['push', str(trained), 'user/model']) == 130
    assert len(copies) == 1 and not list(temporary_folder.rglob('model.safetensors')) and script.written() == before
    assert server.repos['user/model'].titles == ['initial commit']


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_killed_push_command(server, script, trained, number):
    """It leaves no copies of the weights in the run folder."""
    server.gate = threading.Event()
    uploading, before = threading.Event(), script.written()
    server.fail('PUT', '/', uploading.set)
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_multimix.hub', 'push', str(trained), 'user/model'],
        env=environment(server, script))
    uploading.wait()
    process.send_signal(number)
    process.wait()
    assert script.written() == before


def test_token_on_the_command_line_is_refused_and_not_repeated(script, server, image_folder):
    assert script.train(image_folder, '--push-to-hub', hub_token=TOKEN) == 2
    assert 'HF_TOKEN' in script.text and TOKEN not in script.text
    assert hub_command(['push', str(image_folder), 'user/model', '--token', TOKEN]) == 2
    assert TOKEN not in script.capsys.readouterr().err


def test_training_is_the_same_with_uploads(server, script, image_folder):
    script.train(image_folder, experiment='alone', multimix='dense', epochs=2)
    script.train(image_folder, '--push-to-hub', experiment='pushed', hub_model_id='user/model', multimix='dense',
                 epochs=2)
    alone, pushed = (script.checkpoint(name=name)['state_dict'] for name in ('alone', 'pushed'))
    assert all(torch.equal(alone[name], pushed[name]) for name in alone)


def test_card_of_a_run_that_was_resumed_with_another_objective(script, image_folder, trained):
    """The run can be interrupted between two resumes. Checkpoints of the first part describe only that part."""
    first = {path.name: torch.load(path, weights_only=True)['args'] for path in trained.glob('*.pth.tar')}
    assert not any('earlier' in args for args in first.values())
    for epochs in (3, 4):
        assert script.train(image_folder, '--model-ema', multimix='pooled', smoothing=0.3, epochs=epochs, mean='0.4',
                            crop_pct=0.9, resume='auto') == 0, script.text
    assert script.checkpoint()['args']['earlier'] == [
        dict(epoch=2, in_epoch=False, options=dict(multimix='dense', smoothing=0.1))]
    os.replace(trained / 'last.pth.tar', trained / 'model_best.pth.tar')
    script.capsys.readouterr()
    assert hub_command(['card', str(trained)]) == 0
    card = script.capsys.readouterr().out
    recipe, before = (yaml.safe_load(part.split('```')[0]) for part in card.split('```yaml\n')[1:])
    assert recipe['multimix'] == 'pooled' and before == dict(multimix='dense', smoothing=0.1)
    assert 'Before epoch 2, the run used these options instead' in card
    assert 'trained with pooled [MultiMix]' in card and 'Before epoch 2, it was trained with dense [MultiMix]' in card


# Command line.

def test_push_command(server, trained, script, tmp_path):
    assert hub_command(['push', str(trained), 'user/model', '--private', '--revision', 'v1']) == 0
    assert server.repos['user/model'].private and server.repos['user/model'].head('v1').title.startswith('test_resnet')
    checkpoint = script.checkpoint('model_best.pth.tar')
    for weights, key in dict(best='state_dict_ema', student='state_dict', ema='state_dict_ema').items():
        assert hub_command(['push', str(trained), f'user/{weights}', '--weights', weights]) == 0
        model = timm.create_model('test_resnet', num_classes=3)
        model.load_state_dict(checkpoint[key])
        assert torch.equal(logits(timm.create_model(f'hf-hub:user/{weights}', pretrained=True)), logits(model))
    assert hub_command(['push', str(trained), 'user/x', '--weights', 'teacher']) == 2
    output = script.capsys.readouterr().err
    assert 'does not contain the teacher weights. Choose from best, ema, student.' in output
    assert 'user/x' not in server.repos


def test_push_to_the_repository_of_the_run(server, trained):
    """The branch, the weights and the visibility are those of the run."""
    args = yaml.safe_load((trained / 'args.yaml').read_text())
    args.update(hub_model_id='user/secret', hub_private_repo=True, hub_revision='dev', hub_weights='student')
    (trained / 'args.yaml').write_text(yaml.safe_dump(args))
    assert hub_command(['push', str(trained)]) == 0
    assert server.repos['user/secret'].private
    assert 'dev' in server.repos['user/secret'].branches


def test_metrics_are_those_of_the_weights_that_are_pushed(server, trained, script):
    checkpoint = script.checkpoint('model_best.pth.tar')
    assert checkpoint['metrics'].keys() == {'state_dict', 'state_dict_ema'}
    checkpoint.update(metric=47.04, metrics=dict(state_dict=dict(top1=80.56), state_dict_ema=dict(top1=47.04)))
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    for weights, shown, other in (('best', '47.04', '80.56'), ('student', '80.56', '47.04'), ('ema', '47.04', '80.56')):
        assert hub_command(['push', str(trained), f'user/{weights}', '--weights', weights]) == 0
        card = server.file(f'user/{weights}', 'README.md').decode()
        assert f'top1 {shown}' in server.repos[f'user/{weights}'].head().title and f'| {shown} %' in card
        assert other not in server.repos[f'user/{weights}'].head().title + card
        assert f'top1 {shown}' in script.capsys.readouterr().err
    del checkpoint['metrics']['state_dict']
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    assert hub_command(['push', str(trained), 'user/unknown', '--weights', 'student']) == 0
    assert 'top1' not in server.repos['user/unknown'].head().title


def test_what_is_there_already_is_not_committed_again(server, script, image_folder, trained, capsys):
    for _ in range(2):
        assert hub_command(['push', str(trained), 'user/model']) == 0
    assert server.count('POST', '/commit/') == 1 and 'No files have been modified' not in capsys.readouterr().err
    assert script.train(  # after one epoch, the last push has no changes
        image_folder, '--push-to-hub', '--hub-always-push', hub_model_id='user/other', experiment='other') == 0
    assert len([line for line in script.lines if line.startswith('Pushed ')]) == 1, script.text
    assert server.count('POST', '/commit/') == 2 and 'No files have been modified' not in script.text


def test_export_command(server, script, trained, tmp_path):
    """Without a network, the command exports the selected weights to a folder that timm loads."""
    server.close()
    checkpoint = script.checkpoint('model_best.pth.tar')
    model = timm.create_model('test_resnet', num_classes=3)
    for weights, key in dict(best='state_dict_ema', student='state_dict').items():
        target = tmp_path / 'models' / weights
        assert hub_command(['export', str(trained), str(target), '--weights', weights]) == 0
        output = script.capsys.readouterr().err
        model.load_state_dict(checkpoint[key])
        loaded = timm.create_model(f'local-dir:{target}', pretrained=True)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c'] and loaded.pretrained_cfg['crop_pct'] == 0.9
        assert f"timm.create_model('local-dir:{target}', pretrained=True)" in output and 'model_best.pth.tar' in output
    assert {'model.safetensors', 'config.json', 'README.md'} <= {path.name for path in target.iterdir()}
    assert sorted(path.name for path in target.parent.iterdir()) == ['best', 'student'] and not server.requests
    assert hub_command(['export', str(trained), str(target)]) == 2
    assert 'already exists' in script.capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    assert hub_command(['export', str(trained), str(tmp_path / 'empty'), '--weights', 'teacher']) == 2
    assert not list((tmp_path / 'empty').iterdir())
    assert hub_command(['export', str(trained), str(tmp_path / 'empty')]) == 0


def test_command_that_the_end_of_a_run_names(server, script, image_folder, tmp_path):
    assert script.train(image_folder, '--model-ema', model_ema_decay=0.5) == 0
    command = next(line for line in script.lines if ' hub export ' in line).partition(' hub ')[2].split()
    assert hub_command(command) == 0
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict_ema'])
    assert torch.equal(logits(timm.create_model(f'local-dir:{command[-1]}', pretrained=True)), logits(model))


def test_weights_that_gave_the_metric_and_calibrated_ones_come_first(server, script, trained):
    checkpoint = script.checkpoint('model_best.pth.tar')
    checkpoint['eval_weights'] = 'student'
    torch.save(checkpoint, trained / 'model_best.pth.tar')
    assert hub_command(['push', str(trained), 'user/model']) == 0
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(checkpoint['state_dict'])
    assert torch.equal(logits(timm.create_model('hf-hub:user/model', pretrained=True)), logits(model))
    checkpoint['state_dict']['fc.weight'] *= 0.5
    torch.save(checkpoint, trained / 'model_calibrated.pth.tar')
    assert hub_command(['push', str(trained), 'user/model']) == 0
    model.load_state_dict(checkpoint['state_dict'])
    assert torch.equal(logits(timm.create_model('hf-hub:user/model', pretrained=True)), logits(model))


def test_folder_of_timms_own_script(server, script, trained):
    """Without config.json, the model is rebuilt from the arguments in the checkpoint."""
    (trained / 'config.json').unlink()
    assert hub_command(['push', str(trained), 'user/model']) == 0
    loaded = timm.create_model('hf-hub:user/model', pretrained=True)
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(script.checkpoint('model_best.pth.tar')['state_dict_ema'])
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.pretrained_cfg['crop_pct'] == 0.9 and tuple(loaded.pretrained_cfg['mean']) == (0.4,) * 3


@pytest.mark.parametrize('argv, message', [
    (['push', 'nowhere', 'user/model'], 'no such folder'),
    (['push', '.', 'user/model'], 'not a run folder with a finished epoch'),
    (['push', '.'], 'No repository is given'),
    (['pull', '.'], 'invalid choice'),
    ([], 'required'),
])
def test_command_mistakes(server, script, argv, message):
    assert hub_command(argv) == 2
    assert message in script.capsys.readouterr().err


def test_card_needs_no_network(trained, script, server):
    server.close()
    script.capsys.readouterr()
    assert hub_command(['card', str(trained)]) == 0
    card, output = script.capsys.readouterr()
    assert 'Model card for the average of the weights, from' in output and 'model_best.pth.tar' in output
    assert metadata_errors(card) == [] and '# run' in card and not server.requests


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
    """A checkpoint in the repository is resumed. Without one, only the weights are loaded, and a line is logged."""
    model = small_model()
    push_to_hub(model, 'user/model')
    assert script.train(image_folder, '--model-ema', lr=1e-12, weight_decay=0, resume='hf-hub:user/model') == 0, \
        script.text
    assert 'contains only weights' in script.text
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
    torch.testing.assert_close(candidate(images), expected)
    assert candidate.model.num_classes == 3
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
