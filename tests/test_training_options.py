"""Options of the training script compared with those of timm's script, and YAML files of options."""
import csv
from pathlib import Path

import pytest
import yaml
from timm.utils import ParseKwargs

from timm_multimix.build.option import Option
from timm_multimix.common.errors import UsageError
from timm_multimix.options import build_training_parser
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers']

with open(Path(__file__).parent / 'timm_options.csv', newline='') as _file:
    TIMM_OPTIONS = list(csv.DictReader(_file))


def _facts(option: Option) -> dict[str, str]:
    settings, action = option.settings, option.settings.get('action')
    kind = {'store_true': 'flag', ParseKwargs: 'pairs'}.get(action, settings.get('type', str).__name__)
    return dict(
        names=' '.join(option.names),
        type=kind,
        nargs=str(settings.get('nargs', '')),
        default=repr(build_training_parser().get_default(option.dest)),
        const=repr(settings['const']) if 'const' in settings else '',
        choices=' '.join(map(str, settings.get('choices', ()))),
    )


@pytest.mark.parametrize('facts', TIMM_OPTIONS, ids=[facts['names'].split()[-1] for facts in TIMM_OPTIONS])
def test_option_is_timms(facts):
    options = [option for same in build_training_parser().options.values() for option in same]
    option, = (option for option in options if ' '.join(option.names) == facts['names'])
    assert _facts(option) == facts


def test_all_options_have_a_help_text():
    for options in build_training_parser().options.values():
        assert all(option.settings['help'] for option in options)
    assert '--multimix {off,pooled,dense}' in build_training_parser().format_help()


@pytest.fixture
def parse(tmp_path, image_folder):
    def run(config=None, *argv):
        if config is not None:
            path = tmp_path / 'config.yaml'
            path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
            argv = ('--config', str(path), *argv)
        return parse_args(['--data-dir', str(image_folder), *argv])
    return run


def test_defaults_are_timms_with_user_data(parse):
    args = vars(parse())
    for name, value in vars(build_training_parser().parse_args([])).items():
        if name not in ('config', 'timm_script', 'data_dir', 'device'):
            assert args[name] == value, name


def test_command_line_takes_precedence_over_file(parse):
    args = parse(dict(lr=0.5, opt='adamw', mean=[0.1]), '--lr', '0.25')
    assert (args.lr, args.opt, args.mean) == (0.25, 'adamw', [0.1])


def test_file_values_are_converted(parse):
    args = parse("""
lr: 3e-4              # YAML parses a string
epochs: '10'
decay-milestones: [1, '2']
multimix: off         # YAML parses False
amp: true
opt_kwargs: {eps: 1.0e-7}
experiment: 7
stop_epoch:
input_size: [3, 32, 32]
multimix_alpha: 0.3   # a single value of a list option
""")
    assert (args.lr, args.epochs, args.decay_milestones, args.multimix) == (3e-4, 10, [1, 2], 'off')
    assert (args.amp, args.opt_kwargs, args.experiment, args.stop_epoch) == (True, {'eps': 1e-7}, '7', None)
    assert (args.input_size, args.multimix_alpha) == ([3, 32, 32], [0.3])


@pytest.mark.parametrize('name, given, expected', [
    ('mean', [-0.5, -1e-5, '-2e-3'], [-0.5, -1e-5, -2e-3]), ('mean', -0.5, [-0.5]), ('min_lr', -0.0, 0.0),
    ('experiment', '-x', '-x'), ('experiment', 'a b=c', 'a b=c'), ('val_split', '', ''), ('wandb_tags', [], []),
    ('mean', [], None), ('wandb_tags', ['a b', 'c'], ['a b', 'c']), ('save_epochs', (1, 2), [1, 2]),
    ('clip_grad', float('inf'), float('inf')), ('calibrate', 0.25, '0.25'), ('calibrate', True, '0.1'),
    ('calibrate', False, None), ('torchcompile', 'eager', 'eager'), ('torchscript', False, False),
    ('multimix', False, 'off'), ('no_multimix_balance', False, False), ('no_multimix_balance', True, True),
    ('multimix_views', 2, 2), ('model_kwargs', {}, {}), ('data', '-folder', '-folder'),
    ('model_kwargs', {'a': [1, {'b': None}], 'c': 'd=e', 'f': '1', 'g': True}, ...),
])
def test_values_are_parsed_as_on_the_command_line(name, given, expected):
    values = build_training_parser().parse_values({'mean': [0.1], name: given, 'std': 2, 'unknown': 3, 'lr': None})
    assert values == {'mean': [0.1], name: given if expected is ... else expected, 'std': [2.0]}
    assert type(values[name]) is type(given if expected is ... else expected)


