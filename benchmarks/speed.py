#!/usr/bin/env python3
"""Measure the time and memory of MultiMix: training steps, the loss, and the scaling of the loss.

    python benchmarks/speed.py                  # everything, as Markdown: the tables of docs/speed.md
    python benchmarks/speed.py --sections step --setups resnet50:224:32:1000
    python benchmarks/speed.py --device cuda --amp --channels-last --setups resnet50:224:128:1000
    python benchmarks/speed.py --output results # also results/speed.csv

A step is forward, loss, backward and an SGD update on random images. Methods alternate in every round. Times are
medians with quartiles, and ratios are medians of the ratios of each round. `wall` is wall-clock time. `cpu` is the CPU
time of this process, summed over threads. Compare it if the machine runs other programs, with `--threads 1` or
OMP_WAIT_POLICY=PASSIVE, so that waiting threads are not counted. Peak memory is the memory of PyTorch's allocator:
model, gradients, momentum, activations and loss.
"""
import argparse
import csv
from functools import partial
from pathlib import Path

import torch
from speed_measures import (
    METHODS,
    MIB,
    LossProblem,
    Rates,
    Setup,
    Times,
    Trainer,
    measure_rates,
    measure_times,
    peak_memory,
    products_of_dense,
    step_memory,
)
from tqdm import tqdm

SECTIONS = ('step', 'loss', 'growth')
SETUPS = ['resnet50:224:32:1000', 'resnet18:64:128:100', 'vit_small_patch16_224:224:32:1000']
BASELINES = ('cross-entropy', 'timm Mixup', 'literal dense MultiMix')
# Sizes of the loss: the last feature map of a wide network, and pooled.
LOSSES = [dict(b=64, r=49, c=1000, d=2048), dict(b=64, r=1, c=1000, d=2048)]
# Base sizes of the scaling measurement. GROWTH varies one size at a time.
BASE = dict(n=1000, b=32, c=1000, r=16)
GROWTH = {
    'n': (100, 1000, 10_000, 100_000),
    'b': (8, 32, 128, 512),
    'c': (10, 100, 1000, 21_841),
    'r': (1, 16, 196, 784),
}

Row = dict[str, object]


def print_table(rows: list[Row]) -> None:
    names = list(rows[0])
    print(f'\n| {" | ".join(names)} |\n|{"---|" * len(names)}')
    for row in rows:
        print('|', ' | '.join('' if value is None else str(value) for value in row.values()), '|')
    print(flush=True)


def record(section: str, method: str, times: Times, memory: float | None, **sizes: object) -> list[Row]:
    """Create a row of the CSV file for each round."""
    return [
        dict(section=section, method=method, **sizes, round=index, wall_s=wall, cpu_s=cpu, peak_mib=memory)
        for index, (wall, cpu) in enumerate(zip(times.wall, times.cpu, strict=True))]


def steps(setup: Setup, rates: Rates, args: argparse.Namespace) -> list[Row]:
    memory = {
        name: step_memory(name, setup, args) for name in tqdm(args.methods, desc='memory', disable=None, leave=False)}
    trainers = {name: Trainer(name, setup, args) for name in args.methods}
    actions = {name: trainer.step for name, trainer in trainers.items()}
    times = measure_times(actions, args.repetitions, torch.device(args.device), 'steps')
    rows = []
    for name in args.methods:
        low, high = times[name].quartiles
        row = {
            'method': name, 'step, s': f'{times[name].median:.3f}', 'quartiles': f'{low:.3f} to {high:.3f}',
            'peak, MiB': f'{memory[name]:.0f}'}
        for other in (name for name in BASELINES if name in args.methods):
            ratios = [times[name].ratio_to(times[other], clock) for clock in ('wall', 'cpu')]
            ratios.append(memory[name] / memory[other])
            row[f'to {other}: wall, cpu, memory'] = ', '.join(f'{ratio:.3f}' for ratio in ratios)
        rows.append(row)
    print(f'### A step: {setup}')
    print_table(rows)
    operations = products_of_dense(setup, args)
    if operations is not None and 'cross-entropy' in times:
        share = operations / rates.flops / times['cross-entropy'].median
        print(f'Dense MultiMix adds at least {operations / 1e9:.1f} GFlop of matrix products: '
              f'{operations / rates.flops * 1e3:.1f} ms at {rates.flops / 1e9:.0f} GFlop/s, {100 * share:.1f} % of the '
              'cross-entropy step.\n')
    return [row for name in args.methods for row in record('step', name, times[name], memory[name], setup=str(setup))]


