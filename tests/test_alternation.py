"""MultiMix on some batches and image mixing on the others: schedule, loaders, hook, task, script and processes."""
import itertools

import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import yaml
from distributed_helpers import on_ranks
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import on_batch

from timm_multimix import EMATeacher, MultiLabelMultiMixTask, MultiMixLoss, MultiMixOutput, MultiMixTask, attach
from timm_multimix.data.alternation import AlternatingCollateMixup, AlternatingMixup, BatchSchedule, alternate
from timm_multimix.options import describe_batches
from timm_multimix.training.config import parse_args

pytest_plugins = ['training_helpers']

CLASSES = 3
BATCH = 4


def make_model(name='test_resnet', **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options)


def make_task(name='test_resnet', task_cls=MultiMixTask, **options):
    task = task_cls(make_model(name), verbose=False, **{'num_mixes': 20, 'prob': 0.5, **options})
    task.get_trainable_module().train()
    return task


def make_batch(size=64):
    return torch.randn(BATCH, 3, size, size), torch.arange(BATCH) % CLASSES


# ---- the schedule


def test_decisions_depend_on_seed_epoch_and_index_only():
    schedule = BatchSchedule(0.5, seed=3)
    decisions = [[schedule.is_multimix(epoch, index) for index in range(40)] for epoch in range(3)]
    assert decisions == [[BatchSchedule(0.5, 3).is_multimix(e, i) for i in range(40)] for e in range(3)]
    others = [[BatchSchedule(0.5, 4).is_multimix(0, index) for index in range(40)], *decisions[1:]]
    assert decisions[0] not in others


@pytest.mark.parametrize('prob', [0.0, 0.25, 0.5, 0.9, 1.0])
def test_frequency_of_multimix_batches(prob):
    schedule = BatchSchedule(prob, seed=-1)
    share = np.mean([schedule.is_multimix(*place) for place in itertools.product(range(20), range(200))])
    assert abs(share - prob) <= 4 * (prob * (1 - prob) / 4000) ** 0.5


def test_images_are_mixed_unless_it_is_a_multimix_batch():
    schedule = BatchSchedule(0.5)
    assert all(schedule.mixes_images(0, i) != schedule.is_multimix(0, i) for i in range(20))
    assert all(BatchSchedule(1.0).mixes_images(0, i) for i in range(20))  # MultiMix after image mixing


@pytest.mark.parametrize('prob', [0.5, 1.0])
def test_epochs_without_multimix(prob):
    schedule = BatchSchedule(prob, start_epoch=1, off_epoch=2)
    found = [{(schedule.is_multimix(e, i), schedule.mixes_images(e, i)) for i in range(20)} for e in range(3)]
    assert found == [{(False, True)}, {(True, False), (False, True)} if prob < 1 else {(True, True)}, {(False, True)}]


@pytest.mark.parametrize('options', [
    dict(prob=-0.1), dict(prob=1.5), dict(prob=float('nan')), dict(start_epoch=2, off_epoch=1)])
def test_impossible_schedules(options):
    with pytest.raises(ValueError):
        BatchSchedule(**options)
    with pytest.raises(ValueError):
        make_task(**options)


# ---- loaders


class Images(Dataset):
    """Images of one colour for each class."""

    transform = None

    def __len__(self):
        return 6 * BATCH

    def __getitem__(self, index):
        image = Image.new('RGB', (16, 16), (index * 10, 100, 255 - index * 10))
        return self.transform(image), index % CLASSES


