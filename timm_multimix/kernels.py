"""The tile pass of the loss on a GPU: mixed logits, their log-partition and the gradient, in registers only.

Two Triton kernels for what FusedLoss._evaluate_rows does with PyTorch's operations. The first goes through the classes
of a tile of rows for the loss of every row; the second, knowing that, through the rows of a tile of classes for the
gradient, forming the mixed logits once more, which is cheaper than keeping them. Nothing of size n x c is written, no
two programs write to one place, and the result is the same in every run.

Import it only where Triton is installed. TRITON_INTERPRET=1, set before, runs the kernels on the CPU.
"""
import torch
import triton
import triton.language as tl

ROWS = 64  # of a tile of mixed logits
CLASSES = 64
EXAMPLES = 32  # multiplied at a time
MOST_OUT = 128  # examples whose gradient one program holds
NUM_WARPS = 8


@triton.jit
def _mix(m, logits, rows, classes, n, b, c, EXAMPLES: tl.constexpr, PRECISION: tl.constexpr):
    """Mixed logits of a tile: m (n, b) and logits (b, c) are those of one position."""
    mixed = tl.zeros((rows.shape[0], classes.shape[0]), tl.float32)
    for start in range(0, b, EXAMPLES):
        examples = start + tl.arange(0, EXAMPLES)
        left = tl.load(
            m + rows[:, None] * b + examples[None, :],
            mask=(rows[:, None] < n) & (examples[None, :] < b), other=0.0).to(tl.float32)
        right = tl.load(
            logits + examples[:, None] * c + classes[None, :],
            mask=(examples[:, None] < b) & (classes[None, :] < c), other=0.0).to(tl.float32)
        mixed = tl.dot(left, right, mixed, input_precision=PRECISION)
    return mixed


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _advance(mixed, top, total):
    """One step of a logsumexp over tiles of classes: largest logit and sum of exponentials so far."""
    new_top = tl.maximum(top, tl.max(mixed, axis=1))
    decay = tl.exp(top - new_top)
    return new_top, decay, total * decay + tl.sum(tl.exp(mixed - new_top[:, None]), axis=1)


@triton.jit
def _loss_kernel(
        m, logits, teacher, value, tempered, predicted, term, n, b, c, inverse_temperature,
        SIGMOID: tl.constexpr, TEACHER: tl.constexpr, TEMPERED: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, CLASSES: tl.constexpr, EXAMPLES: tl.constexpr):
    """For every row: A of its mixed logits l; with a teacher, A(l/T), that of its own, and A(l/T) - q·l/T."""
    position = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m += position * n * b
    logits += position * b * c
    teacher += position * b * c
    sums = tl.zeros((ROWS,), tl.float32)
    tempered_sums = tl.zeros((ROWS,), tl.float32)
    teacher_sums = tl.zeros((ROWS,), tl.float32)
    agreement = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float('inf'), tl.float32)
    tempered_top = top
    teacher_top = top
    for start in range(0, c, CLASSES):
        classes = start + tl.arange(0, CLASSES)
        valid = classes[None, :] < c
        mixed = _mix(m, logits, rows, classes, n, b, c, EXAMPLES, PRECISION)
        if SIGMOID:
            sums += tl.sum(tl.where(valid, _softplus(mixed), 0), axis=1)
        else:
            top, _, sums = _advance(tl.where(valid, mixed, -float('inf')), top, sums)
        if TEACHER:
            taught = _mix(m, teacher, rows, classes, n, b, c, EXAMPLES, PRECISION)
            mixed *= inverse_temperature
            if SIGMOID:
                tempered_sums += tl.sum(tl.where(valid, _softplus(mixed), 0), axis=1)
                agreement += tl.sum(tl.where(valid, _sigmoid(taught) * mixed, 0), axis=1)
            else:
                if TEMPERED:
                    tempered_top, _, tempered_sums = _advance(
                        tl.where(valid, mixed, -float('inf')), tempered_top, tempered_sums)
                taught = tl.where(valid, taught, -float('inf'))
                teacher_top, decay, teacher_sums = _advance(taught, teacher_top, teacher_sums)
                agreement = agreement * decay + tl.sum(
                    tl.where(valid, tl.exp(taught - teacher_top[:, None]) * mixed, 0), axis=1)
    inside = rows < n
    out = position * n + rows
    if not SIGMOID:
        sums = top + tl.log(sums)
    tl.store(value + out, sums, mask=inside)
    if TEACHER:
        if not SIGMOID:
            agreement /= teacher_sums
            tl.store(predicted + out, teacher_top + tl.log(teacher_sums), mask=inside)
            if TEMPERED:
                tempered_sums = tempered_top + tl.log(tempered_sums)
                tl.store(tempered + out, tempered_sums, mask=inside)
            else:
                tempered_sums = sums
        tl.store(term + out, tempered_sums - agreement, mask=inside)


