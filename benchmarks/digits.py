#!/usr/bin/env python3
"""MultiMix against cross-entropy on real handwritten digits, at equal settings and over several seeds.

scikit-learn's 1,797 digits: 300 to train on, 500 to choose a learning rate with, the rest to test with. Every method
trains for the same epochs with the same optimizer, schedule and augmentation, at each learning rate given; the one with
the best mean validation accuracy over the seeds is reported, on the test images, as mean ± standard deviation.

    python benchmarks/digits.py                       # 64 px, 2 x 2 positions: about an hour on one core
    python benchmarks/digits.py --image-size 32       # one position, so pooled methods only: minutes

'literal' is the gradient of the papers, one option away (--no-multimix-balance, or balance=False).
"""
import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import resolve_model_input_args
from tqdm import tqdm

from timm_multimix import (
    EMATeacher,
    MultiMixLoss,
    SelfDistillationLoss,
    attach,
    manifold_mixup_weights,
    multimix_cross_entropy,
)
from timm_multimix.losses import MultiMixOutput

NUM_VALIDATION = 500


def plain(output, target):
    return F.cross_entropy(output.logits if isinstance(output, MultiMixOutput) else output, target)


def manifold_mixup(output, target):
    return multimix_cross_entropy(output, target, manifold_mixup_weights(len(target)), balance=False)


@dataclass(frozen=True)
class Method:
    """A training loss, and the form of output that it reads: 'off' for plain logits, or a mode of attach().

    With a SelfDistillationLoss there is an EMA teacher, which sees `views` augmented views of an image less one.
    """
    loss: Callable
    mode: str = 'off'
    attention: str = 'gap'
    views: int = 1


def taught(views: int = 1, mode: str = 'dense', ramp: float = 0.0, **options) -> Method:
    """Dense MultiMix with an EMA teacher. The ramp is a share of the epochs."""
    return Method(SelfDistillationLoss(MultiMixLoss(), ramp_epochs=ramp, **options), mode, views=views)


METHODS = {
    'cross-entropy': Method(plain),
    'manifold mixup': Method(manifold_mixup),
    'pooled, literal': Method(MultiMixLoss(balance=False)),
    'pooled, balanced': Method(MultiMixLoss()),
    'dense, literal': Method(MultiMixLoss(balance=False), 'dense'),
    'dense, balanced': Method(MultiMixLoss(), 'dense'),
    'dense, balanced, no pooled term': Method(MultiMixLoss(pooled_weight=0.0), 'dense'),
    'dense, balanced, pooled weight 0.25': Method(MultiMixLoss(pooled_weight=0.25), 'dense'),
    'dense, balanced, pooled weight 0.75': Method(MultiMixLoss(pooled_weight=0.75), 'dense'),
    'teacher that does not teach': taught(distill_weight=0.0),
    'teacher, 1 view': taught(),
    'teacher, 2 views': taught(views=2),
    'teacher, 2 views, ramp': taught(views=2, ramp=0.25),
    'teacher, 1 view, weight 0.5': taught(distill_weight=0.5),
    'teacher, 2 views, weight 0.5': taught(views=2, distill_weight=0.5),
    'teacher, 2 views, weight 0.5, ramp': taught(views=2, distill_weight=0.5, ramp=0.25),
    'teacher, 2 views, weight 0.5, temperature 2': taught(views=2, distill_weight=0.5, distill_temperature=2.0),
    'teacher, 2 views, weight 0.5, pooled': taught(views=2, distill_weight=0.5, mode='pooled'),
    'teacher, 2 views, weight 0.75': taught(views=2, distill_weight=0.75),
}
DEFAULT_METHODS = list(METHODS)[:7]


def split_digits(image_size: int, num_train: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 3, size, size) in [-1, 1] and labels, of the fixed training, validation and test splits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, image_size, mode='bicubic').clamp(-1, 1).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    train, rest = train_test_split(range(len(labels)), train_size=num_train, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=NUM_VALIDATION, stratify=labels[rest], random_state=0)
    return {name: (images[index], labels[index]) for name, index in
            (('train', train), ('validation', validation), ('test', test))}