def make_loader(collate_fn, workers, dataset=None):
    return create_loader(
        dataset or Images(), (3, 16, 16), BATCH, is_training=True, no_aug=True, num_workers=workers,
        collate_fn=collate_fn, device=torch.device('cpu'), mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize('workers', [0, 2])
def test_collate_function_leaves_multimix_batches_unmixed(workers):
    np.random.seed(0)  # some seeds give a mix that is almost one of its images
    schedule = BatchSchedule(0.5, seed=1)
    options = dict(mixup_alpha=1.0, num_classes=CLASSES, label_smoothing=0.3)
    loader = make_loader(AlternatingCollateMixup(**options), workers)
    alternate(loader, schedule)
    assert len(loader) == 6
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        kinds = []
        for images, target in loader:
            assert target.shape == (BATCH, CLASSES)
            torch.testing.assert_close(target.sum(1), torch.ones(BATCH))
            # Smoothed once: 0.3 / 3 is the least that a class gets.
            torch.testing.assert_close(target.min(), torch.tensor(0.1))
            colours = (images * 255).round().flatten(2)
            whole = bool((colours[:, 0] % 10 == 0).all() and (colours[:, 0] + colours[:, 2] == 255).all())
            assert bool((target.max(1).values > 0.79).all()) or not whole
            kinds.append(whole)
        assert kinds == [schedule.is_multimix(epoch, index) for index in range(6)] and set(kinds) == {True, False}
    loader.mixup_enabled = False  # timm's --mixup-off-epoch


def test_without_multimix_batches_collate_is_timms():
    options = dict(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=CLASSES)
    seen = []
    for collate in (AlternatingCollateMixup(**options), FastCollateMixup(**options)):
        loader = make_loader(collate, 0)
        if isinstance(collate, AlternatingCollateMixup):
            alternate(loader, BatchSchedule(1e-9))
        torch.manual_seed(5), np.random.seed(5)
        seen.append(list(loader))
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_scheduled_sizes_keep_their_batch_sampler(script, image_folder):
    options = dict(multimix='dense', multimix_prob=0.5, mixup=1.0, epochs=2)
    flags = ['--train-img-sizes', 32, 64, '--train-batch-sizes', 8, 4]
    assert script.train(image_folder, *flags, **options) == 0, script.text


def test_mixup_on_the_device():
    options = dict(mixup_alpha=1.0, num_classes=CLASSES, label_smoothing=0.3)
    mixup, timms = AlternatingMixup(**options), Mixup(**options)
    images, target = make_batch()
    mixup.mixes_images = False
    unmixed, soft = mixup(images.clone(), target)
    torch.testing.assert_close(unmixed, images)
    torch.testing.assert_close(soft, F.one_hot(target, CLASSES) * 0.7 + 0.1)
    mixup.mixes_images = True
    np.random.seed(0)
    mixed = mixup(images.clone(), target)
    np.random.seed(0)
    torch.testing.assert_close(mixed, timms(images.clone(), target), rtol=0, atol=0)
    assert not torch.equal(mixed[0], images)
    mixup.mixup_enabled = False  # timm's --mixup-off-epoch
    torch.testing.assert_close(mixup(images.clone(), target)[0], images)


class Stream(IterableDataset):
    transform = None

    def __iter__(self):
        yield from map(Images.__getitem__, itertools.repeat(self), range(4 * BATCH))


def test_a_stream_has_no_batch_index():
    loader = make_loader(AlternatingCollateMixup(num_classes=CLASSES), 0, Stream())
    with pytest.raises(TypeError, match='Stream'):
        alternate(loader, BatchSchedule(0.5))


# ---- the hook


def test_a_disabled_hook_does_no_work():
    plain, model = make_model(), make_model()
    handle = attach(model)
    images, _ = make_batch()
    flops = []
    for case in (plain, model):
        handle.enabled = False
        with FlopCounterMode(display=False) as counter:
            output = case.train()(images)
        assert isinstance(output, torch.Tensor)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    handle.enabled = True
    assert isinstance(model(images), MultiMixOutput) and handle.enabled
    attach(model)
    assert not handle.enabled
    with pytest.raises(RuntimeError, match='attached again'):
        handle.enabled = False


# ---- the task


def test_task_uses_the_decision_of_the_loader():
    task = make_task(criterion_kwargs=dict(smoothing=0.1))
    images, target = make_batch()
    multimix, plain = task(images, target, multimix=True), task(images, target, multimix=False)
    assert set(multimix) == {'loss', 'output', 'dense', 'pooled'} and set(plain) == {'loss', 'output', 'plain'}
    expected = F.cross_entropy(plain['output'], target, label_smoothing=0.1)
    torch.testing.assert_close(plain['loss'], expected)
    assert task.loss.smoothing == 0.1 and task.num_batches == 0


def test_task_decides_from_its_seed_and_state():
    def kinds(task, count):
        return ['plain' in task(*make_batch()) for _ in range(count)]

    whole = kinds(make_task(seed=2), 12)
    assert set(whole) == {True, False} and whole != kinds(make_task(seed=3), 12)
    first = make_task(seed=2)
    begin = kinds(first, 5)
    first.eval()
    kinds(first, 3)  # validation takes no part
    second = make_task(seed=2)
    second.load_checkpoint_state(first.get_checkpoint_state()['state_dict'], first.get_task_state())
    assert begin + kinds(second, 7) == whole


@pytest.mark.parametrize('task_cls,target', [
    (MultiMixTask, torch.arange(BATCH) % CLASSES), (MultiLabelMultiMixTask, torch.rand(BATCH, CLASSES).round())])
def test_binary_cross_entropy(task_cls, target):
    task = make_task(task_cls=task_cls, criterion_kwargs=dict(loss_type='bce', smoothing=0.0))
    images, _ = make_batch()
    plain = task(images, target, multimix=False)
    rows = target if target.ndim == 2 else F.one_hot(target, CLASSES).float()
    torch.testing.assert_close(plain['loss'], F.binary_cross_entropy_with_logits(plain['output'], rows))
    assert 'dense' in task(images, target, multimix=True)


@pytest.mark.parametrize('views', [1, 2])
def test_teacher_sees_multimix_batches_only(views):
    task = make_task(teacher='ema', distill_ramp_epochs=0, views=views)
    calls = []
    task.teacher.register_forward_hook(lambda *_: calls.append(1))
    images, target = make_batch()
    images = torch.cat([images] * views, dim=1)
    task(images, target, multimix=False)
    assert not calls
    task(images, target, multimix=True)
    assert len(calls) == 1


def test_class_token_is_trained_by_the_other_batches():
    with pytest.raises(ValueError, match='class token'):
        make_task('test_vit', prob=1.0, pooled_weight=0.0)
    task = make_task('test_vit', pooled_weight=0.0)
    task(*make_batch(160), multimix=True)['loss'].backward()
    # Every parameter has a gradient on either kind of batch, which DistributedDataParallel requires.
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)