def test_a_flag_of_a_file_is_false(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('sched_on_updates: false')  # the defaults of the digits set it
    assert parse_args([]).sched_on_updates and not parse_args(['--config', str(path)]).sched_on_updates


def test_files_are_parsed_before_the_command_line(parse, tmp_path, image_folder):
    assert parse(dict(no_multimix_balance=True), '--multimix-balance').no_multimix_balance is False
    with pytest.raises(UsageError, match='--torchscript and --torchcompile cannot be combined'):
        parse(dict(torchcompile='eager'), '--torchscript')
    path = tmp_path / 'config.yaml'
    path.write_text('mean: [0.1]')
    args = parse_args(['--config', str(path), str(image_folder)])
    assert (args.mean, args.data_dir) == ([0.1], str(image_folder))


def test_eval_metric_with_the_name_of_weights(parse):
    teacher = dict(multimix='dense', multimix_teacher='ema')
    args = parse(dict(teacher, eval_metric='teacher_top1'))  # as in version 0.1
    assert (args.eval_metric, args.eval_weights) == ('top1', 'teacher')
    args = parse(dict(teacher, eval_metric='teacher_top1'), '--eval-weights', 'student', '--eval-metric', 'loss')
    assert (args.eval_metric, args.eval_weights) == ('loss', 'student')
    assert parse(teacher).eval_weights is None
    with pytest.raises(UsageError, match='--eval-weights must be one of student, the weights that this run validates'):
        parse(dict(model_ema=True, model_ema_force_cpu=True, eval_weights='ema'))


def test_unknown_keys_of_a_file_are_reported(parse, caplog):
    assert parse(dict(lr=0.5, cluster_name='x')).lr == 0.5
    assert 'cluster_name' in caplog.text


@pytest.mark.parametrize('key,option', [
    ('moodel', 'model'), ('multimx_n', 'multimix_n'), ('batch-sizes', 'batch_size'), ('ephocs', 'epochs')])
def test_misspelt_keys_of_a_file_are_refused(parse, key, option):
    with pytest.raises(UsageError, match=f'Did you mean .*{option}'):
        parse({key: 3})


@pytest.mark.parametrize('key,value,option', [
    ('dataset_trust_remote_code', True, '--dataset-trust-remote-code'), ('device_modules', ['os'], '--device-modules')])
def test_files_cannot_allow_other_code_to_run(parse, key, value, option):
    with pytest.raises(UsageError, match=option):
        parse({key: value})
    argv = [option] if value is True else [option, *value]
    assert getattr(parse(None, *argv), key) == value
    assert not getattr(parse({key: None}), key)


@pytest.mark.parametrize('config,word', [
    (dict(multimix_logit_scale='auto'), "--multimix-logit-scale: invalid float value: 'auto'"),
    (dict(lr='fast'), "--lr: invalid float value: 'fast'"), (dict(epochs=1.5), "--epochs: invalid int value: '1.5'"),
    (dict(train_size_schedule='constan'), 'choose from .*Did you mean constant'),
    (dict(amp='yes'), "--amp must be true or false, got 'yes'"), (dict(no_multimix_balance=1), 'true or false'),
    (dict(input_size=224), '--input-size: expected 3 arguments'), (dict(input_size=[3, 224]), 'expected 3 arguments'),
    (dict(mean=['x']), "--mean: invalid float value: 'x'"), (dict(mean=[[1.0]]), '--mean has an invalid value'),
    (dict(decay_milestones=[]), '--decay-milestones: expected at least one argument'),
    (dict(lr=True), '--lr has an invalid value: True'), (dict(experiment=False), '--experiment has an invalid value'),
    (dict(model=['resnet50']), '--model has an invalid value'), (dict(wandb_tags=['-x']), 'has an invalid value'),
    (dict(opt_kwargs='a=b'), '--opt-kwargs must be a mapping'), (dict(opt_kwargs=['a=b']), 'a mapping'),
    (dict(torchscript=True, torchcompile='eager'), 'not allowed with argument --torchcompile'),
    ('- a\n- b', 'name: value'),
    ('a: [1', 'not valid YAML'), ('!!python/object/apply:os.system ["true"]', 'not valid YAML'),
])
def test_invalid_files_are_refused(parse, config, word):
    with pytest.raises(UsageError, match=word):
        parse(config)


def test_args_of_a_run_are_a_valid_config(parse, tmp_path):
    args = parse(None, '--bce-loss', '--bce-pos-weight', '2', '--multimix-alpha', '1', '--aug-splits', '2')
    again = parse(vars(args))
    assert args == again and args.loss == 'bce' and args.loss_pos_weight == '2.0'


def test_user_options_override_demo_defaults(tmp_path):
    args = parse_args([])
    assert (args.dataset, args.num_classes, args.img_size, args.opt) == ('demo/digits', 10, 64, 'adamw')
    args = parse_args(['--dataset', 'demo/digits', '--img-size', '32', '--opt', 'sgd', '--epochs', '300'])
    assert (args.num_classes, args.img_size, args.opt, args.epochs) == (10, 32, 'sgd', 300)
    path = tmp_path / 'config.yaml'
    path.write_text('epochs: 3\nlr_base: 0.1')
    args = parse_args(['--config', str(path)])
    assert (args.epochs, args.lr, args.batch_size) == (3, None, 64)


def test_defaults_that_depend_on_others(parse):
    args = parse(None, '--task', 'multilabel', '--num-classes', '3')
    assert (args.smoothing, args.eval_metric) == (0.0, 'map')
    args = parse(None, '--task', 'multilabel', '--num-classes', '3', '--smoothing', '0.2', '--eval-metric', 'loss')
    assert (args.smoothing, args.eval_metric) == (0.2, 'loss')
    assert parse(None, '--sched', 'wsd').decay_epochs is None
    assert parse(None, '--sched', 'wsd', '--decay-epochs', '3').decay_epochs == 3


def test_positional_folder(image_folder):
    args = parse_args([str(image_folder)])
    assert args.data_dir == str(image_folder) and args.dataset == ''


@pytest.mark.parametrize('argv, message', [
    (['--model-kwargs', 'foo'], '--model-kwargs, .* take arguments KEY=VALUE'),
    (['--opt-kwargs', 'a=1', 'b'], 'take arguments KEY=VALUE'),
    (['--seed', '-1'], '--seed must be between 0 and 4294967295, got -1'), (['--std', '0'], '--std must be above 0'),
    (['--crop-pct', '-1'], '--crop-pct must be above 0'), (['--ratio', '0', '0'], '--ratio must be above 0'),
    (['--scale', '0.5'], '--scale takes a lowest'), (['--scale', '1', '0.5'], '--scale takes a lowest'),
    (['--clip-grad', '-1'], '--clip-grad must be 0 or more'), (['--warmup-epochs', '-1'], '--warmup-epochs must be'),
    (['--multimixx', 'dense'], r'Did you mean --multimix, --multimix-\w+'),
])
def test_values_out_of_range(argv, message):
    with pytest.raises(UsageError, match=message):
        parse_args(['--model', 'test_resnet', *argv])