def shift(images: torch.Tensor) -> torch.Tensor:
    """Shift every image by up to an eighth of its size in each direction, padding with background."""
    reach = images.shape[-1] // 8
    padded = F.pad(images, [reach] * 4, value=-1)
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2))
    size = images.shape[-1]
    return torch.stack([image[:, y:y + size, x:x + size] for image, (y, x) in zip(padded, offsets, strict=True)])


def train(method: Method, data, args: argparse.Namespace, lr: float, seed: int) -> dict[str, torch.nn.Module]:
    """The trained model, and its teacher if it has one."""
    torch.manual_seed(seed)
    model = timm.create_model(**resolve_model_input_args(args.model, dict(img_size=args.image_size)), num_classes=10)
    if method.mode != 'off':
        attach(model, method.mode, attention=method.attention)
    images, labels = data
    steps = len(labels) // args.batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    if args.opt == 'adamw':
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.epochs * steps)
    model.train()
    teacher = EMATeacher(model, args.decay) if isinstance(method.loss, SelfDistillationLoss) else None
    for epoch in range(args.epochs):
        if teacher is not None:
            method.loss.set_epoch(epoch / args.epochs)
        for batch in torch.randperm(len(labels))[:steps * args.batch_size].split(args.batch_size):
            optimizer.zero_grad()
            views = [shift(images[batch]) for _ in range(method.views)]
            lesson = [teacher(views[-1])] if teacher is not None else []
            method.loss(model(views[0]), labels[batch], *lesson).backward()
            optimizer.step()
            schedule.step()
            if teacher is not None:
                teacher.update(model)
    return {'': model.eval()} | ({', its teacher': teacher.module} if teacher is not None else {})


def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Accuracy in percent and negative log-likelihood."""
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(256)])
    return 100 * (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def mean_and_spread(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f'{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_resnet', help='timm model (default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=64, help='pixels (default: %(default)s)')
    parser.add_argument('--train-images', type=int, default=300, help='images to train on (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=40, help='epochs of every run (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=50, help='(default: %(default)s)')
    parser.add_argument('--opt', choices=('sgd', 'adamw'), default='sgd', help='(default: %(default)s)')
    parser.add_argument('--lr', type=float, nargs='+', default=[0.05, 0.1, 0.2, 0.4], help='learning rates to try')
    parser.add_argument('--decay', type=float, default=0.999, help='of an EMA teacher (default: %(default)s)')
    parser.add_argument('--weight-decay', type=float, default=5e-4, help='(default: %(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='seeds of every method (default: %(default)s)')
    parser.add_argument('--methods', nargs='+', choices=METHODS, help='default: all that the image size allows')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data = split_digits(args.image_size, args.train_images)
    names = args.methods or [m for m in DEFAULT_METHODS if args.image_size >= 64 or METHODS[m].mode != 'dense']
    runs = list(itertools.product(names, args.lr, range(args.seeds)))
    scores: dict[tuple[str, float], list] = {}
    for name, lr, seed in tqdm(runs, desc='runs', disable=None):
        for who, model in train(METHODS[name], data['train'], args, lr, seed).items():
            scores.setdefault((name + who, lr), []).append({split: evaluate(model, *data[split]) for split in data})
        if not sys.stderr.isatty():
            accuracy = scores[name, lr][-1]['validation'][0]
            print(f'{name}, lr {lr:g}, seed {seed}: validation accuracy {accuracy:.2f} %', file=sys.stderr, flush=True)
    print(f'{args.model}, {args.image_size} px, {args.train_images} training and {len(data["test"][1])} test images,'
          f' {args.epochs} epochs, {args.opt}, n = {args.seeds} seeds, lr from {args.lr} by validation accuracy\n')
    print('| method | lr | test accuracy % | test NLL |\n|---|---|---|---|')
    for name in dict.fromkeys(name for name, _ in scores):
        lr = max(args.lr, key=lambda lr: statistics.mean(run['validation'][0] for run in scores[name, lr]))
        accuracy, nll = zip(*(run['test'] for run in scores[name, lr]), strict=True)
        print(f'| {name} | {lr:g} | {mean_and_spread(accuracy, 2)} | {mean_and_spread(nll, 3)} |')


if __name__ == '__main__':
    main()
