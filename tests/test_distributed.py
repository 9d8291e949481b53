"""Distributed training: the joined batch of all processes, DDP and FSDP2."""
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from distributed_helpers import on_ranks
from timm.layers import convert_sync_batchnorm
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from timm_multimix import MultiMixLoss, MultiMixOutput, MultiMixTask, attach
from timm_multimix.losses import module as losses
from timm_multimix.losses.gather import gather_batch, share_positions
from timm_multimix.losses.weights import sample_weights

NUM_MIXES = 7
NUM_CLASSES = 4
BATCH_SIZE = 3

LOSSES = {
    'default': {},
    'literal': dict(balance=False),
    'attention_grad': dict(attention_grad=True),
    'cam': dict(attention='cam', attention_grad=True, attention_norm='softmax'),
    'bce': dict(loss_type='bce'),
    'clean': dict(clean_weight=0.3),
    'dense only': dict(pooled_weight=0.0),
    'long tuples': dict(tuple_length=BATCH_SIZE + 1),
    'smoothing': dict(smoothing=0.1, logit_scale=2.0),
    'fewer positions': dict(num_positions=2, attention_grad=True),  # than processes, where there are three
    'pooled': dict(num_positions=0),
    'soft targets': dict(soft=True),
    'dense teacher': dict(teacher='dense', attention_grad=True),
    'pooled teacher': dict(teacher='pooled', clean_weight=0.3),
    'mask': dict(padding=True, tuple_length=2, attention_grad=True),
    'mask without attention': dict(padding=True, tuple_length=2, attention='uniform'),
    'dense targets': dict(padding=True, dense_target=True, tuple_length=2),
    'class weights': dict(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), attention_grad=True, clean_weight=0.3),
}


def _joined_batch(world_size, options):
    """Return the inputs of all examples, equal in all processes, and the options of the loss.

    Targets are the arguments target, mask and dense_target of the loss.
    """
    options = dict(options)
    num_positions, soft, teacher_kind, padding, has_dense_target = (
        options.pop(name, None) for name in ('num_positions', 'soft', 'teacher', 'padding', 'dense_target'))
    num_positions = 5 if num_positions is None else num_positions
    torch.manual_seed(1)
    size = world_size * BATCH_SIZE
    logits, teacher_logits = torch.randn(2, size, NUM_CLASSES, dtype=torch.float64)
    dense = teacher_dense = attention = None
    if num_positions:
        dense, teacher_dense = torch.randn(2, size, num_positions, NUM_CLASSES, dtype=torch.float64)
        attention = torch.rand(size, num_positions, dtype=torch.float64)
    target = torch.rand(size, NUM_CLASSES, dtype=torch.float64) if soft else torch.randint(NUM_CLASSES, (size,))
    teacher = dict(dense=(teacher_logits, teacher_dense), pooled=(teacher_logits, None)).get(teacher_kind)
    targets = dict(target=target)
    if padding:
        targets['mask'] = torch.rand(size, num_positions) < 0.5
    if has_dense_target:
        targets['dense_target'] = torch.randint(NUM_CLASSES, (size, num_positions))
    return [logits, dense, attention], targets, teacher, options


def _terms(loss, leaves, targets, teacher, examples=slice(None)):
    if teacher is not None:
        teacher = MultiMixOutput(*(part[examples] if part is not None else None for part in teacher))
    return loss.terms(
        MultiMixOutput(*leaves), teacher=teacher, **{name: value[examples] for name, value in targets.items()})


def _leaves(tensors, examples=slice(None)):
    return [tensor[examples].clone().requires_grad_() if tensor is not None else None for tensor in tensors]


def _grads(leaves):
    return [leaf.grad if leaf is not None else None for leaf in leaves]


