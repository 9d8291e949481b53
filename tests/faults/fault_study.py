"""Faults tried on real runs, and what became of them.

    python tests/faults/fault_study.py --faults 100 --seed 0     # prints a table as in docs/reliability.md

Every fault hits a run of its own. The run is then continued with --resume auto, until it ends; it must end with the
files that the same run has without any fault, bit for bit.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from training_helpers import make_images, same  # noqa: E402

SIGNALS = {'SIGKILL': signal.SIGKILL, 'SIGTERM': signal.SIGTERM, 'SIGINT': signal.SIGINT}
RECOVERY_INTERVAL = 2
# 6 updates in each of 2 epochs.
OPTIONS = dict(
    model='test_resnet', img_size=32, batch_size=4, epochs=2, warmup_epochs=0, lr=0.01, opt='adamw', multimix='dense',
    multimix_n=10, recovery_interval=RECOVERY_INTERVAL, checkpoint_hist=2, mixup=0.2, reprob=0.3, device='cpu')


@dataclass
class Result:
    """What became of a run that met a fault.

    Attributes:
        statuses: Exit statuses of its processes.
        lost: Updates that had to be made again.
        text: What the last process told.
    """
    statuses: list[int] = field(default_factory=list)
    lost: int = 0
    text: str = ''


class Harness:
    """Starts runs in a folder, and compares them with the run that nothing happened to.

    Args:
        folder: An empty folder.
        workers: Loading processes of each run.
    """

    def __init__(self, folder: Path, workers: int = 0):
        self.folder = folder
        self.data = folder / 'data'
        make_images(self.data / 'train', count=8)
        make_images(self.data / 'validation', count=4)
        self.workers = workers
        self.count = 0
        path = os.pathsep.join([str(TESTS.parent), os.environ.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / 'fault_runner.py')],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'})
        whole = self.new_run('whole')
        self.run(whole, {})
        assert self.answer['status'] == 0, self.answer['text']
        self.whole = whole
        self.events = [line for line in self._log(whole) if not line.startswith('update')]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def new_run(self, name: str | None = None) -> str:
        self.count += 1
        return name or f'run{self.count}'

    def files(self, run: str) -> Path:
        return self.folder / 'output' / 'train' / run

    def _log(self, run: str) -> list[str]:
        path = self.folder / f'{run}.log'
        return path.read_text().splitlines() if path.exists() else []

    def updates(self, run: str) -> list[int]:
        return [int(line.split()[1]) for line in self._log(run) if line.startswith('update')]

    def run(self, run: str, plan: dict, *argv: str, **options) -> int:
        """One process of a run. Returns its exit status."""
        options = {**OPTIONS, 'data_dir': self.data, 'workers': self.workers, 'experiment': run, **options}
        given = [str(part) for name, value in options.items() for part in (f'--{name.replace("_", "-")}', value)]
        job = dict(
            argv=[*given, '--model-ema', '--resume', 'auto', *argv], cwd=str(self.folder), plan=plan,
            log=str(self.folder / f'{run}.log'))
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.answer = json.loads(self.process.stdout.readline())
        return self.answer['status']

    def to_the_end(self, run: str, *plans: dict) -> Result:
        """A run with a fault in each of its first processes, then continued without any."""
        result = Result()
        for plan in (*plans, {}):
            before = self.updates(run)
            result.statuses.append(self.run(run, plan))
            result.text += self.answer['text']
            made = self.updates(run)[len(before):]
            if before and made:
                result.lost += max(before) - (made[0] - 1)
            if result.statuses[-1] == 0:
                break
        return result

    def check_same(self, run: str, best: bool = True) -> None:
        """Raise AssertionError unless the run ended as the one without faults, with the same best checkpoint."""
        whole, files = self.files(self.whole), self.files(run)
        assert (files / 'summary.csv').read_text() == (whole / 'summary.csv').read_text(), 'summary.csv differs'
        for name in ('last.pth.tar', *(['model_best.pth.tar'] if best else [])):
            states = [torch.load(folder / name, weights_only=True) for folder in (whole, files)]
            for state in states:
                state.pop('args'), state.pop('saver')  # the name of the run is in them
            same(*states, f'{name}: ')
        rest = {path.name for path in files.iterdir() if path.name.endswith('.tmp')}
        assert not rest, f'left behind: {rest}'

    def remove(self, run: str) -> None:
        shutil.rmtree(self.files(run), ignore_errors=True)


def kill_at_event(harness: Harness, rng: random.Random, kind: str, times: int = 1) -> Result:
    """A signal at an event of the run: in a step, between steps, inside of writing a checkpoint, in validation."""
    run = harness.new_run()
    plans = [dict(kill=[rng.randint(1, len(harness.events)), SIGNALS[kind]]) for _ in range(times)]
    return _ended(harness, run, harness.to_the_end(run, *plans), kind)


def kill_any_time(harness: Harness, rng: random.Random, kind: str) -> Result:
    """A signal at a random time, also while the run is being built."""
    run = harness.new_run()
    return _ended(harness, run, harness.to_the_end(run, dict(later=[rng.uniform(0, 1.2), SIGNALS[kind]])), kind)


def _ended(harness: Harness, run: str, result: Result, kind: str) -> Result:
    number = SIGNALS[kind]
    for status in result.statuses[:-1]:
        assert status in (-number, 128 + number), (result.statuses, result.text)
    assert result.statuses[-1] == 0, (result.statuses, result.text)
    stops = len(result.statuses) - 1
    if kind != 'SIGKILL':
        assert result.lost == 0, f'{result.lost} updates lost by {kind}'
    assert result.lost <= RECOVERY_INTERVAL * stops, f'{result.lost} updates lost'
    harness.check_same(run)
    return result


def damage(harness: Harness, rng: random.Random, kind: str) -> Result:
    """Checkpoints of an interrupted run are truncated, changed, deleted, or replaced by something else."""
    run = harness.new_run()
    event = rng.randint(len(harness.events) // 2, len(harness.events))
    harness.run(run, dict(kill=[event, signal.SIGKILL]))
    before = harness.updates(run)
    paths = sorted(harness.files(run).glob('*.pth.tar'), key=os.path.getmtime)
    paths = [path for path in paths if path.stat().st_size]  # one can be empty: the process was killed
    for path in rng.sample(paths, rng.randint(1, max(1, len(paths) - 1))):
        content = bytearray(path.read_bytes())
        path.unlink()  # names may share a file
        if kind == 'truncated':
            path.write_bytes(content[:rng.randrange(len(content))])
        elif kind == 'one bit changed':
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        elif kind == 'replaced by noise':
            path.write_bytes(rng.randbytes(1000))
    result = harness.to_the_end(run)
    made = harness.updates(run)[len(before):]
    result.lost = max(before) - (made[0] - 1) if made else 0
    assert result.statuses == [0], result.text
    # Where all copies of the best weights were hit they are gone, and the run has to say so.
    harness.check_same(run, best='The best checkpoint, of epoch' not in result.text)
    return result


def full_disk(harness: Harness, rng: random.Random, kind: str) -> Result:
    """From some checkpoint on there is no room."""
    run = harness.new_run()
    number = rng.randint(1, sum(event == 'before save' for event in harness.events))
    result = harness.to_the_end(run, dict(full=number))
    assert result.statuses == [1, 0], (result.statuses, result.text)
    harness.check_same(run)
    return result


def spoiled_batches(harness: Harness, rng: random.Random, kind: str) -> Result:
    """Images that are not numbers, fewer in a row than stop a run: it ends, with finite weights."""
    run = harness.new_run()
    harness.run(run, dict(nan=[rng.randint(1, 12), rng.randint(1, 3)]), max_nonfinite=4)
    text = harness.answer['text']
    assert harness.answer['status'] == 0 and 'the update is skipped' in text, text
    state = torch.load(harness.files(run) / 'last.pth.tar', weights_only=True)
    for name in ('state_dict', 'state_dict_ema'):
        assert all(value.isfinite().all() for value in state[name].values()), name
    assert 'nan' not in (harness.files(run) / 'summary.csv').read_text()
    return Result([0], 0, text)


def spoiled_run(harness: Harness, rng: random.Random, kind: str) -> Result:
    """Images that are not numbers from some batch on: the run stops, and continues where they are mended."""
    run = harness.new_run()
    status = harness.run(run, dict(nan=[rng.randint(1, 8), 100]), max_nonfinite=4)
    assert status == 1 and '4 updates in a row' in harness.answer['text'], harness.answer['text']
    for path in harness.files(run).glob('*.pth.tar'):
        state = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in state['state_dict'].values()), path
    status = harness.run(run, {})
    assert status == 0, harness.answer['text']
    return Result([1, 0], 0, harness.answer['text'])


def dead_worker(harness: Harness, rng: random.Random, kind: str) -> Result:
    """A process that loads images is killed, as by a system out of memory."""
    run = harness.new_run()
    result = harness.to_the_end(run, dict(worker=rng.randint(1, 24)))
    assert result.statuses == [1, 0], (result.statuses, result.text)
    harness.check_same(run)
    return result


# Share of each kind of fault, and what it is called in the table.
FAULTS = [
    (20, 'killed at an event (SIGKILL)', kill_at_event, 'SIGKILL'),
    (10, 'killed twice (SIGKILL)', lambda *given: kill_at_event(*given, times=2), 'SIGKILL'),
    (10, 'SIGTERM at an event', kill_at_event, 'SIGTERM'),
    (10, 'SIGINT at an event', kill_at_event, 'SIGINT'),
    (8, 'killed at a random time (SIGKILL)', kill_any_time, 'SIGKILL'),
    (4, 'SIGTERM at a random time', kill_any_time, 'SIGTERM'),
    (8, 'checkpoints truncated', damage, 'truncated'),
    (8, 'one bit of checkpoints changed', damage, 'one bit changed'),
    (4, 'checkpoints deleted', damage, 'deleted'),
    (4, 'checkpoints replaced by noise', damage, 'replaced by noise'),
    (6, 'full disk', full_disk, ''),
    (4, 'some losses not finite', spoiled_batches, ''),
    (4, 'all further losses not finite', spoiled_run, ''),
]
WORKER_FAULTS = [
    (20, 'killed at an event (SIGKILL), 2 workers', kill_at_event, 'SIGKILL'),
    (10, 'SIGTERM at an event, 2 workers', kill_at_event, 'SIGTERM'),
    (10, 'a worker killed', dead_worker, ''),
]


def study(faults: int, seed: int, table, workers: int = 0) -> tuple[dict[str, list[Result]], list[str]]:
    """Try faults.

    Args:
        faults: How many.
        seed: Of the choice.
        table: FAULTS or WORKER_FAULTS.
        workers: Loading processes of each run.

    Returns:
        Results by kind of fault; and what went wrong, a line for each fault that was not survived.
    """
    rng = random.Random(seed)
    results, failures = defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), workers)
        try:
            for number in range(faults):
                _, name, function, kind = rng.choices(table, weights=[share for share, *_ in table])[0]
                own = random.Random(f'{seed}.{number}')
                try:
                    results[name].append(function(harness, own, kind))
                except AssertionError as error:
                    failures.append(f'{name}, seed {seed}, fault {number}: {str(error)[:2000]}')
                    results[name].append(None)
                harness.remove(f'run{harness.count}')
        finally:
            harness.close()
    return results, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--faults', type=int, default=400, help='number of faults, a tenth of them with workers')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    results, failures = study(args.faults - args.faults // 10, args.seed, FAULTS)
    more, more_failures = study(args.faults // 10, args.seed, WORKER_FAULTS, workers=2)
    print('| fault | tried | survived | updates lost, mean | most |\n|---|---|---|---|---|')
    for name, all_results in sorted((results | more).items()):
        lost = [result.lost for result in all_results if result is not None]
        print(f'| {name} | {len(all_results)} | {len(lost)} | {sum(lost) / max(len(lost), 1):.2f} | '
              f'{max(lost, default=0)} |')
    print('\n'.join(failures + more_failures))
    sys.exit(bool(failures + more_failures))


if __name__ == '__main__':
    main()
