"""Several processes: the joined batch mixed exactly, with real processes and real collectives."""
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from distributed_helpers import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from timm_multimix import MultiMixLoss, MultiMixOutput, attach, losses
from timm_multimix.distributed import gather_batch, share_positions
from timm_multimix.weights import sample_weights

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
}


def _joined_batch(world_size, options):
    """Logits, dense logits, attention, target and teacher of all examples, the same in every process; loss options."""
    options = dict(options)
    num_positions, soft, taught = (options.pop(name, None) for name in ('num_positions', 'soft', 'teacher'))
    num_positions = 5 if num_positions is None else num_positions
    torch.manual_seed(1)
    size = world_size * BATCH_SIZE
    logits, teacher_logits = torch.randn(2, size, NUM_CLASSES, dtype=torch.float64)
    dense = teacher_dense = attention = None
    if num_positions:
        dense, teacher_dense = torch.randn(2, size, num_positions, NUM_CLASSES, dtype=torch.float64)
        attention = torch.rand(size, num_positions, dtype=torch.float64)
    target = torch.rand(size, NUM_CLASSES, dtype=torch.float64) if soft else torch.randint(NUM_CLASSES, (size,))
    teacher = dict(dense=(teacher_logits, teacher_dense), pooled=(teacher_logits, None)).get(taught)
    return [logits, dense, attention], target, teacher, options


def _terms(loss, leaves, target, teacher, examples=slice(None)):
    if teacher is not None:
        teacher = MultiMixOutput(*(part[examples] if part is not None else None for part in teacher))
    return loss.terms(MultiMixOutput(*leaves), target[examples], teacher)


def _leaves(tensors, examples=slice(None)):
    return [tensor[examples].clone().requires_grad_() if tensor is not None else None for tensor in tensors]


def _grads(leaves):
    return [leaf.grad if leaf is not None else None for leaf in leaves]


def _on_a_rank(cases):
    """The loss of each case, its gradients, and the weights that were drawn, by the process that this runs in."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, case in cases.items():
        tensors, target, teacher, options = _joined_batch(world_size, case)
        mine = slice(rank * BATCH_SIZE, (rank + 1) * BATCH_SIZE)
        leaves = _leaves(tensors, mine)
        drawn = []

        def recorded(*args, drawn=drawn, **options):
            drawn.append(sample_weights(*args, **options))
            return drawn[-1]

        losses.sample_weights = recorded
        torch.manual_seed(rank)
        terms = _terms(MultiMixLoss(NUM_MIXES, gather=True, **options), leaves, target, teacher, mine)
        terms['loss'].backward()
        results[name] = {name: term.item() for name, term in terms.items()}, _grads(leaves), drawn
    return results


def _on_one(monkeypatch, case, world_size, drawn):
    """The same in one process, with given weights for each position, and for the pooled term."""
    drawn = [weights for block in drawn for weights in block]
    monkeypatch.setattr(
        losses, 'sample_weights',
        lambda *_, num_positions, **options: torch.stack([drawn.pop(0) for _ in range(num_positions)]))
    tensors, target, teacher, options = _joined_batch(world_size, case)
    leaves = _leaves(tensors)
    terms = _terms(MultiMixLoss(NUM_MIXES, **options), leaves, target, teacher)
    terms['loss'].backward()
    assert not drawn
    return {name: term.item() for name, term in terms.items()}, _grads(leaves)


@pytest.mark.parametrize('world_size', [2, 3])
def test_gather_is_one_process_with_all_examples(tmp_path, monkeypatch, world_size):
    """Loss, its terms and, after the mean over processes that DDP takes, gradients."""
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
    mine = torch.full((2, 3), float(rank), requires_grad=True)
    joined, nothing, labels = gather_batch(mine, None, torch.tensor([rank, 10 + rank]))
    (joined * torch.arange(4.).unsqueeze(1) * (1 + rank)).sum().backward()
    return joined.detach(), nothing, labels, mine.grad


def test_gather_batch(tmp_path):
    for rank, (joined, nothing, labels, grad) in enumerate(on_ranks(tmp_path, 2, _gathered)):
        assert joined[:, 0].tolist() == [0, 0, 1, 1]
        assert nothing is None
        assert labels.tolist() == [0, 10, 1, 11]
        # examples 2 rank and 2 rank + 1, from both processes: factors 1 and 2
        assert grad[:, 0].tolist() == [3.0 * (2 * rank), 3.0 * (2 * rank + 1)]


def test_one_process_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert gather_batch(x, None) == (x, None)
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


def _train(model_name, how, accumulation=1, **options):
    """A user's own loop: two updates on two processes' halves of the same batches."""
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
    torch.manual_seed(10 + rank)
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


@pytest.mark.parametrize(('model_name', 'options'), [
    ('test_resnet', {}),
    ('test_vit', dict(gather=True, accumulation=2)),
])
def test_sharded_training_is_that_of_ddp(tmp_path, model_name, options):
    """FSDP2, the model in one unit or with units for its blocks and its classifier."""
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


def test_attaching_to_a_sharded_model_is_refused_in_dense_mode(tmp_path):
    assert on_ranks(tmp_path, 1, _attach_to_a_sharded_model)