def _on_a_rank(cases):
    """Return the terms of each case in this process, the gradients, and the drawn weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, case in cases.items():
        tensors, targets, teacher, options = _joined_batch(world_size, case)
        mine = slice(rank * BATCH_SIZE, (rank + 1) * BATCH_SIZE)
        leaves = _leaves(tensors, mine)
        drawn = []

        def recorded(*args, drawn=drawn, **options):
            drawn.append(sample_weights(*args, **options))
            return drawn[-1]

        losses.sample_weights = recorded
        torch.manual_seed(rank)
        terms = _terms(MultiMixLoss(NUM_MIXES, gather=True, **options), leaves, targets, teacher, mine)
        terms['loss'].backward()
        results[name] = {name: term.item() for name, term in terms.items()}, _grads(leaves), drawn
    return results


def _on_one(monkeypatch, case, world_size, drawn):
    """Return the terms and gradients of one process, with given weights."""
    drawn = [weights for block in drawn for weights in block]
    monkeypatch.setattr(
        losses, 'sample_weights',
        lambda *_, num_positions, **options: torch.stack([drawn.pop(0) for _ in range(num_positions)]))
    tensors, targets, teacher, options = _joined_batch(world_size, case)
    leaves = _leaves(tensors)
    terms = _terms(MultiMixLoss(NUM_MIXES, **options), leaves, targets, teacher)
    terms['loss'].backward()
    assert not drawn
    return {name: term.item() for name, term in terms.items()}, _grads(leaves)


@pytest.mark.parametrize('world_size', [2, 3])
def test_gather_equals_one_process_with_all_examples(tmp_path, monkeypatch, world_size):
    """Compare the terms, and the gradients averaged over processes."""
    by_rank = on_ranks(tmp_path, world_size, _on_a_rank, LOSSES)
    for name, case in LOSSES.items():
        terms, grads, drawn = zip(*(results[name] for results in by_rank), strict=True)
        expected_terms, expected_grads = _on_one(monkeypatch, case, world_size, [w for each in drawn for w in each])
        for rank in range(world_size):
            assert terms[rank] == pytest.approx(expected_terms, rel=1e-12), (name, rank)
        for parts, expected in zip(zip(*grads, strict=True), expected_grads, strict=True):
            assert all((part is None) == (expected is None) for part in parts), name
            if expected is not None:
                torch.testing.assert_close(
                    torch.cat(parts) / world_size, expected, rtol=1e-9, atol=1e-12, msg=lambda m: f'{name}: {m}')  # noqa: B023


def _weights_of_a_rank():
    drawn = []
    losses.sample_weights = lambda *args, **options: drawn.append(sample_weights(*args, **options)) or drawn[-1]
    torch.manual_seed(dist.get_rank())
    MultiMixLoss(NUM_MIXES)(torch.zeros(BATCH_SIZE, NUM_CLASSES), torch.arange(BATCH_SIZE))
    return drawn


def test_without_gather_every_rank_mixes_its_own_batch(tmp_path):
    (first,), (second,) = on_ranks(tmp_path, 2, _weights_of_a_rank)
    assert first.shape == second.shape == (1, NUM_MIXES, BATCH_SIZE)
    assert not torch.allclose(first, second)


def _gathered():
    rank = dist.get_rank()
    return gather_batch(torch.full((2, 3), float(rank))), gather_batch(torch.tensor([rank, 10 + rank]))


def test_gather_batch(tmp_path):
    for joined, labels in on_ranks(tmp_path, 2, _gathered):
        assert joined[:, 0].tolist() == [0, 0, 1, 1]
        assert labels.tolist() == [0, 10, 1, 11]


def test_one_process_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert gather_batch(x) is x
    assert share_positions(x, None) == (x, None)
    target = torch.tensor([0, 1])
    torch.manual_seed(0)
    expected = MultiMixLoss(9)(MultiMixOutput(x[:, 0], x), target)
    torch.manual_seed(0)
    assert torch.equal(MultiMixLoss(9, gather=True)(MultiMixOutput(x[:, 0], x), target), expected)


def _uneven():
    size = 3 + dist.get_rank()
    try:
        MultiMixLoss(9, gather=True)(torch.zeros(size, 5), torch.zeros(size, dtype=torch.int64))
    except ValueError as error:
        return str(error)


def test_batches_of_different_sizes_are_refused_everywhere(tmp_path):
    for message in on_ranks(tmp_path, 2, _uneven):
        assert '(3, 0, 5) on rank 0, (4, 0, 5) on rank 1' in message
        assert 'drop_last' in message


def _gather_with_warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        logits = torch.randn(3, 5, requires_grad=True)
        MultiMixLoss(9, gather=True)(logits, torch.arange(3)).backward()
    return True


def test_gathering_gives_no_warnings(tmp_path):
    assert on_ranks(tmp_path, 2, _gather_with_warnings_as_errors) == [True, True]


def _train(model_name, how, accumulation=1, **options):
    """Train for two updates in a loop, each process on its part of the batches."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=NUM_CLASSES)
    handle = attach(model)
    if how == 'ddp':
        trained = DistributedDataParallel(model)
    else:
        for block in getattr(model, 'blocks', ()):
            fully_shard(block)
        if how == 'sharded head':
            fully_shard(model.get_classifier())
        trained = fully_shard(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    loss = MultiMixLoss(20, **options)
    images = torch.randn(2, accumulation, dist.get_world_size(), BATCH_SIZE, 3, 64, 64)
    target = torch.randint(NUM_CLASSES, images.shape[:4])
    rank = dist.get_rank()
    torch.manual_seed(20 + rank)  # with some seeds, such as 10, the second update depends on rounding
    losses = []
    for step in range(len(images)):
        for part in range(accumulation):
            last = part == accumulation - 1
            if how == 'ddp':
                trained.require_backward_grad_sync = last
            else:
                trained.set_requires_gradient_sync(last)
            result = loss(trained(images[step, part, rank]), target[step, part, rank]) / accumulation
            result.backward()
            losses.append(result.item())
        optimizer.step()
        optimizer.zero_grad()
    message = None
    if how != 'ddp':
        with pytest.raises(RuntimeError, match='fully_shard') as caught:
            handle.remove()
        message = str(caught.value)
    parameters = [
        parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for parameter in trained.parameters()]
    return losses, parameters, message


def _ddp_and_sharded(model_name, **options):
    return [_train(model_name, how, **options) for how in ('ddp', 'sharded', 'sharded head')]


shards = pytest.mark.skipif(
    torch.__version__.startswith('2.6.'), reason='fully_shard of PyTorch 2.6 does not run on CPUs')


@shards
@pytest.mark.parametrize(('model_name', 'options'), [
    ('test_resnet', {}),
    ('test_vit', dict(gather=True, accumulation=2)),
])
def test_sharded_training_equals_ddp(tmp_path, model_name, options):
    """FSDP2 with one unit for the model, or with units for the blocks and the classifier."""
    for results in on_ranks(tmp_path, 2, partial(_ddp_and_sharded, model_name, **options)):
        expected_losses, expected, _ = results[0]
        assert len(set(expected_losses)) == len(expected_losses)
        for losses_, parameters, message in results[1:]:
            assert losses_ == pytest.approx(expected_losses, rel=1e-5)
            torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)
            assert 'use its logits' in message


