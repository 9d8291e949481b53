"""Attach MultiMix to every architecture of the installed timm and write backbones.md.

    python docs/generate_backbones.py

The models are on the meta device, where a forward pass costs no arithmetic; what a head does with its input is found on
the CPU, with random parameters. About 15 minutes.
"""
import collections
import pathlib
from dataclasses import dataclass

import timm
import torch
from tqdm import tqdm

from timm_multimix import attach

TABLE = pathlib.Path(__file__).with_name('backbones.md')
INTRODUCTION = """\
# Backbones

What MultiMix does with each model module of timm {version}. Made by `python docs/generate_backbones.py`, which attaches
to every architecture and runs it in training mode at its native image size: do not edit by hand.

- **Architectures**: those of the module that classify.{excluded}
- **Pooled**, **dense**: how many of them `attach` takes in that mode.
- **Positions**: of the feature map at the native image size, from the smallest to the largest.
- **Head**: how it is applied at a position. *Classifier*: one matrix product over all positions. *Head*: the model's
  own `forward_head`, on maps of one position. *Whole map*: the same, on maps that hold the position's vector
  everywhere, because the head treats its positions differently (position embeddings in its attention pooling): slow, it
  costs the head once for every position. *Window*: every window of the head's convolution is a position; at the native
  size there is one, and dense MultiMix is then pooled MultiMix.
- **Class token**: the prediction comes from a class token, so the dense loss does not train all that the model predicts
  with: `handle.reads_positions` is False, and the pooled loss has to be part of the objective, as `MultiMixTask` makes
  it.

| module | architectures | pooled | dense | positions | head | class token |
|---|---|---|---|---|---|---|
"""
METHODS = {'classifier': 'classifier', 'single': 'head', 'whole': 'whole map', 'window': 'window'}


@dataclass(frozen=True)
class Result:
    """What became of one architecture.

    Attributes:
        name: The architecture.
        module: timm's module that it is in.
        classifies: Whether it has a classifier at all.
        pooled: Whether attach takes it in pooled mode.
        positions: Positions at the native size in dense mode, None if attach refuses.
        method: How the head is applied, None if attach refuses.
        reads_positions: Whether the prediction comes from the positions alone.
        reason: Why attach refuses dense mode.
    """
    name: str
    module: str
    classifies: bool = True
    pooled: bool = False
    positions: int | None = None
    method: str | None = None
    reads_positions: bool = True
    reason: str | None = None


def _train_output(model: torch.nn.Module):
    return model.train()(torch.empty(2, *model.pretrained_cfg['input_size'], device='meta'))


def try_architecture(name: str, module: str) -> Result:
    """Attach to one architecture on the meta device and run it."""
    try:
        model = timm.create_model(name, num_classes=7, device='meta')
        attach(model, 'pooled').remove()
    except (ValueError, NotImplementedError, AssertionError):
        return Result(name, module, classifies=False)
    try:
        handle = attach(model, attention='uniform')
    except ValueError as error:
        attach(model, 'pooled')
        return Result(name, module, pooled=_train_output(model).logits.shape == (2, 7), reason=str(error))
    output = _train_output(model)
    positions = output.dense_logits.shape[1]
    assert output.dense_logits.shape == (2, positions, 7)
    return Result(
        name, module,
        pooled=output.logits.shape == (2, 7),
        positions=positions,
        method=model._multimix.head.method,
        reads_positions=handle.reads_positions)


def architectures() -> list[tuple[str, str]]:
    """Name and module of every architecture of the installed timm."""
    modules = sorted(timm.list_modules())
    return [(name, module) for module in modules for name in timm.list_models(module=module)]


def _row(module: str, results: list[Result]) -> str:
    dense = [result for result in results if result.positions]
    counts = sorted({result.positions for result in dense})
    positions = f'{counts[0]}' if len(counts) == 1 else f'{counts[0]} to {counts[-1]}' if counts else ''
    methods = collections.Counter(result.method for result in dense).most_common()
    head = ', '.join(METHODS[method] + (f' ({n})' if len(methods) > 1 else '') for method, n in methods)
    tokens = sum(not result.reads_positions for result in dense)
    token = '' if not tokens else 'yes' if tokens == len(dense) else str(tokens)
    refused = collections.Counter(result.reason for result in results if result.reason)
    head = '; '.join([head] * bool(head) + [f'{n} refused: {reason}' for reason, n in refused.items()])
    pooled = sum(result.pooled for result in results)
    return f'| {module} | {len(results)} | {pooled} | {len(dense)} | {positions} | {head} | {token} |'


def render(results: list[Result]) -> str:
    """The whole of backbones.md."""
    by_module = collections.defaultdict(list)
    for result in results:
        if result.classifies:
            by_module[result.module].append(result)
    excluded = collections.Counter(result.module for result in results if not result.classifies)
    excluded = '\n  Encoders without a classifier are left out: ' + ', '.join(
        f'{n} of {module}' for module, n in sorted(excluded.items())) + '.' if excluded else ''
    rows = [_row(module, by_module[module]) for module in sorted(by_module)]
    kept = [result for group in by_module.values() for result in group]
    total = (
        f'| **{len(by_module)} modules** | {len(kept)} | {sum(r.pooled for r in kept)} | '
        f'{sum(r.positions is not None for r in kept)} | | | |')
    return INTRODUCTION.format(version=timm.__version__, excluded=excluded) + '\n'.join([*rows, total]) + '\n'


def main() -> None:
    """Write the table."""
    results = [try_architecture(name, module) for name, module in tqdm(architectures())]
    TABLE.write_text(render(results))


if __name__ == '__main__':
    main()
