"""Measurements of benchmarks/speed.py: times, peak memory, rates of the machine, training steps and losses."""
import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from timm_multimix import (
    EMATeacher,
    MultiMixLoss,
    MultiMixOutput,
    SelfDistillationLoss,
    attach,
    attention_map,
    sample_weights,
)
from timm_multimix.losses import reference

MIB = 2 ** 20
Action = Callable[[], object]


@dataclass
class Times:
    """Wall-clock time and CPU time of every round in seconds. CPU time is summed over threads."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def ratio_to(self, other: 'Times', clock: str) -> float:
        """Return the median over rounds of the ratio of times."""
        pairs = zip(getattr(self, clock), getattr(other, clock), strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.wall) < 2:
            return self.wall[0], self.wall[0]
        low, _, high = statistics.quantiles(self.wall, n=4)
        return low, high


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def measure_times(actions: dict[str, Action], repetitions: int, device: torch.device, title: str) -> dict[str, Times]:
    """Time actions, alternating in every round. The first round is a warm-up and is not recorded."""
    times = {name: Times() for name in actions}
    for repetition in tqdm(range(repetitions + 1), desc=title, disable=None, leave=False):
        for name, action in actions.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            synchronize(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repetition:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def peak_memory(action: Action, device: torch.device) -> float:
    """Return the peak memory of PyTorch's allocator during an action in MiB, above the memory allocated before."""
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        action()
    memory = itertools.accumulate(e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(memory, default=0) / MIB


@dataclass
class Rates:
    """Rates of the machine per second for the operations of the loss, the best of several runs."""
    flops: float
    copied_bytes: float
    exponentials: float
    draws: float


def measure_rates(device: torch.device) -> Rates:
    a, b = torch.randn(1, 2048, 2048, device=device), torch.randn(1, 2048, 2048, device=device)
    source, tile = torch.randn(2 ** 26, device=device), torch.randn(500, 1000, device=device)
    target = torch.empty_like(source)
    actions = {
        'bmm': lambda: torch.bmm(a, b),
        'copy': lambda: target.copy_(source),
        'softmax': lambda: tile.softmax(-1),
        'draws': lambda: sample_weights(1000, 32, 4, device=device),
    }
    best = {name: min(times.wall) for name, times in measure_times(actions, 9, device, 'rates').items()}
    return Rates(
        flops=2 * 2048 ** 3 / best['bmm'],
        copied_bytes=2 * source.nbytes / best['copy'],
        exponentials=tile.numel() / best['softmax'],
        draws=1000 * 32 * 4 / best['draws'],
    )


# Training steps


@dataclass
class Setup:
    """A model and the size of its batch."""
    model: str
    image_size: int
    batch_size: int
    num_classes: int

    @classmethod
    def parse(cls, text: str) -> 'Setup':
        try:
            model, *sizes = text.split(':')
            return cls(model, *map(int, sizes))
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f'must be MODEL:IMAGE_SIZE:BATCH_SIZE:CLASSES, such as resnet50:224:32:1000, got {text!r}') from error

    def __str__(self) -> str:
        return f'{self.model}, {self.image_size} px, b = {self.batch_size}, c = {self.num_classes}'


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def compiled(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return torch.compile(model) if args.compile else model


def compiled_loss(criterion: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Compile a loss as MultiMixTask.compile does: on a GPU only, and without a teacher."""
    return torch.compile(criterion) if args.compile and args.device != 'cpu' else criterion


def cross_entropy(model: nn.Module, args: argparse.Namespace) -> Loss:
    run = compiled(model, args)
    return lambda images, target: F.cross_entropy(run(images), target)


def input_mixup(model: nn.Module, args: argparse.Namespace) -> Loss:
    mixup = Mixup(mixup_alpha=1.0, num_classes=model.num_classes)
    run = compiled(model, args)

    def loss(images, target):
        images, target = mixup(images.clone(), target)  # timm mixes in place
        return F.cross_entropy(run(images), target)

    return loss


def multimix(mode: str, **options: Any) -> Callable[..., Loss]:
    def method(model, args):
        attach(model, mode)
        criterion = compiled_loss(MultiMixLoss(args.num_mixes, **options), args)
        run = compiled(model, args)
        return lambda images, target: criterion(run(images), target)

    return method


def with_teacher(model: nn.Module, args: argparse.Namespace) -> Loss:
    attach(model, 'dense')
    teacher = EMATeacher(model)
    criterion = SelfDistillationLoss(MultiMixLoss(args.num_mixes))
    run = compiled(model, args)
    if args.compile:
        teacher.compile()

    def loss(images, target):
        teacher.update(model)  # after the previous optimizer step
        teacher_output = teacher(images)  # before the student's activations are in memory
        return criterion(run(images), target, teacher_output)

    return loss


def literal(model: nn.Module, args: argparse.Namespace) -> Loss:
    """Dense MultiMix on embeddings (P2, eqs. 9-14), for a model whose head is pooling and a linear layer."""
    def loss(images, target):
        features = model.forward_features(images)
        z = features.flatten(2).mT if features.ndim == 4 else features[:, model.num_prefix_tokens:]
        weights = sample_weights(args.num_mixes, len(z), z.shape[1], device=z.device)
        y = reference.one_hot(target, model.num_classes, z.dtype)
        return reference.dense_multimix(z, y, weights, attention_map(z).detach(), model.get_classifier())

    return loss


METHODS = {
    'cross-entropy': cross_entropy,
    'timm Mixup': input_mixup,
    'pooled MultiMix': multimix('pooled'),
    'dense MultiMix': multimix('dense'),
    'dense MultiMix, shared weights': multimix('dense', shared_weights=True),
    'dense MultiMix, teacher': with_teacher,
    'literal dense MultiMix': literal,
}


class Trainer:
    """Train a model with one method on one batch."""

    def __init__(self, method: str, setup: Setup, args: argparse.Namespace):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = timm.create_model(setup.model, num_classes=setup.num_classes, **image_size(setup))
        self.model = model.to(self.device, memory_format=layout).train()
        shape = setup.batch_size, 3, setup.image_size, setup.image_size
        self.images = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.target = torch.randint(setup.num_classes, (setup.batch_size,), device=self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.amp = args.amp
        self.loss = METHODS[method](self.model, args)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext():
            loss = self.loss(self.images, self.target)
        loss.backward()
        self.optimizer.step()


def image_size(setup: Setup) -> dict[str, int]:
    """Return the img_size argument for models with a fixed input size."""
    takes_size = timm.create_model(setup.model).default_cfg.get('fixed_input_size', False)
    return dict(img_size=setup.image_size) if takes_size else {}


def step_memory(method: str, setup: Setup, args: argparse.Namespace) -> float:
    """Return the peak memory of creating a model and training it for two steps, in MiB."""
    def take_steps():
        trainer = Trainer(method, setup, args)
        for _ in range(2):
            trainer.step()

    return peak_memory(take_steps, torch.device(args.device))


def products_of_dense(setup: Setup, args: argparse.Namespace) -> float | None:
    """Return the minimum number of floating-point operations that dense MultiMix adds to a step.

    These are the forward and backward pass of a linear head at r positions, and 4 n b c for the loss at each position
    and for the pooled loss. None if the head is not linear.
    """
    model = timm.create_model(setup.model, num_classes=setup.num_classes, **image_size(setup)).train()
    if not isinstance(model.get_classifier(), nn.Linear):
        return None
    attach(model, 'dense')
    dense = model(torch.randn(2, 3, setup.image_size, setup.image_size)).dense_logits
    b, r, c, d = setup.batch_size, dense.shape[1], setup.num_classes, model.get_classifier().in_features
    return 6 * b * r * d * c + 4 * args.num_mixes * b * c * (r + 1)


# The loss alone


class LossProblem:
    """Forward and backward pass of the literal and the fused loss, for random embeddings (b, r, d) and logits."""

    def __init__(self, b: int, r: int, c: int, n: int, args: argparse.Namespace, d: int = 1):
        torch.manual_seed(0)
        device = torch.device(args.device)
        self.n = n
        self.target = torch.randint(c, (b,), device=device)
        self.attention = torch.rand(b, r, device=device).softmax(1)
        self.logits = torch.randn(b, r, c, device=device, requires_grad=True)
        self.z = torch.randn(b, r, d, device=device, requires_grad=True)
        self.classifier = nn.Linear(d, c, device=device)

    def clear_gradients(self) -> None:
        self.logits.grad = self.z.grad = None
        self.classifier.zero_grad()

    def fused(self, from_embeddings: bool = False, shared_weights: bool = False) -> None:
        """Compute the loss from logits, or from embeddings with the classifier at every position."""
        self.clear_gradients()
        criterion = MultiMixLoss(self.n, pooled_weight=0.0, shared_weights=shared_weights)
        logits = self.classifier(self.z) if from_embeddings else self.logits
        criterion(MultiMixOutput(logits[:, 0], logits, self.attention), self.target).backward()

    def literal(self) -> None:
        self.clear_gradients()
        b, r, _ = self.z.shape
        weights = sample_weights(self.n, b, r, device=self.z.device)
        y = reference.one_hot(self.target, self.classifier.out_features, self.z.dtype)
        reference.dense_multimix(self.z, y, weights, self.attention, self.classifier).backward()
