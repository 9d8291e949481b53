import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import LOSSES, gradient, peak_memory, problem, relative_error

from timm_multimix import (
    MultiMixLoss,
    MultiMixOutput,
    SelfDistillationLoss,
    attend,
    multimix_cross_entropy,
    sample_weights,
)
from timm_multimix.losses import (
    reference,
)

PREDICT = {'ce': reference.softmax, 'bce': torch.sigmoid}

shapes = st.fixed_dictionaries(dict(
    b=st.integers(1, 9), r=st.integers(1, 5), c=st.integers(1, 8), n=st.integers(1, 40), soft=st.booleans()))
distillations = st.fixed_dictionaries(dict(
    distill_weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]), distill_temperature=st.sampled_from([1.0, 0.5, 3.0])))


def literal(logits, y, weights, teacher, kind, distill_weight=0.25, distill_temperature=1.0):
    """Reference loss for logits (b, r, c), attended weights (r, n, b) and an identity classifier."""
    uniform = torch.ones(logits.shape[:2], dtype=logits.dtype)
    return reference.self_distillation(
        logits, y, weights, uniform, lambda z: z, teacher, lambda z: z, distill_weight, distill_temperature,
        LOSSES[kind][1], PREDICT[kind])


@given(
    shape=shapes, distillation=distillations, kind=st.sampled_from(list(LOSSES)), balance=st.booleans(),
    tile=st.none() | st.integers(1, 9), pooled_teacher=st.booleans())
def test_value_and_gradient_match_the_reference(shape, distillation, kind, balance, tile, pooled_teacher):
    logits, target, y, weights = problem(**shape)
    teacher = torch.randn_like(logits)
    if pooled_teacher:
        teacher = teacher[:, :1].expand_as(logits)

    def fused(logits):
        given = teacher[:, 0] if pooled_teacher else teacher
        return LOSSES[kind][0](
            logits, target, weights, balance=balance, tile_size=tile, teacher_logits=given, **distillation)

    torch.testing.assert_close(fused(logits), literal(logits, y, weights, teacher, kind, **distillation))
    expected, = gradient(lambda x: literal(x, y, weights, teacher, kind, **distillation), logits)
    if balance:
        expected = torch.stack([reference.balance_gradient(expected[:, j], m) for j, m in enumerate(weights)], dim=1)
    torch.testing.assert_close(gradient(fused, logits)[0], expected, rtol=1e-6, atol=1e-9)


@given(shape=shapes, distillation=distillations, kind=st.sampled_from(list(LOSSES)), tile=st.none() | st.integers(1, 9))
def test_gradient_through_classifier_embeddings_and_attention(shape, distillation, kind, tile):
    b, r, c, n = (shape[k] for k in 'brcn')
    _, target, y, _ = problem(**shape)
    z, classifier = torch.randn(b, r, 4).double(), torch.randn(c, 4).double()
    z_teacher, classifier_teacher = torch.randn(b, r, 3).double(), torch.randn(c, 3).double()
    raw, attention = sample_weights(n, b, r).double(), torch.rand(b, r).double() + 0.01

    def fused(z, classifier, attention):
        return LOSSES[kind][0](
            z @ classifier.T, target, attend(raw, attention), balance=False, attention_grad=True, tile_size=tile,
            teacher_logits=z_teacher @ classifier_teacher.T, **distillation)

    def expected(z, classifier, attention):
        return reference.self_distillation(
            z, y, raw, attention, lambda z: z @ classifier.T, z_teacher, lambda z: z @ classifier_teacher.T,
            distillation['distill_weight'], distillation['distill_temperature'], LOSSES[kind][1], PREDICT[kind])

    inputs = z, classifier, attention
    for actual, wanted in zip(gradient(fused, *inputs), gradient(expected, *inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('kind', LOSSES)
def test_a_teacher_equal_to_the_student_gives_the_entropy_and_no_gradient(kind):
    logits, target, _, weights = problem(7, 3, 5, 30)
    mixed = torch.einsum('rnb,brc->rnc', weights, logits)
    entropy = LOSSES[kind][1](mixed, PREDICT[kind](mixed)).mean()
    def loss(logits):
        return LOSSES[kind][0](logits, target, weights, teacher_logits=logits, distill_weight=1.0)
    torch.testing.assert_close(loss(logits), entropy)
    torch.testing.assert_close(gradient(loss, logits)[0], torch.zeros_like(logits), rtol=0, atol=1e-15)


def test_no_gradient_reaches_the_teacher():
    logits, target, _, weights = problem(7, 3, 5, 30)
    logits.requires_grad_()
    teacher = torch.randn_like(logits).requires_grad_()
    multimix_cross_entropy(logits, target, weights, teacher_logits=teacher).backward()
    output = MultiMixOutput(logits.mean(1), logits)
    MultiMixLoss(20, clean_weight=0.5).terms(
        output, target, MultiMixOutput(teacher.mean(1), teacher))['loss'].backward()
    assert teacher.grad is None and logits.grad.any()


def test_gradient_with_temperature_equals_that_of_timm():
    # timm computes the Kullback-Leibler divergence, the distillation term minus the entropy of the teacher.
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    def timm_loss(student):
        t, s = (F.log_softmax(x / 2.0, dim=-1) for x in (teacher, student))
        return F.kl_div(s, t, reduction='batchmean', log_target=True) * 2.0 ** 2
    def ours(student):
        return multimix_cross_entropy(
            student, torch.zeros(6).long(), torch.eye(6), teacher_logits=teacher, distill_weight=1.0,
            distill_temperature=2.0)
    torch.testing.assert_close(gradient(ours, student), gradient(timm_loss, student))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_reduced_precision(dtype, temperature):
    logits, target, y, weights = problem(32, 3, 40, 300, scale=5)
    logits, teacher = logits.to(dtype), (5 * torch.randn(logits.shape)).to(dtype)
    options = dict(distill_temperature=temperature)
    def fused(logits):
        return multimix_cross_entropy(logits, target, weights.float(), teacher_logits=teacher, balance=False, **options)
    grad, = gradient(fused, logits)
    truth, = gradient(
        lambda x: literal(x, y, weights.float().double(), teacher.double(), 'ce', **options), logits.double())
    assert grad.dtype == dtype and fused(logits).dtype == torch.float32
    assert relative_error(grad, truth) <= (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_huge_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0], [1e4, 1e4, -1e4]])
    target, weights = torch.tensor([0, 0, 2]), sample_weights(50, 3)
    for kind in LOSSES:
        def fused(x, kind=kind):
            return LOSSES[kind][0](x, target, weights, teacher_logits=-logits, distill_temperature=2.0)
        truth = literal(
            logits.double()[:, None], reference.one_hot(target, 3, torch.float64), weights.double()[None],
            -logits.double()[:, None], kind, 0.25, 2.0)
        torch.testing.assert_close(fused(logits).double(), truth, rtol=1e-6, atol=0)
        assert gradient(fused, logits)[0].isfinite().all()


