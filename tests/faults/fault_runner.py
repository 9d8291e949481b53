"""Runs train_timm.py in processes of their own, with faults arranged in them. Nothing of this is in the product.

Started as a process, it has everything imported and forks one process for each run: hundreds of runs then cost little
more than their training. It reads a JSON line for each run and answers with one.

    {"argv": [...], "cwd": "...", "log": "...", "plan": {...}}  ->  {"status": -9, "text": "..."}

The log gets a line for each event of the run, and `update N` for each update that was made. A plan may hold

    kill: [event, signal]     send this process the signal at its event of that number, counted from 1
    later: [seconds, signal]  send it the signal after a while, wherever it is
    again: seconds            and once more after that
    nan: [first, count]       images of these batches are not numbers
    full: save                the disk is full from this checkpoint on, counted from 1
    worker: count             the first worker to load so many images is killed
"""
import json
import math
import os
import resource
import signal
import sys
import threading
import traceback


class Sabotage:
    """Wraps functions of the process so that they count as events, and carries out a plan at them."""

    def __init__(self, plan: dict, log: str):
        self.plan = plan
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.process = os.getpid()
        self.events = self.saves = self.batches = self.loaded = 0

    def write(self, line: str) -> None:
        os.write(self.log, f'{line}\n'.encode())

    def event(self, name: str) -> None:
        if os.getpid() != self.process:  # a worker
            return
        self.events += 1
        self.write(name)
        number, kind = self.plan.get('kill', (0, 0))
        if self.events == number:
            os.kill(os.getpid(), kind)

    def wrap(self, owner, name: str) -> None:
        """An event before and one after a function."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.event(f'before {name}')
            result = function(*args, **kwargs)
            self.event(f'after {name}')
            return result
        setattr(owner, name, wrapped)

    def install(self) -> None:
        import torch
        from timm.scheduler.scheduler import Scheduler
        from timm.task import TrainingTask
        from torch.nn.modules import module as hooks
        from torch.optim import optimizer

        def before_forward(module, args):
            if isinstance(module, TrainingTask):
                self.event('before forward')
                return self._spoiled(*args)

        def after_forward(module, args, output):
            if isinstance(module, TrainingTask):
                self.event('after forward')
        hooks.register_module_forward_pre_hook(before_forward)
        hooks.register_module_forward_hook(after_forward)
        optimizer.register_optimizer_step_pre_hook(lambda *_: self.event('before step'))
        optimizer.register_optimizer_step_post_hook(lambda *_: self.event('after step'))
        for owner, names in (
                (torch.Tensor, ['backward']), (TrainingTask, ['update_ema']), (Scheduler, ['step_update']),
                (os, ['fsync', 'replace', 'link'])):
            for name in names:
                self.wrap(owner, name)
        self._log_updates(Scheduler)
        self._save_in_halves(torch)
        if 'worker' in self.plan:
            self._kill_worker()

    def _log_updates(self, scheduler) -> None:
        step_update = scheduler.step_update

        def logged(self_, num_updates, *args):
            step_update(self_, num_updates, *args)
            self.write(f'update {num_updates}')
        scheduler.step_update = logged

    def _spoiled(self, input, *others):
        first, count = self.plan.get('nan', (0, 0))
        self.batches += 1
        return (input * math.nan, *others) if first <= self.batches < first + count else None

    def _save_in_halves(self, torch) -> None:
        save = torch.save

        def halves(state, file):
            self.saves += 1
            if self.plan.get('full') == self.saves:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            self.event('before save')
            save(state, file)
            file.flush()
            size = file.tell()
            with open(file.name, 'rb+') as other:  # for a moment the file is half there
                other.seek(size // 2)
                rest = other.read()
                other.truncate(size // 2)
                self.event('in save')
                other.seek(size // 2)
                other.write(rest)
            self.event('after save')
        torch.save = halves

    def _kill_worker(self) -> None:
        from PIL import Image
        open_image = Image.open

        def deadly(*args, **kwargs):
            self.loaded += os.getpid() != self.process
            if self.loaded == self.plan['worker']:
                os.kill(os.getpid(), signal.SIGKILL)
            return open_image(*args, **kwargs)
        Image.open = deadly


def _run(job: dict, output: int) -> None:
    """One run, in a forked process that does not return."""
    status = 70
    try:
        os.dup2(output, 2)
        os.chdir(job['cwd'])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Sabotage(job['plan'], job['log']).install()
        from timm_multimix.training import main
        status = main(job['argv'])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _signal_later(process: int, plan: dict) -> threading.Event:
    """Send the signals of a plan from a thread, until the event that is returned is set: the process has ended."""
    ended = threading.Event()

    def send():
        delay, kind = plan['later']
        for seconds in (delay, *([plan['again']] if 'again' in plan else [])):
            if ended.wait(seconds):
                return
            os.kill(process, kind)
    if 'later' in plan:
        threading.Thread(target=send, daemon=True).start()
    return ended


def serve() -> None:
    import timm  # noqa: F401
    import torch

    from timm_multimix.training import main  # noqa: F401
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        path = job['log'] + '.stderr'
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        process = os.fork()
        if process == 0:
            _run(job, output)
        os.close(output)
        ended = _signal_later(process, job['plan'])
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # its number stays taken
        ended.set()
        _, code = os.waitpid(process, 0)
        with open(path, errors='replace') as file:
            text = file.read()
        print(json.dumps(dict(status=os.waitstatus_to_exitcode(code), text=text)), flush=True)


if __name__ == '__main__':
    serve()
