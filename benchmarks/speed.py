#!/usr/bin/env python3
"""What MultiMix costs: step time and peak memory beside plain cross-entropy and beside the equations taken literally.

    python benchmarks/speed.py                                      # ResNet-50, 224 px, b = 32, c = 1000, n = 1000
    python benchmarks/speed.py --model vit_small_patch16_224 --methods cross-entropy 'dense MultiMix'

A step is forward, loss, backward and an SGD update on random images. The methods take turns, so that they share
whatever else the machine is doing; times are medians with quartiles, ratios medians of the ratios round by round. Peak
memory is what PyTorch's allocator holds: model, gradients, momentum, activations, loss. (The resident size of a process
varies by more than MultiMix adds.)
"""
import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from timm_multimix import MultiMixLoss, attach, attention_map, reference, sample_weights

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(model: torch.nn.Module, args: argparse.Namespace) -> Step:
    return lambda images, target: F.cross_entropy(model(images), target)


def input_mixup(model: torch.nn.Module, args: argparse.Namespace) -> Step:
    mixup = Mixup(mixup_alpha=1.0, num_classes=args.num_classes)

    def step(images, target):
        images, target = mixup(images.clone(), target)  # timm mixes in place
        return F.cross_entropy(model(images), target)

    return step


def multimix(mode: str) -> Callable[..., Step]:
    def method(model, args):
        attach(model, mode)
        criterion = MultiMixLoss(args.num_mixes)
        return lambda images, target: criterion(model(images), target)

    return method


def literal(model: torch.nn.Module, args: argparse.Namespace) -> Step:
    """Eqs. 9-14 as they are written, on embeddings, for a model whose head is average pooling and a linear layer."""
    def step(images, target):
        features = model.forward_features(images)
        z = features.flatten(2).mT if features.ndim == 4 else features[:, model.num_prefix_tokens:]
        weights = sample_weights(args.num_mixes, len(z), z.shape[1], device=z.device)
        y = reference.one_hot(target, args.num_classes, z.dtype)
        return reference.dense_multimix(z, y, weights, attention_map(z).detach(), model.get_classifier())

    return step


METHODS = {
    'cross-entropy': cross_entropy,
    'timm Mixup': input_mixup,
    'pooled MultiMix': multimix('pooled'),
    'dense MultiMix': multimix('dense'),
    'literal dense MultiMix': literal,
}


class Bench:
    """A batch, and for each method a model of its own with its optimizer, ready to take a training step."""

    def __init__(self, args: argparse.Namespace, methods: list[str]):
        torch.manual_seed(0)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = torch.device(args.device)
        self.clock = args.clock
        model = timm.create_model(args.model, num_classes=args.num_classes, global_pool='avg')
        size = args.image_size or model.default_cfg['input_size'][-1]
        self.images = torch.randn(args.batch_size, 3, size, size, device=self.device)
        self.target = torch.randint(args.num_classes, (args.batch_size,), device=self.device)
        self.steps, self.optimizers = {}, {}
        for name in methods:
            copied = copy.deepcopy(model).to(self.device).train()
            self.optimizers[name] = torch.optim.SGD(copied.parameters(), lr=1e-3, momentum=0.9)
            self.steps[name] = METHODS[name](copied, args)

    def step(self, name: str) -> float:
        """Seconds of one training step."""
        self._synchronize()
        clock = time.process_time if self.clock == 'cpu' else time.perf_counter
        start = clock()
        self.optimizers[name].zero_grad()
        self.steps[name](self.images, self.target).backward()
        self.optimizers[name].step()
        self._synchronize()
        return clock() - start

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()


def measure_times(args: argparse.Namespace) -> dict[str, list[float]]:
    bench = Bench(args, args.methods)
    times = {name: [] for name in args.methods}
    for repetition in tqdm(range(args.repetitions + 1), desc='steps', disable=None):
        for name in args.methods:
            seconds = bench.step(name)
            if repetition:  # the first round warms up
                times[name].append(seconds)
    return times


def _take_steps(args: argparse.Namespace, name: str) -> None:
    bench = Bench(args, [name])
    for _ in range(2):
        bench.step(name)


def measure_memory(args: argparse.Namespace, name: str) -> float:
    """Peak MiB that PyTorch's allocator holds, from building the model to the end of its second step."""
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        _take_steps(args, name)
        return torch.cuda.max_memory_allocated() / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        _take_steps(args, name)
    held = itertools.accumulate(e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(held) / 2 ** 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50', help='timm model with average pooling (default: %(default)s)')
    parser.add_argument('--image-size', type=int, help="pixels (default: the model's own)")
    parser.add_argument('--batch-size', type=int, default=32, help='(default: %(default)s)')
    parser.add_argument('--num-classes', type=int, default=1000, help='(default: %(default)s)')
    parser.add_argument('--num-mixes', type=int, default=1000, help='(default: %(default)s)')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), help='default: all')
    parser.add_argument('--repetitions', type=int, default=7, help='steps timed of each method (default: %(default)s)')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='(default: %(default)s)')
    parser.add_argument('--clock', default='wall', choices=('wall', 'cpu'),
                        help='wall: seconds on the clock; cpu: seconds that the processor worked, summed over threads, '
                             'for a machine that does other work too: set OMP_WAIT_POLICY=PASSIVE with it, so that '
                             'waiting does not count (default: %(default)s)')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    memory = {name: measure_memory(args, name) for name in tqdm(args.methods, desc='memory', disable=None)}
    times = measure_times(args)
    baseline = args.methods[0]
    print(f'{args.model}, b = {args.batch_size}, c = {args.num_classes}, n = {args.num_mixes}, {args.device}, '
          f'{args.clock} time, {torch.get_num_threads()} threads, {args.repetitions} steps of each, '
          f'PyTorch {torch.__version__}\n')
    print(f'| method | step, s | quartiles | to {baseline} | peak memory, MiB | to {baseline} |')
    print('|---|---|---|---|---|---|')
    for name in args.methods:
        low, median, high = statistics.quantiles(times[name], n=4)
        ratio = statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))
        print(f'| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {ratio:.3f} '
              f'| {memory[name]:.0f} | {memory[name] / memory[baseline]:.3f} |')


if __name__ == '__main__':
    main()