@triton.jit
def _slope_kernel(
        m, logits, teacher, value, tempered, predicted, share, classified, distilled, slope, n, b, c,
        inverse_temperature, distill_factor,
        SIGMOID: tl.constexpr, TEACHER: tl.constexpr, TEMPERED: tl.constexpr, ANCHORED: tl.constexpr,
        PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, EXAMPLES: tl.constexpr, OUT: tl.constexpr):
    """Add Mᵀ times the gradient for the mixed logits, less the anchor, to a tile of slope."""
    position = tl.program_id(2).to(tl.int64)
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    m += position * n * b
    logits += position * b * c
    teacher += position * b * c
    anchor = tl.zeros((CLASSES,), tl.float32)
    distilled_anchor = tl.zeros((CLASSES,), tl.float32)
    if ANCHORED:
        anchor = tl.load(classified + position * c + classes, mask=classes < c, other=0.0)
        if TEACHER:
            distilled_anchor = tl.load(distilled + position * c + classes, mask=classes < c, other=0.0)
    total = tl.zeros((OUT, CLASSES), tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = position * n + rows
        inside = rows < n
        mixed = _mix(m, logits, rows, classes, n, b, c, EXAMPLES, PRECISION)
        if SIGMOID:
            derivative = _sigmoid(mixed)
        else:
            derivative = tl.exp(mixed - tl.load(value + row, mask=inside, other=0.0)[:, None])
        gradient = (derivative - anchor[None, :]) * tl.load(share + row, mask=inside, other=0.0)[:, None]
        if TEACHER:
            taught = _mix(m, teacher, rows, classes, n, b, c, EXAMPLES, PRECISION)
            if SIGMOID:
                taught = _sigmoid(taught)
                if TEMPERED:
                    derivative = _sigmoid(mixed * inverse_temperature)
            else:
                taught = tl.exp(taught - tl.load(predicted + row, mask=inside, other=0.0)[:, None])
                if TEMPERED:
                    derivative = tl.exp(
                        mixed * inverse_temperature - tl.load(tempered + row, mask=inside, other=0.0)[:, None])
            gradient += (derivative - taught) * distill_factor - distilled_anchor[None, :]
        left = tl.load(
            m + rows[None, :] * b + out[:, None],
            mask=inside[None, :] & (out[:, None] < b), other=0.0).to(tl.float32)
        # Little is lost if what is left without the anchor is rounded.
        total = tl.dot(left, gradient, total, input_precision='tf32' if ANCHORED else PRECISION)
    inside = (out[:, None] < b) & (classes[None, :] < c)
    at = slope + position * b * c + out[:, None] * c + classes[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def evaluate_rows(
        m: torch.Tensor,
        logits: torch.Tensor,
        share: torch.Tensor,
        slope: torch.Tensor,
        *,
        sigmoid: bool = False,
        anchor: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
        distilled_anchor: torch.Tensor | None = None,
        distill_weight: float = 0.0,
        temperature: float = 1.0,
        precision: str = 'tf32x3',
) -> torch.Tensor:
    """Loss and gradient of rows of weights at some positions, as FusedLoss._evaluate_rows.

    Args:
        m: Rows of weights (p, n, b).
        logits: Logits (p, b, c); float32, bfloat16 or float16, as m. Sums are float32.
        share: Factor of the classification term of every row (p, n), float32.
        slope: Float32 (p, b, c). Mᵀ times the gradient for the mixed logits, less that of the anchors, is added.
        sigmoid: Binary cross-entropy instead of softmax cross-entropy.
        anchor: Subtracted from the derivative of the log-partition in every row (p, 1, c), float32.
        teacher: The teacher's logits, divided by the temperature (p, b, c).
        distilled_anchor: Subtracted from the gradient of the distillation term (p, 1, c), float32.
        distill_weight: Share of the distillation term.
        temperature: Its temperature.
        precision: How products of float32 are formed: 'tf32', 'tf32x3' (about float32) or 'ieee'.

    Returns:
        The sum of the loss over rows and positions, but for what is linear in the target; float64.
    """
    num_positions, n, b = m.shape
    c = logits.shape[-1]
    m, logits, share = m.contiguous(), logits.contiguous(), share.contiguous()
    has_teacher, tempered = teacher is not None, temperature != 1
    teacher = teacher.contiguous() if has_teacher else logits
    per_row = torch.empty(4, num_positions, n, dtype=torch.float32, device=m.device)
    value, tempered_value, predicted, term = per_row
    shared = dict(
        SIGMOID=sigmoid, TEACHER=has_teacher, TEMPERED=tempered, PRECISION=precision,
        ROWS=ROWS, CLASSES=CLASSES, EXAMPLES=EXAMPLES, num_warps=NUM_WARPS)
    _loss_kernel[triton.cdiv(n, ROWS), num_positions](
        m, logits, teacher, value, tempered_value, predicted, term, n, b, c, 1 / temperature, **shared)
    out = min(MOST_OUT, max(16, triton.next_power_of_2(b)))
    _slope_kernel[triton.cdiv(c, CLASSES), triton.cdiv(b, out), num_positions](
        m, logits, teacher, value, tempered_value, predicted, share,
        anchor.contiguous() if anchor is not None else share,
        distilled_anchor.contiguous() if distilled_anchor is not None else share,
        slope, n, b, c, 1 / temperature, distill_weight * temperature,
        ANCHORED=anchor is not None, OUT=out, **shared)
    loss = (value * share).sum(dtype=torch.float64)
    return loss + distill_weight * temperature ** 2 * term.sum(dtype=torch.float64) if has_teacher else loss