def loss_alone(rates: Rates, args: argparse.Namespace) -> list[Row]:
    table, rows = [], []
    for sizes in LOSSES:
        b, r, c, n = sizes['b'], sizes['r'], sizes['c'], args.num_mixes
        problem = LossProblem(n=n, args=args, **sizes)
        actions = {
            'literal': problem.literal, 'from embeddings': partial(problem.fused, from_embeddings=True),
            'from logits': problem.fused, 'from logits, shared weights': partial(problem.fused, shared_weights=True)}
        memory = {}
        for name, action in actions.items():
            problem.clear_gradients()
            memory[name] = peak_memory(action, problem.logits.device)
        times = measure_times(actions, args.repetitions, problem.logits.device, 'loss')
        products = 4 * n * b * c * r / rates.flops
        moved = 3 * problem.logits.nbytes / rates.copied_bytes  # read the logits, write and scale the gradient
        bound = max(products, moved)
        for name in actions:
            low, high = times[name].quartiles
            table.append({
                'b, r, c, d': f'{b}, {r}, {c}, {sizes["d"]}',
                'loss': name,
                'forward and backward, ms': f'{times[name].median * 1e3:.1f}',
                'quartiles': f'{low * 1e3:.1f} to {high * 1e3:.1f}',
                'literal is slower by (wall)': f'{times["literal"].ratio_to(times[name], "wall"):.1f}',
                '(cpu)': f'{times["literal"].ratio_to(times[name], "cpu"):.1f}',
                'bound, ms': f'{bound * 1e3:.1f}',
                'to the bound': f'{times[name].median / bound:.2f}',
                'peak, MiB': f'{memory[name]:.0f}',
            })
            rows += record('loss', name, times[name], memory[name], n=n, **sizes)
        parts = {
            'products': products, 'exponentials': n * c * r / rates.exponentials, 'draws': n * b * r / rates.draws,
            'logits': moved}
        print(f'Bounds for b = {b}, r = {r}, c = {c}, n = {n} at the measured rates:',
              ', '.join(f'{name} {seconds * 1e3:.1f} ms' for name, seconds in parts.items()) + '\n')
    print('### The loss alone')
    print_table(table)
    return rows


def growth(args: argparse.Namespace) -> list[Row]:
    table, rows = [], []
    device = torch.device(args.device)
    for name, values in GROWTH.items():
        for value in tqdm(values, desc=f'growth with {name}', disable=None, leave=False):
            sizes = {**BASE, name: value}
            problem = LossProblem(args=args, **sizes)
            memory = peak_memory(problem.fused, device)
            times = measure_times({'': problem.fused}, args.growth_repetitions, device, 'growth')['']
            bytes_of_logits = problem.logits.nbytes / MIB
            table.append({
                'grows': name, **sizes, 'ms': f'{times.median * 1e3:.1f}', 'peak, MiB': f'{memory:.1f}',
                'logits, MiB': f'{bytes_of_logits:.1f}'})
            rows += record('growth', name, times, memory, **sizes)
    print('### How the loss grows')
    print_table(table)
    return rows


def write(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / 'speed.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--sections', nargs='+', choices=SECTIONS, default=SECTIONS, help='measurements to run (default: all)')
    add('--setups', nargs='+', type=Setup.parse, default=[Setup.parse(text) for text in SETUPS],
        metavar='MODEL:SIZE:BATCH:CLASSES', help=f'models and batches of the steps (default: {" ".join(SETUPS)})')
    add('--methods', nargs='+', choices=METHODS, default=list(METHODS), help='methods of the steps (default: all)')
    add('--num-mixes', type=int, default=1000, help='number of mixes n (default: %(default)s)')
    add('--repetitions', type=int, default=7, help='timed rounds of steps and losses (default: %(default)s)')
    add('--growth-repetitions', type=int, default=3,
        help='timed rounds of each size in the scaling measurement (default: %(default)s)')
    add('--device', default='cpu', choices=('cpu', 'cuda'), help='device to measure (default: %(default)s)')
    add('--threads', type=int, help="number of CPU threads (default: PyTorch's)")
    add('--amp', action='store_true', help='run steps under autocast to bfloat16')
    add('--channels-last', action='store_true', help='use the channels_last memory format for models and images')
    add('--compile', action='store_true', help='compile the models, and on a GPU the losses, with torch.compile')
    add('--output', type=Path, metavar='FOLDER', help='folder for speed.csv with every round')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # as in training
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    rates = measure_rates(device)
    options = ' '.join(f'--{option}' for option in ('amp', 'channels-last', 'compile')
                       if vars(args)[option.replace('-', '_')])
    print(f'{name}, PyTorch {torch.__version__}, n = {args.num_mixes} {options}: '
          f'{args.repetitions} rounds. Measured rates: matrix products {rates.flops / 1e9:.0f} GFlop/s, copies '
          f'{rates.copied_bytes / 1e9:.1f} GB/s read and written, softmax {rates.exponentials / 1e9:.2f} G elements/s, '
          f'sampled weights {rates.draws / 1e6:.0f} M/s.\n', flush=True)
    rows = []
    if 'step' in args.sections:
        for setup in args.setups:
            rows += steps(setup, rates, args)
    if 'loss' in args.sections:
        rows += loss_alone(rates, args)
    if 'growth' in args.sections:
        rows += growth(args)
    if args.output:
        write(rows, args.output)


if __name__ == '__main__':
    main()
