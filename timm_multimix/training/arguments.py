"""The options of train_timm.py, as tables: names, types and defaults are those of timm's training script."""
import argparse
from typing import Any, NamedTuple

from timm.data.readers.targets import TARGET_FORMATS
from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

from ..common.command_line import Parser
from ..common.errors import UsageError
from ..common.secrets import redact
from ..options import add_multimix_args
from .saved_weights import WEIGHTS

_LOSS_SCALES = ('none', 'sqrt', 'linear')


class Option(NamedTuple):
    """One option: its names, and what argparse needs to know of it."""
    names: tuple[str, ...]
    settings: dict[str, Any]


def _value(*names: str, type: type = str, default: Any = None, help: str, **settings: Any) -> Option:
    shown = '' if default in (None, '', []) else f' (default: {_shown(default)})'
    return Option(names, dict(type=type, default=default, help=(help + shown).replace('%', '%%'), **settings))


def _flag(name: str, help: str) -> Option:
    return Option((name,), dict(action='store_true', default=False, help=help.replace('%', '%%')))


def _pairs(name: str, help: str) -> Option:
    return Option((name,), dict(nargs='*', action=ParseKwargs, default={}, metavar='KEY=VALUE', help=help))


def _shown(default: Any) -> str:
    return ' '.join(f'{value:.4g}' for value in default) if isinstance(default, list) else str(default)


DATASET = (
    _value('--data-dir', metavar='DIR', help='root folder of the dataset, with a folder for each split in it'),
    _value('--dataset', default='', metavar='NAME',
           help='TYPE/NAME of a dataset (torch/, hfds/, hfids/, tfds/, wds/), or an embedded one (demo/digits, '
                'demo/glyphs, demo/letters); without it --data-dir is an image folder or a tar of one'),
    _value('--train-split', default='train', metavar='NAME', help='split to train on'),
    _value('--val-split', default='validation', metavar='NAME', help="split to validate on, '' for none"),
    _value('--train-num-samples', type=int, metavar='N',
           help='size of the training split, for streams that do not know it and demos that draw any number'),
    _value('--val-num-samples', type=int, metavar='N',
           help='size of the validation split, for streams that do not know it'),
    _flag('--dataset-download', help='download the dataset if it is missing and its reader can'),
    _value('--class-map', default='', metavar='FILE', help='file that maps class names to indices'),
    _value('--input-img-mode', metavar='MODE',
           help='PIL mode to convert images to, RGB or L if the model says nothing else'),
    _value('--input-key', metavar='KEY', help='field of a sample that holds the image'),
    _value('--target-key', metavar='KEY', help='field that holds the target; a,b,c for one yes-or-no field per class'),
    _value('--target-format', default='indices', choices=TARGET_FORMATS,
           help='multi-label targets are lists of class indices, or vectors of 0 and 1'),
    _flag('--dataset-trust-remote-code', help='let a Hugging Face dataset run code of its own; off for a reason'),
)