def _attach_to_a_sharded_model():
    model = fully_shard(timm.create_model('test_resnet', num_classes=NUM_CLASSES))
    with pytest.raises(TypeError, match='before you shard') as caught:
        attach(model)
    assert not isinstance(model(torch.zeros(2, 3, 32, 32)), MultiMixOutput)
    handle = attach(model, 'pooled')
    assert isinstance(model(torch.zeros(2, 3, 32, 32)), MultiMixOutput)
    handle.remove()
    assert not isinstance(model(torch.zeros(2, 3, 32, 32)), MultiMixOutput)
    return str(caught.value)


@shards
def test_attaching_to_a_sharded_model_is_refused_in_dense_mode(tmp_path):
    assert on_ranks(tmp_path, 1, _attach_to_a_sharded_model)


def _weights_like(num_mixes, batch_size, num_positions, **_):
    """Return the same weights for all positions, so that the result does not depend on the process that draws them."""
    rows = torch.arange(num_mixes * batch_size, dtype=torch.float64).mul(3).sin().mul(3).view(num_mixes, batch_size)
    return rows.softmax(dim=-1).float().expand(num_positions, -1, -1)


def _task_gradient(options, rank, world_size):
    """Return the gradient of one batch, or of this process's part of it."""
    losses.sample_weights = _weights_like
    torch.manual_seed(3)
    task = MultiMixTask(timm.create_model('test_vit', num_classes=NUM_CLASSES), verbose=False, **options)
    images, target = torch.randn(4, 3, 32, 32), torch.randint(NUM_CLASSES, (4,))
    task.get_trainable_module().train()
    if world_size > 1:
        task.prepare_distributed()
        images, target = images.chunk(world_size)[rank], target.chunk(world_size)[rank]
    task(images, target)['loss'].backward()
    return [parameter.grad for parameter in task.get_trainable_module().parameters()]