@pytest.mark.parametrize('mode', ['pooled', 'dense'])
def test_two_graphs_and_no_recompilation(mode):
    torch._dynamo.reset()
    task = make_task(mode=mode)
    counter = torch._dynamo.testing.CompileCounter()
    task.compile(backend=counter)
    images, target = make_batch()
    for multimix in (True, False):
        task(images, target, multimix=multimix)['loss'].backward()
    graphs = counter.frame_count
    for multimix in (True, True, False, True, False, False, True):
        task(images, target, multimix=multimix)['loss'].backward()
    assert counter.frame_count == graphs <= 2


def _train_alternately(rank_seed):
    """Two kinds of batches in turn through DistributedDataParallel."""
    task = MultiMixTask(
        make_model('cait_xxs24_224', img_size=32, patch_size=16, depth=1, embed_dim=16, num_heads=2),
        verbose=False, num_mixes=20, pooled_weight=0.0, prob=0.5)
    task.prepare_distributed()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    for multimix in (True, False, False, True):
        optimizer.zero_grad()
        task(torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES, multimix)['loss'].backward()
        optimizer.step()
    return [parameter.detach().numpy() for parameter in task.get_trainable_module().parameters()]


def test_parameters_that_one_kind_of_batch_does_not_use(tmp_path):
    first, second = on_ranks(tmp_path, 2, _train_alternately, 0)
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_own_loop_as_in_the_readme():
    model = make_model()
    handle, criterion, teacher = attach(model), MultiMixLoss(20), EMATeacher(model)
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=CLASSES)
    images, target = make_batch()
    for enabled in (True, False):
        handle.enabled = enabled
        if enabled:
            loss = criterion(model(images), target)
        else:
            images, target = mixup(images, target)
            loss = nn.CrossEntropyLoss()(model(images), target)
        loss.backward()
        teacher.update(model)
    handle.enabled = False
    assert isinstance(teacher(images), MultiMixOutput)


# ---- presets


def test_paper_preset_of_the_loss():
    paper = MultiMixLoss(preset='paper')
    assert (paper.alpha, paper.balance, paper.pooled_weight) == ((0.5, 2.0), False, 0.0)
    given = MultiMixLoss(preset='paper', alpha=1.0, balance=True, pooled_weight=0.25)
    assert (given.alpha, given.balance, given.pooled_weight) == (1.0, True, 0.25)
    default = MultiMixLoss()
    assert (default.alpha, default.balance, default.pooled_weight) == (None, True, 0.5)
    with pytest.raises(ValueError, match='default, paper'):
        MultiMixLoss(preset='papers')