# MultiMixLoss


@pytest.fixture
def output():
    dense = torch.randn(6, 9, 4, dtype=torch.float64)
    return MultiMixOutput(dense.mean(1), dense, torch.rand(6, 9, dtype=torch.float64))


@pytest.fixture
def teacher():
    dense = torch.randn(6, 9, 4, dtype=torch.float64)
    return MultiMixOutput(dense.mean(1), dense, torch.rand(6, 9, dtype=torch.float64))


def test_terms_match_the_reference(output, teacher):
    target = torch.randint(4, (6,))
    generator = torch.Generator().manual_seed(0)
    terms = MultiMixLoss(30, clean_weight=0.2, logit_scale=1.0, generator=torch.Generator().manual_seed(0)).terms(
        output, target, teacher, distill_weight=0.3, distill_temperature=2.0)
    y = reference.one_hot(target, 4, torch.float64)

    def expected(logits, teacher_logits, weights, attention):
        return reference.self_distillation(
            logits, y, weights.double(), attention, lambda z: z, teacher_logits, lambda z: z, 0.3, 2.0)

    pooled, pooled_teacher, ones = output.logits[:, None], teacher.logits[:, None], torch.ones(6, 1).double()
    # the student's attention, for both
    dense = expected(
        output.dense_logits, teacher.dense_logits, sample_weights(30, 6, 9, generator=generator), output.attention)
    torch.testing.assert_close(terms['dense'], dense)
    torch.testing.assert_close(
        terms['pooled'], expected(pooled, pooled_teacher, sample_weights(30, 6, 1, generator=generator), ones))
    torch.testing.assert_close(terms['clean'], expected(pooled, pooled_teacher, torch.eye(6)[None], ones))
    torch.testing.assert_close(
        terms['loss'], 0.4 * terms['dense'] + 0.4 * terms['pooled'] + 0.2 * terms['clean'])


@pytest.mark.parametrize('options', [dict(), dict(clean_weight=0.5), dict(loss_type='bce'), dict(balance=False)])
def test_weight_zero_is_plain_multimix_bit_for_bit(output, teacher, options):
    target = torch.randint(4, (6,))
    def run(*given, **distillation):
        logits, dense = (x.detach().float().requires_grad_() for x in output[:2])
        loss = MultiMixLoss(300, generator=torch.Generator().manual_seed(0), **options).terms(
            MultiMixOutput(logits, dense, output.attention), target, *given, **distillation)['loss']
        return loss, *torch.autograd.grad(loss, (logits, dense))
    for actual, expected in zip(run(teacher, distill_weight=0.0), run(), strict=True):
        assert torch.equal(actual, expected)