MODEL = (
    _value('--model', default='resnet50', metavar='MODEL', help='model to train, as timm names it'),
    _flag('--pretrained', help='start from pretrained weights'),
    _value('--pretrained-path', metavar='FILE', help='take the pretrained weights from this file, adapted like them'),
    _pairs('--pretrained-cfg-overlay', help="replace entries of the model's pretrained_cfg"),
    _value('--initial-checkpoint', default='', metavar='FILE', help='load these weights into the model, as they are'),
    _value('--resume', default='', metavar='FILE',
           help="continue from this checkpoint with all of its state; 'auto' takes the newest of --experiment and "
                "continues in place, or starts if there is none"),
    _flag('--no-resume-opt', help='leave the optimizer state out when resuming'),
    _value('--num-classes', type=int, metavar='N',
           help='classes of the model (default: those of the dataset, or of the model if that is not known)'),
    _value('--gp', metavar='POOL', help="global pooling: avg, max, avgmax, catavgmax, ... (default: the model's)"),
    _value('--img-size', type=int, metavar='N', help="side of the square input image (default: the model's)"),
    _value('--in-chans', type=int, metavar='N', help='channels of the input image (default: 3)'),
    _value('--input-size', type=int, nargs=3, metavar='N', help='input channels, height and width, e.g. 3 224 224'),
    _value('--crop-pct', type=float, metavar='PCT', help='part of the validation image that the centre crop keeps'),
    _value('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean, of each channel or one for all'),
    _value('--std', type=float, nargs='+', metavar='STD', help='pixel standard deviation, likewise'),
    _value('--interpolation', default='', metavar='NAME', help="resizing of validation images (default: the model's)"),
    _value('-b', '--batch-size', type=int, default=128, metavar='N', help='images in a batch, on each device'),
    _value('-vb', '--validation-batch-size', type=int, metavar='N',
           help='images in a validation batch (default: --batch-size)'),
    _flag('--channels-last', help='use the channels_last memory layout'),
    _value('--fuser', default='', help='TorchScript fuser: te, old or nvfuser'),
    _value('--grad-accum-steps', type=int, default=1, metavar='N', help='batches whose gradients make one update'),
    _flag('--grad-checkpointing', help='recompute activations in the backward pass to save memory'),
    _flag('--fast-norm', help='normalise in low precision where possible'),
    _pairs('--model-kwargs', help='more arguments for the model'),
    _value('--head-init-scale', type=float, help='factor on the initial weights of the classifier'),
    _value('--head-init-bias', type=float, help='initial bias of the classifier'),
    _value('--torchcompile-mode', metavar='MODE', help='mode of torch.compile'),
)

CODEGEN = (  # one of them at most
    _flag('--torchscript', help='script the model with torch.jit'),
    _value('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
           help='compile the model, with this backend (default: inductor)'),
)

DEVICE = (
    _value('--device', default='cuda', help='device to train on; without CUDA, and unless you ask for it, the CPU'),
    _flag('--amp', help='train in mixed precision'),
    _value('--amp-dtype', default='float16', help='low precision of --amp, float16 or bfloat16'),
    _value('--model-dtype', metavar='DTYPE',
           help='dtype of the model itself, without --amp: float32, float16 or bfloat16'),
    _flag('--no-ddp-bb', help="do not broadcast buffers between processes"),
    _value('--dist-timeout', type=float, default=600., metavar='SEC',
           help='seconds that processes wait for each other before they give up'),
    _flag('--synchronize-step', help='wait for the device after each update'),
    _value('--local_rank', type=int, default=0, help='set by launchers'),
    _value('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import for other device backends'),
)

OPTIMIZER = (
    _value('--opt', default='sgd', metavar='NAME', help='optimizer, as timm names it'),
    _value('--opt-eps', type=float, metavar='EPS', help="epsilon of the optimizer (default: its own)"),
    _value('--opt-betas', type=float, nargs='+', metavar='BETA', help='betas of the optimizer (default: its own)'),
    _value('--momentum', type=float, default=0.9, metavar='M', help='momentum'),
    _value('--weight-decay', type=float, default=2e-5, help='weight decay'),
    _value('--clip-grad', type=float, metavar='X', help='clip gradients at this value (default: no clipping)'),
    _value('--clip-mode', default='norm', help='what is clipped: norm, value, or agc (relative to the weights)'),
    _value('--layer-decay', type=float, help='factor of the learning rate from layer to layer, backwards'),
    _value('--layer-decay-min-scale', type=float, default=0, help='least factor of --layer-decay'),
    _value('--layer-decay-no-opt-scale', type=float, help='layers with a smaller factor are not trained'),
    _pairs('--opt-kwargs', help='more arguments for the optimizer'),
)