def test_paper_preset_of_the_task():
    assert make_task(preset='paper', prob=None).schedule.prob == 0.5
    assert make_task(preset='paper', prob=0.25).schedule.prob == 0.25
    assert make_task(prob=None).schedule.prob == 1.0


# ---- the script


def test_presets_of_command_line_and_file(tmp_path, image_folder):
    def parse(*argv, **options):
        path = tmp_path / 'args.yaml'
        path.write_text(yaml.safe_dump(options))
        args = parse_args(['--config', str(path), '--data-dir', str(image_folder), '--multimix', 'dense', *argv])
        values = [getattr(args, name) for name in (
            'multimix_prob', 'multimix_alpha', 'no_multimix_balance', 'multimix_pooled_weight', 'mixup', 'smoothing')]
        return values, args

    default, default_args = parse()
    paper, paper_args = parse('--multimix-preset', 'paper')
    assert default == [1.0, None, False, 0.5, 0.0, 0.1] and paper == [0.5, [0.5, 2.0], True, 0.0, 1.0, 0.0]
    assert 'MultiMix batch with probability 0.5; the other batches are trained with mixup (alpha 1)' in (
        describe_batches(paper_args))
    # The preset of the command line replaces the values of a preset in a file.
    assert parse(**vars(paper_args))[0] == paper
    assert parse('--multimix-preset', 'default', **vars(paper_args))[0] == default
    assert parse('--multimix-preset', 'paper', **vars(default_args))[0] == paper
    # Explicit options replace the values of a preset.
    given, args = parse('--multimix-preset', 'paper', '--mixup', '0', '--multimix-alpha', '1', '--multimix-balance')
    assert given == [0.5, [1.0], False, 0.0, 0.0, 0.0] and 'trained without any mixing' in describe_batches(args)


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher']])
def test_batches_of_a_run(script, image_folder, flags):
    """Images are mixed in the batches without MultiMix. Parts of the loss are averaged over the batches with them."""
    options = dict(multimix='dense', multimix_prob=0.5, mixup=1.0, mixup_mode='elem', epochs=2, log_interval=1, seed=1)
    targets = []
    with on_batch(lambda number, input, target: targets.append(target)):
        assert script.train(image_folder, *flags, **options) == 0, script.text
    for epoch, row in enumerate(script.summary()):
        is_multimix = [BatchSchedule(0.5, 1).is_multimix(epoch, index) for index in range(3)]
        assert len(set(is_multimix)) == 2  # else choose another seed
        mixed = [bool(((target > 0.11) & (target < 0.89)).any()) for target in targets[3 * epoch:3 * epoch + 3]]
        assert mixed == [not value for value in is_multimix]
        losses = [float(row[f'train_{name}']) for name in ('dense', 'pooled', 'plain')]
        count = sum(is_multimix)
        expected = (count * (losses[0] + losses[1]) / 2 + (3 - count) * losses[2]) / 3
        assert abs(float(row['train_loss']) - expected) < 1e-5


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher']])
def test_probability_zero_is_timms_training(script, image_folder, flags):
    options = dict(mixup=1.0, cutmix=1.0, smoothing=0.1, epochs=2)
    assert script.train(image_folder, *flags, **options) == 0, script.text
    plain = script.summary()
    options |= dict(multimix='dense', multimix_prob=0.0, experiment='zero')
    assert script.train(image_folder, *flags, **options) == 0, script.text
    zero = script.summary('zero')
    assert [{name: row[name] for name in plain[0]} for row in zero] == plain


@pytest.mark.parametrize('flags,options,word', [
    ([], dict(mixup=1.0, batch_size=7), 'even --batch-size'),
    ([], dict(multimix_start_epoch=-1), '--multimix-start-epoch must be 0 or more'),
    ([], dict(multimix_prob=1.5), '--multimix-prob'),
    (['--use-multi-epochs-loader'], dict(multimix_prob=0.5, mixup=1.0, workers=1), '--no-prefetcher'),
])
def test_mistakes_end_in_one_line(script, image_folder, flags, options, word):
    assert script.train(image_folder, *flags, multimix='dense', **options) == 2
    assert word in script.lines[-1] and not script.run_folder().exists()