GRADIENTS = {
    'without MultiMix': dict(mode='off'),
    'clean term only': dict(mode='dense', clean_weight=1.0),
    'gathered, dense': dict(mode='dense', gather=True, num_mixes=20),
    'gathered, attention with gradient': dict(
        mode='dense', gather=True, num_mixes=20, attention_grad=True, attention_norm='softmax', balance=False),
    'gathered, pooled': dict(mode='pooled', gather=True, num_mixes=20, clean_weight=0.25),
}


def _task_gradients():
    return {name: _task_gradient(case, dist.get_rank(), 2) for name, case in GRADIENTS.items()}


def test_gradients_equal_those_of_one_process_with_all_images(tmp_path, monkeypatch):
    """DDP and the task, without MultiMix and with gather."""
    monkeypatch.setattr(losses, 'sample_weights', sample_weights)  # _task_gradient replaces it
    by_rank = on_ranks(tmp_path, 2, _task_gradients)
    for name, case in GRADIENTS.items():
        expected = _task_gradient(case, 0, 1)
        for grads in by_rank:
            torch.testing.assert_close(
                grads[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m: f'{name}: {m}')  # noqa: B023


def test_synchronized_batch_norm_does_not_change_the_gradient():
    """Compare the gradients of a model with those of the converted model."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=NUM_CLASSES)
        if convert:
            model = convert_sync_batchnorm(model)
            assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
        task = MultiMixTask(model, mode='dense', num_mixes=20, verbose=False)
        model.train()
        torch.manual_seed(1)
        task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
        results.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_synchronized_batch_norm_in_a_head_is_refused_in_dense_mode():
    model = convert_sync_batchnorm(timm.create_model('levit_128s', num_classes=NUM_CLASSES))
    with pytest.raises(ValueError, match='does not support a SyncBatchNorm'):
        MultiMixTask(model, mode='dense', verbose=False)
    MultiMixTask(model, mode='pooled', verbose=False)


def test_accumulation_is_the_mean_over_its_batches(tmp_path):
    """With gather, the gradient of accumulated batches is the mean of their gradients."""
    by_rank = on_ranks(tmp_path, 2, _accumulated)
    for accumulated, summed in by_rank:
        torch.testing.assert_close(accumulated, summed, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(by_rank[0][0], by_rank[1][0], rtol=0, atol=0)


def _accumulated():
    losses.sample_weights = _weights_like
    torch.manual_seed(3)
    task = MultiMixTask(
        timm.create_model('test_vit', num_classes=NUM_CLASSES), mode='dense', gather=True, num_mixes=20, verbose=False)
    module = task.prepare_distributed().get_trainable_module().train()
    torch.manual_seed(dist.get_rank())
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(NUM_CLASSES, (2,))) for _ in range(2)]

    def grads():
        taken = [parameter.grad.clone() for parameter in module.parameters()]
        module.zero_grad()
        return taken

    with task.no_sync():
        (task(*batches[0])['loss'] / 2).backward()
    (task(*batches[1])['loss'] / 2).backward()
    accumulated, each = grads(), []
    for batch in batches:
        task(*batch)['loss'].backward()
        each.append(grads())
    return accumulated, [(a + b) / 2 for a, b in zip(*each, strict=True)]


def _compiled_and_not():
    rank = dist.get_rank()
    losses.sample_weights = _weights_like
    results = []
    for num_positions in (1, 5):
        for backend in (None, 'aot_eager'):
            torch.manual_seed(rank)
            output = MultiMixOutput(
                torch.randn(4, NUM_CLASSES, requires_grad=True),
                torch.randn(4, num_positions, NUM_CLASSES, requires_grad=True),
                torch.rand(4, num_positions, requires_grad=True))
            teacher = MultiMixOutput(torch.randn(4, NUM_CLASSES), torch.randn(4, num_positions, NUM_CLASSES))
            loss = MultiMixLoss(20, gather=True, attention_grad=True)
            terms = loss.terms
            if backend is not None:
                torch._dynamo.reset()
                terms = torch.compile(terms, backend=backend, fullgraph=True)
            value = terms(output, torch.arange(4) % NUM_CLASSES, teacher)['loss']
            value.backward()
            results.append((num_positions, value.detach(), [part.grad for part in output]))
    return results


@pytest.mark.slow
def test_gathering_compiles_without_a_graph_break(tmp_path):
    for results in on_ranks(tmp_path, 2, _compiled_and_not):
        for num_positions in (1, 5):
            expected, actual = [result[1:] for result in results if result[0] == num_positions]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