def test_the_loss_takes_the_output_of_a_teacher(output, teacher):
    target = torch.randint(4, (6,))
    def run(wrap=lambda loss: loss, *given, **options):
        return wrap(MultiMixLoss(30, generator=torch.Generator().manual_seed(0)))(output, target, *given, **options)
    plain = run()
    assert run(lambda loss: loss, teacher, distill_weight=0.0) == plain != run(lambda loss: loss, teacher)
    assert run(SelfDistillationLoss, teacher) == run(lambda loss: loss, teacher)
    options = dict(distill_weight=0.5, distill_temperature=2.0)
    wrapped = run(lambda loss: SelfDistillationLoss(loss, **options), teacher)
    assert wrapped == run(lambda loss: loss, teacher, **options)


def test_logits_of_a_teacher_without_positions_are_used_at_all_positions(output, teacher):
    target = torch.randint(4, (6,))
    def run(teacher):
        return MultiMixLoss(30, generator=torch.Generator().manual_seed(0)).terms(output, target, teacher)['loss']
    repeated = teacher._replace(dense_logits=teacher.logits[:, None].expand(6, 9, 4))
    torch.testing.assert_close(run(teacher.logits), run(repeated))
    assert run(teacher.logits) != run(teacher)


@pytest.mark.parametrize('tile_size', [7, 10_000])
def test_result_does_not_depend_on_the_tile_size(tile_size):
    num_mixes = 1800
    dense, target = torch.randn(300, 3, 5, dtype=torch.float64), torch.randint(5, (300,))
    teacher = MultiMixOutput(dense[:, 1], torch.randn_like(dense))
    def run(tile_size):
        def loss(dense):
            return MultiMixLoss(num_mixes, tile_size=tile_size, generator=torch.Generator().manual_seed(0)).terms(
                MultiMixOutput(dense[:, 0], dense), target, teacher, distill_temperature=2.0)['loss']
        return loss(dense), *gradient(loss, dense)
    torch.testing.assert_close(run(tile_size), run(None))


def test_a_teacher_adds_no_memory_that_grows_with_the_number_of_mixes():
    dense, target = torch.randn(16, 4, 50, requires_grad=True), torch.randint(50, (16,))
    output, teacher = MultiMixOutput(dense.mean(1), dense, torch.rand(16, 4)), torch.randn(16, 50)
    def peak(teacher):
        loss = MultiMixLoss(50_000)
        return peak_memory(lambda: loss.terms(output, target, teacher, distill_temperature=2)['loss'].backward())
    tile = 4 * 2 ** 19
    assert peak(teacher) <= peak(None) + 6 * tile


@pytest.mark.parametrize('options', [
    pytest.param(dict(), marks=pytest.mark.slow), dict(attention_grad=True), dict(loss_type='bce', clean_weight=0.5)])
@pytest.mark.parametrize('temperature', [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_compiles_without_a_graph_break(output, teacher, options, temperature):
    logits, dense, attention = (tensor.float() for tensor in output)
    target, loss = torch.randint(4, (6,)), MultiMixLoss(20, **options)

    def step(dense, attention):
        given = MultiMixOutput(logits, dense, attention)
        return loss.terms(given, target, teacher, distill_temperature=temperature)['loss']

    def run(step):
        torch.compiler.reset()  # each of these tests compiles the same functions
        torch.manual_seed(1)
        return gradient(step, dense, attention) if 'attention_grad' in options else gradient(
            lambda dense: step(dense, attention), dense)

    # The graph as traced. Code that is not compiled draws other weights on a CPU.
    expected = run(torch.compile(step, backend='eager', fullgraph=True))
    torch.testing.assert_close(run(torch.compile(step, backend='aot_eager', fullgraph=True)), expected)


@pytest.mark.parametrize('options, message', [
    (dict(distill_weight=1.5), r'distill_weight must be in \[0, 1\], got 1.5'),
    (dict(distill_weight=float('nan')), 'distill_weight must be in'),
    (dict(distill_temperature=0.0), 'distill_temperature must be positive, got 0.0'),
    (dict(distill_temperature=float('inf')), 'distill_temperature must be positive'),
    (dict(teacher=torch.zeros(6, 5)), r'\(b, c\) = \(6, 4\) or .* \(6, 9, 4\), got \(6, 1, 5\)'),
    (dict(teacher=MultiMixOutput(torch.zeros(6, 4), torch.zeros(6, 16, 4))), 'another number of positions'),
])
def test_bad_distillation_is_refused(output, options, message):
    with pytest.raises(ValueError, match=message):
        MultiMixLoss(10).terms(output, torch.zeros(6).long(), **{'teacher': torch.zeros(6, 4), **options})
