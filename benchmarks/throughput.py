#!/usr/bin/env python3
"""Compare the throughput of train_timm.py, without MultiMix, with timm's train.py.

    python benchmarks/throughput.py path/to/pytorch-image-models/train.py
    python benchmarks/throughput.py path/to/train.py --options --model resnet18 --img-size 64 --batch-size 64

Both scripts train on the same folder of images (scikit-learn's digits as PNG files), with the same options, the
installed timm and no validation. Their processes alternate. The time of a run of one epoch is subtracted to exclude
start-up.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from timm_multimix.data.demo import DigitsDataset

OUR_SCRIPT = Path(__file__).resolve().parent.parent / 'train_timm.py'
OPTIONS = ['--model', 'test_resnet', '--img-size', '32', '--batch-size', '64', '--workers', '1', '--lr', '0.1']
FIXED_OPTIONS = ['--num-classes', '10', '--val-split', '', '--device', 'cpu', '--log-interval', '1000']


def write_images(folder: Path) -> int:
    """Write the training digits as PNG files. Returns the number of images."""
    dataset = DigitsDataset('train')
    for index in range(len(dataset)):
        image, _ = dataset[index]
        path = folder / 'train' / dataset.filename(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return len(dataset)


def run_seconds(script: str, folder: Path, epochs: int, options: list[str]) -> tuple[float, float]:
    """Return the wall-clock time and the CPU time of a run in seconds, including its workers."""
    command = [
        sys.executable, script, '--data-dir', str(folder), '--output', str(folder / 'output'), '--epochs', str(epochs),
        '--warmup-epochs', '0', *FIXED_OPTIONS, *options]
    # PYTHONSAFEPATH prevents timm's script from importing the timm package next to it.
    environment = {**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHONSAFEPATH': '1'}
    start, cpu_before = time.perf_counter(), _cpu_seconds_of_children()
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f'{" ".join(command)} failed:\n{run.stderr[-2000:]}')
    return time.perf_counter() - start, _cpu_seconds_of_children() - cpu_before


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('timm_script', metavar='PATH', help="path of train.py in timm's repository")
    parser.add_argument('--epochs', type=int, default=21,
                        help='number of epochs of a run, at least 2 (default: %(default)s)')
    parser.add_argument('--repetitions', type=int, default=3,
                        help='number of runs of each script (default: %(default)s)')
    parser.add_argument('--options', nargs=argparse.REMAINDER, default=OPTIONS,
                        help='options passed to both scripts; must be last on the command line '
                             f'(default: {" ".join(OPTIONS)})')
    args = parser.parse_args()
    if not os.path.isfile(args.timm_script):
        parser.error(f"{args.timm_script} is not a file: pass the path of timm's train.py.")
    if args.epochs < 2:
        parser.error(f'--epochs must be at least 2, got {args.epochs}.')
    return args


def main() -> None:
    args = parse_args()
    scripts = {'train_timm.py': str(OUR_SCRIPT), "timm's train.py": args.timm_script}
    rates = {name: [] for name in scripts}
    cpu_times = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder)
        for _ in tqdm(range(args.repetitions), desc='rounds', disable=None):
            for script, path in scripts.items():
                short = run_seconds(path, folder, 1, args.options)
                long = run_seconds(path, folder, args.epochs, args.options)
                wall, cpu = (b - a for a, b in zip(short, long, strict=True))
                rates[script].append(images * (args.epochs - 1) / wall)
                cpu_times[script].append(cpu / (images * (args.epochs - 1)))
    print(f'{" ".join(args.options)}, {images} images, {args.epochs - 1} epochs, {args.repetitions} runs of each\n')
    print('| script | images/s, median | range | CPU time per image, ms |\n|---|---|---|---|')
    for script, values in rates.items():
        print(f'| {script} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} '
              f'| {statistics.median(cpu_times[script]) * 1e3:.3f} |')
    for name, (ours, theirs) in (('images/s', rates.values()), ('CPU time', cpu_times.values())):
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f'\nmedian ratio of {name} over rounds: {ratio:.3f}')


if __name__ == '__main__':
    main()
