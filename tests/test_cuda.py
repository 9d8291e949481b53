"""MultiMix on a GPU. Run these tests with TEST_CUDA=1 pytest tests/test_cuda.py; the other tests hide the GPU."""
import pytest
import timm
import torch
from loss_helpers import LOSSES, gradient, literal_gradient, problem, relative_error

from timm_multimix import MultiMixTask, calibrate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU, and TEST_CUDA=1')

TASKS = [
    dict(mode='dense'), dict(mode='pooled'), dict(mode='dense', prob=0.5), dict(mode='dense', attention_grad=True),
    dict(mode='dense', attention='cam'), dict(mode='dense', teacher='ema')]


@pytest.fixture(autouse=True)
def _as_in_training():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _task(name='resnet18', **options):
    model = timm.create_model(name, num_classes=10).cuda()
    return MultiMixTask(model, verbose=False, device=torch.device('cuda'), **options).train()


def _batch(size=64):
    return torch.randn(8, 3, size, size, device='cuda'), torch.randint(10, (8,), device='cuda')


@pytest.mark.parametrize('name, size', [('resnet18', 64), ('vit_tiny_patch16_224', 224), ('convnext_atto', 64)])
@pytest.mark.parametrize('options', TASKS, ids=str)
@pytest.mark.parametrize('amp', [None, torch.bfloat16, torch.float16], ids=str)
def test_a_step_does_not_wait_for_the_device(name, size, options, amp):
    task, batch = _task(name, **options), _batch(size)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    try:
        for step in range(3):
            torch.cuda.set_sync_debug_mode('error' if step == 2 else 'default')  # the first step selects algorithms
            with torch.autocast('cuda', amp, enabled=amp is not None):
                loss = task(*batch)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite()


@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('tf32, limit', [(False, 1e-5), (True, 2e-3)])
@pytest.mark.parametrize('balance', [False, True])
def test_gradient_is_precise(kind, tf32, limit, balance):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    function, loss = LOSSES[kind]
    logits, target, y, weights = problem(64, 4, 200, 1000, scale=3)
    truth = literal_gradient(logits, y, weights, loss, balance)
    grad, = gradient(
        lambda logits: function(logits, target.cuda(), weights.float().cuda(), balance=balance), logits.float().cuda())
    assert relative_error(grad.cpu(), truth) < limit


def test_the_compiled_loss_is_that_of_eager_mode():
    torch.compiler.reset()
    expected, task = _task(), _task()
    task.load_checkpoint_state(expected.get_checkpoint_state()['state_dict'])
    task.compile()
    batch = _batch()
    # The compiled loss draws other mixes.
    losses = [torch.stack([one(*batch)['loss'].detach() for _ in range(20)]).mean() for one in (task, expected)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    task(*batch)['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


def test_calibration_with_products_that_round():
    model = timm.create_model('resnet18', num_classes=10).cuda().eval()
    images, _ = _batch()
    with torch.no_grad():
        logits = model(images)
        temperature = calibrate(model, [(images, logits.argmax(1))])
        torch.testing.assert_close(model(images), logits / temperature, rtol=1e-2, atol=1e-2)