SCHEDULE = (
    _value('--sched', default='cosine', metavar='NAME',
           help='schedule of the learning rate: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, '
                'plateau or none'),
    _flag('--sched-on-updates', help='change the learning rate after each update, not after each epoch'),
    _value('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base and the batch size)'),
    _value('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at a batch of --lr-base-size'),
    _value('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for'),
    _value('--lr-base-scale', default='', metavar='RULE',
           help='growth with the batch size: linear or sqrt (default: what suits the optimizer)'),
    _value('--lr-noise', type=float, nargs='+', metavar='PCT',
           help='part of the run with noise on the learning rate: from, or from and to'),
    _value('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='bound of the noise'),
    _value('--lr-noise-std', type=float, default=1.0, metavar='STD', help='standard deviation of the noise'),
    _value('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='length of a cycle relative to the one before'),
    _value('--lr-cycle-decay', type=float, default=0.5, metavar='X',
           help='learning rate of a cycle relative to the one before'),
    _value('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles'),
    _value('--lr-k-decay', type=float, default=1.0, help='k of k-decay (cosine, poly)'),
    _value('--lr-decay-fn', metavar='NAME', help='decay phase of wsd and rsqrt: linear, 1-sqrt, cosine, power or exp'),
    _value('--lr-stable-timescale', type=float, metavar='N',
           help='timescale of rsqrt, in epochs (default: the warmup)'),
    _value('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate that warmup starts from'),
    _value('--min-lr', type=float, default=0, metavar='LR', help='learning rate that decay ends at'),
    _value('--epochs', type=int, default=300, metavar='N', help='epochs to train'),
    _value('--epoch-repeats', type=float, default=0., metavar='X', help='passes over a streamed dataset in one epoch'),
    _value('--start-epoch', type=int, metavar='N', help='epoch to start from, whatever the checkpoint says'),
    _value('--stop-epoch', type=int, metavar='N', help='stop after this many epochs, with the schedule of --epochs'),
    _value('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
           help='epochs of decay (multistep)'),
    _value('--decay-epochs', type=float, default=90, metavar='N',
           help='epochs between decays (step), or length of the decay phase (wsd, rsqrt), below 1 as part of the '
                'schedule; 0.2 for these if you give none'),
    _value('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warmup'),
    _flag('--warmup-prefix', help='put warmup before the schedule, not into it'),
    _value('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr after the schedule'),
    _value('--patience-epochs', type=int, default=10, metavar='N',
           help='epochs without progress before a decay (plateau)'),
    _value('--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='factor of a decay; power of poly'),
)

LOSS = (
    _value('--task', default='classification', choices=('classification', 'multilabel'),
           help='one class for an image, or any number of them'),
    _value('--loss', choices=LOSS_TYPES, help='loss (default: ce, for multilabel bce)'),
    _value('--smoothing', type=float, default=0.1, help='label smoothing; for multilabel 0 if you give none'),
    _flag('--jsd-loss', help='the same as --loss jsd'),
    _flag('--bce-loss', help='the same as --loss bce'),
    _flag('--bce-sum', help='sum binary cross-entropy over classes instead of averaging'),
    _value('--bce-target-thresh', type=float, metavar='X', help='make soft targets above this 1 and others 0 (bce)'),
    _value('--bce-pos-weight', type=float, metavar='X', help='the same as --loss-pos-weight'),
    _value('--loss-pos-weight', metavar='W',
           help='weight of positive labels (bce, asl): a number, a list 1,2,3, a file, or neg_pos with --class-stats'),
    _value('--loss-class-weight', metavar='W',
           help='weight of classes (bce, asl): likewise, or inv_freq or effective_num with --class-stats'),
    _value('--loss-weight-power', type=float, default=1.0, metavar='X', help='exponent of neg_pos and inv_freq'),
    _value('--loss-weight-beta', type=float, default=0.999, metavar='X', help='beta of effective_num'),
    _value('--loss-weight-max', type=float, metavar='X', help='bound of weights made from --class-stats'),
    _value('--class-stats', metavar='FILE',
           help="JSON with the dataset's pos_counts and num_samples, for weights and for the db loss"),
    _value('--multilabel-threshold', type=float, default=0.5, metavar='P',
           help='probability from which on a label counts as predicted'),
    _value('--asl-gamma-pos', type=float, default=1.0, help='focusing of positive labels (asl)'),
    _value('--asl-gamma-neg', type=float, default=4.0, help='focusing of negative labels (asl)'),
    _value('--asl-clip', type=float, default=0.05, help='probability margin of negative labels (asl)'),
    _value('--asl-reduction', default='batchmean', choices=('batchmean', 'sum', 'mean'), help='reduction (asl)'),
    _value('--poly-epsilon', type=float, default=2.0, help='coefficient of the polynomial term (poly)'),
    _value('--poly-gamma', type=float, default=0.0, help='focusing (multi-label poly)'),
    _value('--poly-alpha', type=float, help='balance of positive and negative labels (multi-label poly)'),
    _value('--twoway-tp', type=float, default=4.0, help='temperature of positive logits (twoway)'),
    _value('--twoway-tn', type=float, default=1.0, help='temperature of negative logits (twoway)'),
    _value('--db-neg-scale', type=float, default=2.0, help='scale of negative logits (db)'),
    _value('--db-init-bias', type=float, default=0.05, help='shift of logits by class frequency (db)'),
    _value('--db-focal-gamma', type=float, default=2.0, help='focusing (db)'),
)

AUGMENTATION = (
    _flag('--no-aug', help='no augmentation at all'),
    _value('--train-crop-mode', metavar='MODE',
           help='how training images are cropped: rrc, rkrc or rkrr (default: rrc)'),
    _value('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='area that a random crop keeps'),
    _value('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO',
           help='aspect ratio of a random crop'),
    _value('--hflip', type=float, default=0.5, help='probability of a horizontal flip'),
    _value('--vflip', type=float, default=0., help='probability of a vertical flip'),
    _value('--color-jitter', type=float, default=0.4, metavar='X', help='strength of colour jitter'),
    _value('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter (default: always)'),
    _value('--grayscale-prob', type=float, metavar='P', help='probability of a grey image'),
    _value('--gaussian-blur-prob', type=float, metavar='P', help='probability of a blurred image'),
    _value('--aa', metavar='POLICY', help='AutoAugment policy, such as v0, original, rand-m9-mstd0.5, augmix-m5-w4-d2'),
    _value('--aug-repeats', type=float, default=0, help='views of an image over all processes (distributed only)'),
    _value('--aug-splits', type=int, default=0,
           help='copies of a batch, the first without augmentation: 0, or 2 and more'),
    _value('--reprob', type=float, default=0., metavar='P', help='probability of random erasing'),
    _value('--remode', default='pixel', help='fill of random erasing: pixel, rand or const'),
    _value('--recount', type=int, default=1, help='rectangles of random erasing'),
    _flag('--resplit', help='no random erasing in the first of the --aug-splits'),
    _value('--mixup', type=float, default=0.0, help='alpha of mixup of images; above 0 it is on'),
    _value('--cutmix', type=float, default=0.0, help='alpha of CutMix; above 0 it is on'),
    _value('--cutmix-minmax', type=float, nargs='+', help='least and largest ratio of CutMix, instead of alpha'),
    _value('--mixup-prob', type=float, default=1.0, help='probability that a batch is mixed'),
    _value('--mixup-switch-prob', type=float, default=0.5, help='probability of CutMix where both are on'),
    _value('--mixup-mode', default='batch', help='what draws its own ratio: batch, pair or elem'),
    _value('--mixup-off-epoch', type=int, default=0, metavar='N',
           help='first epoch without mixup and CutMix, 0 for never'),
    _value('--train-interpolation', default='random', help='resizing of training images: random, bilinear or bicubic'),
    _value('--drop', type=float, default=0.0, metavar='P', help='dropout before the classifier'),
    _value('--drop-connect', type=float, metavar='P', help='old name of --drop-path'),
    _value('--drop-path', type=float, metavar='P', help='stochastic depth'),
    _value('--drop-block', type=float, metavar='P', help='DropBlock'),
)

BATCH_NORM = (
    _value('--bn-momentum', type=float, help='momentum of BatchNorm, for models that take it'),
    _value('--bn-eps', type=float, help='epsilon of BatchNorm, for models that take it'),
    _flag('--sync-bn', help='share BatchNorm statistics between processes in every step'),
    _value('--dist-bn', default='reduce', help="share running statistics after each epoch: broadcast, reduce or ''"),
    _flag('--split-bn', help='BatchNorm of its own for each of the --aug-splits'),
)

EMA = (
    _flag('--model-ema', help='keep an exponential moving average of the weights, and validate it'),
    _flag('--model-ema-force-cpu', help='keep it on the CPU, without validating it'),
    _value('--model-ema-decay', type=float, default=0.9998, help='its decay'),
    _flag('--model-ema-warmup', help='let its decay grow at the start'),
)

MISCELLANEOUS = (
    _value('--seed', type=int, default=42, metavar='N', help='seed of all randomness'),
    _value('--worker-seeding', default='all', help='what loader processes seed: all or part'),
    _value('--log-interval', type=int, default=50, metavar='N', help='updates between log lines'),
    _value('--val-interval', type=int, default=1, metavar='N', help='epochs between validations and checkpoints'),
    _value('--recovery-interval', type=int, default=0, metavar='N',
           help='updates between recovery checkpoints, 0 for none'),
    _value('--max-nonfinite', type=int, default=10, metavar='N',
           help='stop after this many updates in a row whose loss is not finite; they are skipped. 0 makes them, as '
                'timm does'),
    _value('--save-epochs', type=int, nargs='+', default=[], metavar='N',
           help='keep a milestone checkpoint after these many epochs'),
    _value('--calibrate', nargs='?', const='0.1', metavar='SHARE|SPLIT',
           help='at the end fit a temperature to this share of the training images, which are kept out of training '
                '(0.1 if you name none), or to a split of its own, and write model_calibrated.pth.tar beside the best: '
                'the same predictions, with probabilities to rely on'),
    _value('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep'),
    _value('-j', '--workers', type=int, default=4, metavar='N', help='processes that load data'),
    _flag('--save-images', help='save a picture of a training batch at every log line'),
    _flag('--pin-mem', help='load into pinned memory'),
    _flag('--no-prefetcher', help='normalise on the CPU instead of the device'),
    _value('--output', default='', metavar='DIR', help='folder of all runs (default: ./output/train)'),
    _value('--experiment', default='', metavar='NAME', help='folder of this run in it (default: time, model and size)'),
    _value('--eval-metric', default='top1', metavar='NAME',
           help='metric that makes the best checkpoint; for multilabel map if you give none. With an EMA teacher the '
                'best of all weights counts; student_top1, ema_top1 and teacher_top1 name some'),
    _value('--tta', type=int, default=0, metavar='N',
           help='views of a validation image that are averaged, if the dataset gives them'),
    _flag('--use-multi-epochs-loader', help='keep loader processes from epoch to epoch'),
    _flag('--log-wandb', help='log metrics to Weights & Biases'),
    _value('--wandb-project', metavar='NAME', help='its project'),
    _value('--wandb-tags', nargs='+', default=[], metavar='TAG', help='its tags'),
    _value('--wandb-resume-id', default='', metavar='ID', help='its run to continue, with --resume'),
    _value('--validate', metavar='FILE', help='validate this checkpoint and exit; nothing is trained or written'),
)

HUB = (
    _flag('--push-to-hub', help='push the model to the Hugging Face Hub. The token comes from `hf auth login` or '
                                'HF_TOKEN, never from here'),
    _value('--hub-model-id', metavar='USER/NAME',
           help='repository to push to (default: one of your own, with the name of the run folder)'),
    _value('--hub-strategy', default='every_save', choices=('end', 'every_save', 'best'),
           help='push at the end only, every checkpoint and at the end, or every new best and at the end; during '
                'training in the background, and not while the push before is still under way'),
    _flag('--hub-private-repo', help='make the repository private, if it is made now'),
    _value('--hub-revision', metavar='BRANCH', help='branch to push to (default: main)'),
    _flag('--hub-always-push', help='push every checkpoint, also if the push before is still under way'),
    _value('--hub-weights', default='best', choices=('best', *WEIGHTS),
           help='weights to push: those that gave the metric of the checkpoint (best), the trained ones, their '
                'average, or those of the teacher'),
    _flag('--hub-force', help='push over another architecture, or over weights that somebody else pushed'),
)

SCHEDULED_SIZES = (
    _value('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes to train on, one for each batch'),
    _value('--train-batch-sizes', type=int, nargs='+', metavar='N',
           help='batch size at each of them (default: --batch-size)'),
    _value('--train-size-probs', type=float, nargs='+', metavar='P',
           help='weight of each of them (default: all alike)'),
    _value('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
           help='the same all the time, or from the first to the last'),
    _value('--train-size-schedule-spread', type=float, default=0.65, metavar='X',
           help='width of the progressive window, in sizes'),
    _value('--train-size-random-mix', type=float, default=0.1, metavar='P',
           help='part of random sizes in a progressive schedule'),
    _value('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N',
           help='batches of an epoch (default: what the data gives)'),
    _value('--variable-batch-loss-scale', default='none', choices=_LOSS_SCALES,
           help='scale gradients with the batch size'),
)

NAFLEX = (
    _flag('--naflex-loader', help='train on sequences of patches of any aspect ratio (for models that take them)'),
    _value('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N',
           help='lengths of training sequences'),
    _value('--naflex-max-seq-len', type=int, default=576, metavar='N', help='length of validation sequences'),
    _value('--naflex-patch-sizes', type=int, nargs='+', metavar='N', help="sides of patches (default: the model's)"),
    _value('--naflex-patch-size-probs', type=float, nargs='+', metavar='P',
           help='probability of each of them (default: all alike)'),
    _value('--naflex-loss-scale', default='linear', choices=_LOSS_SCALES, help='scale gradients with the batch size'),
    _flag('--naflex-patchify-channels-first', help='lay patches out with channels first'),
)

DISTILLATION = (
    _value('--kd-model-name', metavar='MODEL', help='teacher to distil from, as timm names it'),
    _value('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'),
           help='distil logits, features, or through a distillation token'),
    _value('--kd-loss-type', default='kl', help='loss of logit distillation; kl is the only one'),
    _value('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation loss'),
    _value('--task-loss-weight', type=float, metavar='W',
           help='weight of the classification loss; alone, the other gets the rest of 1'),
    _value('--kd-temperature', type=float, default=4.0, metavar='T', help='temperature of both softmaxes'),
    _value('--kd-student-feature-dim', type=int, metavar='N',
           help="width of the student's features (default: found out)"),
    _value('--kd-teacher-feature-dim', type=int, metavar='N',
           help="width of the teacher's features (default: found out)"),
    _value('--kd-token-distill-type', default='soft', choices=('soft', 'hard'),
           help='targets of token distillation: probabilities or the top class'),
)

GROUPS = {
    'Dataset parameters': DATASET,
    'Model parameters': MODEL,
    'Device parameters': DEVICE,
    'Optimizer parameters': OPTIMIZER,
    'Learning rate schedule parameters': SCHEDULE,
    'Loss parameters': LOSS,
    'Augmentation and regularization parameters': AUGMENTATION,
    'Batch norm parameters': BATCH_NORM,
    'Model exponential moving average parameters': EMA,
    'Miscellaneous parameters': MISCELLANEOUS,
    'Hugging Face Hub parameters': HUB,
    'Scheduled resolution parameters': SCHEDULED_SIZES,
    'NaFlex parameters': NAFLEX,
    'Knowledge distillation parameters': DISTILLATION,
}


class _Parser(Parser):
    """Parser of train_timm.py. Its errors never repeat an access token."""

    def error(self, message: str):
        message = redact(message)
        if message.startswith('unrecognized arguments') and 'token' in message:
            raise UsageError(
                f'{message}. A token for the Hub comes from `hf auth login` or HF_TOKEN: the command line is no place '
                'for it.')
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of train_timm.py: timm's options and those of MultiMix. Its errors are UsageErrors."""
    parser = _Parser(
        prog='train_timm.py',
        usage='train_timm.py [--data-dir DIR] [--model MODEL] [--multimix {off,pooled,dense}] [OPTION ...]',
        description="Train an image classifier with timm's parts and options, and with MultiMix if you like. "
                    'Without --data-dir and --dataset it trains on digits that come along.',
        epilog='An example: train_timm.py --model resnet50 --multimix dense',
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with values for these options')
    parser.add_argument('--timm-script', metavar='FILE',
                        help="run this train.py of timm's instead, with the MultiMix options added to its own")
    parser.add_argument('data', nargs='?', metavar='DIR', help='old way to give --data-dir')
    add_multimix_args(parser)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(*option.names, **option.settings)
        if options is MODEL:
            exclusive = group.add_mutually_exclusive_group()
            for option in CODEGEN:
                exclusive.add_argument(*option.names, **option.settings)
    return parser
