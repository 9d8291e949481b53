"""Command-line options of `timm-multimix train`. Names, types and defaults follow timm's training script."""
import os

from timm.data.readers.targets import TARGET_FORMATS
from timm.loss import LOSS_TYPES

from .option import Group
from .option import flag as _flag
from .option import pairs as _pairs
from .option import value as _value
from .saved_weights import WEIGHTS

DEFAULT_OUTPUT = os.path.join('output', 'train')
_LOSS_SCALES = ('none', 'sqrt', 'linear')

_DATASET = Group('Dataset parameters', (
    _value('data', nargs='?', metavar='DIR', help='deprecated, use --data-dir'),
    _value('--data-dir', metavar='DIR', help='root folder of the dataset, with one subfolder per split'),
    _value('--dataset', default='', metavar='NAME',
           help='dataset as TYPE/NAME (torch/, hfds/, hfids/, tfds/, wds/), or an embedded dataset (demo/digits, '
                'demo/glyphs, demo/letters); without it, --data-dir is an image folder or a tar file'),
    _value('--train-split', default='train', metavar='NAME', help='training split'),
    _value('--val-split', default='validation', metavar='NAME', help="validation split, '' for no validation"),
    _value('--train-num-samples', type=int, metavar='N', help='size of a streamed or generated training split'),
    _value('--val-num-samples', type=int, metavar='N', help='size of a streamed or generated validation split'),
    _flag('--dataset-download', help='download the dataset if it is missing and supports downloads'),
    _value('--class-map', default='', metavar='FILE', help='file that maps class names to indices'),
    _value('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB for 3 channels, else L)'),
    _value('--input-key', metavar='KEY', help='dataset field with the image'),
    _value('--target-key', metavar='KEY', help='dataset field with the target; a,b,c for one binary field per class'),
    _value('--target-format', default='indices', choices=TARGET_FORMATS,
           help='format of multi-label targets: lists of class indices, or vectors of 0 and 1 (multihot)'),
    _flag('--dataset-trust-remote-code', help='allow a Hugging Face dataset that you trust to run its own code'),
))

_MODEL = Group('Model parameters', (
    _value('--model', default='resnet50', metavar='MODEL', help='name of the timm model'),
    _flag('--pretrained', help='start from pretrained weights'),
    _value('--pretrained-path', metavar='FILE', help='load this file as the pretrained weights, adapted to the model'),
    _pairs('--pretrained-cfg-overlay', help="replace entries of the model's pretrained_cfg"),
    _value('--initial-checkpoint', default='', metavar='FILE', help='load these weights, without adaptation'),
    _value('--resume', default='', metavar='FILE',
           help="continue from this checkpoint with its full training state; 'auto' continues the newest checkpoint of "
                "--experiment in the same folder, or starts a new run if there is none"),
    _flag('--no-resume-opt', help='do not restore the optimizer state when resuming'),
    _value('--num-classes', type=int, metavar='N',
           help='number of classes (default: from the dataset if known, else from the model)'),
    _value('--gp', metavar='POOL', help="global pooling: avg, max, avgmax, catavgmax, ... (default: the model's)"),
    _value('--img-size', type=int, metavar='N', help="height and width of the input image (default: the model's)"),
    _value('--in-chans', type=int, metavar='N', help="number of input channels (default: the model's, usually 3)"),
    _value('--input-size', type=int, nargs=3, metavar='N', help='input channels, height and width, e.g. 3 224 224'),
    _value('--crop-pct', type=float, metavar='PCT', help='fraction of the validation image kept by the center crop'),
    _value('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean, one or one per channel'),
    _value('--std', type=float, nargs='+', metavar='STD', help='pixel standard deviation, one or one per channel'),
    _value('--interpolation', default='', metavar='NAME', help="resizing of validation images (default: the model's)"),
    _value('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size per device'),
    _value('-vb', '--validation-batch-size', type=int, metavar='N',
           help='validation batch size (default: --batch-size)'),
    _flag('--channels-last', help='use the channels_last memory layout'),
    _value('--fuser', default='', help='TorchScript fuser: te, old or nvfuser'),
    _value('--grad-accum-steps', type=int, default=1, metavar='N', help='batches of gradient accumulation per update'),
    _flag('--grad-checkpointing', help='recompute activations in the backward pass to save memory'),
    _flag('--fast-norm', help='compute normalization layers in low precision where possible'),
    _pairs('--model-kwargs', help='additional keyword arguments of the model'),
    _value('--head-init-scale', type=float, help='scale factor for the initial weights and biases of the classifier'),
    _value('--head-init-bias', type=float, help='initial bias of the classifier'),
    _value('--torchcompile-mode', metavar='MODE', help='mode of torch.compile'),
    _flag('--torchscript', help='script the model with torch.jit'),
    _value('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
           help='compile the model with this torch.compile backend (default: inductor)'),
))

_DEVICE = Group('Device parameters', (
    _value('--device', default='cuda', help='training device; without this option, the CPU if CUDA is unavailable'),
    _flag('--amp', help='use automatic mixed precision'),
    _value('--amp-dtype', default='float16', help='lower-precision dtype of --amp: float16 or bfloat16'),
    _value('--model-dtype', metavar='DTYPE', help='dtype of the weights: float32, float16 or bfloat16'),
    _flag('--no-ddp-bb', help="do not broadcast buffers between processes"),
    _value('--dist-timeout', type=float, default=600., metavar='SEC', help='timeout between processes in seconds'),
    _flag('--synchronize-step', help='synchronize the device after each update'),
    _value('--local_rank', type=int, default=0, help='set by launchers'),
    _value('--device-modules', nargs='+', metavar='MODULE', help='Python modules of other device backends to import'),
))

_OPTIMIZER = Group('Optimizer parameters', (
    _value('--opt', default='sgd', metavar='NAME', help='name of the timm optimizer'),
    _value('--opt-eps', type=float, metavar='EPS', help="optimizer epsilon (default: the optimizer's)"),
    _value('--opt-betas', type=float, nargs='+', metavar='BETA', help="optimizer betas (default: the optimizer's)"),
    _value('--momentum', type=float, default=0.9, metavar='M', help='optimizer momentum'),
    _value('--weight-decay', type=float, default=2e-5, help='weight decay'),
    _value('--clip-grad', type=float, metavar='X', help='gradient clipping value (default: no clipping)'),
    _value('--clip-mode', default='norm', help='gradient clipping mode: norm, value, or agc (relative to the weights)'),
    _value('--layer-decay', type=float, help='learning rate factor per layer, from the last layer to the first'),
    _value('--layer-decay-min-scale', type=float, default=0, help='minimum learning rate factor of --layer-decay'),
    _value('--layer-decay-no-opt-scale', type=float, help='freeze layers with a smaller --layer-decay factor'),
    _pairs('--opt-kwargs', help='additional keyword arguments of the optimizer'),
))

_SCHEDULE = Group('Learning rate schedule parameters', (
    _value('--sched', default='cosine', metavar='NAME',
           help='learning rate schedule: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, '
                'plateau or none'),
    _flag('--sched-on-updates', help='step the learning rate schedule after each update instead of each epoch'),
    _value('--lr', type=float, metavar='LR', help='learning rate (default: --lr-base scaled with the batch size)'),
    _value('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at the batch size --lr-base-size'),
    _value('--lr-base-size', type=int, default=256, metavar='N', help='reference batch size of --lr-base'),
    _value('--lr-base-scale', default='', metavar='RULE',
           help='scaling of --lr-base with the batch size: linear or sqrt (default: sqrt for Ada* and LAMB)'),
    _value('--lr-noise', type=float, nargs='+', metavar='PCT',
           help='fraction of the run at which learning rate noise starts, or starts and ends'),
    _value('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='limit of the learning rate noise'),
    _value('--lr-noise-std', type=float, default=1.0, metavar='STD', help='standard deviation of this noise'),
    _value('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='factor of the length of successive cycles'),
    _value('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='learning rate factor of successive cycles'),
    _value('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles'),
    _value('--lr-k-decay', type=float, default=1.0, help='exponent k of k-decay (cosine, poly)'),
    _value('--lr-decay-fn', metavar='NAME', help='decay phase of wsd and rsqrt: linear, 1-sqrt, cosine, power or exp'),
    _value('--lr-stable-timescale', type=float, metavar='N', help='rsqrt timescale, in epochs (default: warmup)'),
    _value('--warmup-lr', type=float, default=1e-5, metavar='LR', help='initial learning rate of the warmup'),
    _value('--min-lr', type=float, default=0, metavar='LR', help='minimum learning rate'),
    _value('--epochs', type=int, default=300, metavar='N', help='number of epochs'),
    _value('--epoch-repeats', type=float, default=0., metavar='X', help='passes over a streamed dataset per epoch'),
    _value('--start-epoch', type=int, metavar='N', help='first epoch, instead of that of the checkpoint'),
    _value('--stop-epoch', type=int, metavar='N', help='stop after this many epochs, with the schedule of --epochs'),
    _value('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
           help='epochs at which the learning rate decays (multistep)'),
    _value('--decay-epochs', type=float, default=90, metavar='N',
           help='epochs between decays (step), or length of the decay phase (wsd, rsqrt; a value below 1 is a '
                'fraction of the schedule). wsd and rsqrt use 0.2 unless this option is given'),
    _value('--warmup-epochs', type=int, default=5, metavar='N', help='number of warmup epochs'),
    _flag('--warmup-prefix', help='add the warmup before the schedule instead of including it'),
    _value('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr after the schedule'),
    _value('--patience-epochs', type=int, default=10, metavar='N', help='epochs without improvement (plateau)'),
    _value('--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='factor of each decay; power of poly'),
))

_LOSS = Group('Loss parameters', (
    _value('--task', default='classification', choices=('classification', 'multilabel'),
           help='one class per image, or any number of labels per image'),
    _value('--loss', choices=LOSS_TYPES, help='loss (default: ce, or bce for multilabel)'),
    _value('--smoothing', type=float, default=0.1, help='label smoothing; for multilabel 0 unless given'),
    _flag('--jsd-loss', help='same as --loss jsd'),
    _flag('--bce-loss', help='same as --loss bce'),
    _flag('--bce-sum', help='sum binary cross-entropy over classes instead of averaging'),
    _value('--bce-target-thresh', type=float, metavar='X', help='threshold that binarizes soft targets (bce)'),
    _value('--bce-pos-weight', type=float, metavar='X', help='same as --loss-pos-weight'),
    _value('--loss-pos-weight', metavar='W',
           help='weight of positive labels (bce, asl): a number, a list 1,2,3, a file, or neg_pos with --class-stats'),
    _value('--loss-class-weight', metavar='W',
           help='class weight (bce, asl): a number, a list, a file, or inv_freq or effective_num with --class-stats'),
    _value('--loss-weight-power', type=float, default=1.0, metavar='X', help='exponent of neg_pos and inv_freq'),
    _value('--loss-weight-beta', type=float, default=0.999, metavar='X', help='beta of effective_num'),
    _value('--loss-weight-max', type=float, metavar='X', help='maximum of the weights computed from --class-stats'),
    _value('--class-stats', metavar='FILE',
           help="JSON file with the dataset's pos_counts and num_samples, for class weights and the db loss"),
    _value('--multilabel-threshold', type=float, default=0.5, metavar='P', help='probability threshold of labels'),
    _value('--asl-gamma-pos', type=float, default=1.0, help='focusing parameter of positive labels (asl)'),
    _value('--asl-gamma-neg', type=float, default=4.0, help='focusing parameter of negative labels (asl)'),
    _value('--asl-clip', type=float, default=0.05, help='probability margin of negative labels (asl)'),
    _value('--asl-reduction', default='batchmean', choices=('batchmean', 'sum', 'mean'), help='reduction (asl)'),
    _value('--poly-epsilon', type=float, default=2.0, help='coefficient of the polynomial term (poly)'),
    _value('--poly-gamma', type=float, default=0.0, help='focusing parameter (multi-label poly)'),
    _value('--poly-alpha', type=float, help='balance of positive and negative labels (multi-label poly)'),
    _value('--twoway-tp', type=float, default=4.0, help='temperature of positive logits (twoway)'),
    _value('--twoway-tn', type=float, default=1.0, help='temperature of negative logits (twoway)'),
    _value('--db-neg-scale', type=float, default=2.0, help='scale of negative logits (db)'),
    _value('--db-init-bias', type=float, default=0.05, help='shift of logits by class frequency (db)'),
    _value('--db-focal-gamma', type=float, default=2.0, help='focusing parameter (db)'),
))

_AUGMENTATION = Group('Augmentation and regularization parameters', (
    _flag('--no-aug', help='disable all training augmentation'),
    _value('--train-crop-mode', metavar='MODE', help='crop mode of training images: rrc, rkrc or rkrr (default: rrc)'),
    _value('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='area range of a random crop'),
    _value('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO',
           help='aspect ratio range of a random crop'),
    _value('--hflip', type=float, default=0.5, help='probability of a horizontal flip'),
    _value('--vflip', type=float, default=0., help='probability of a vertical flip'),
    _value('--color-jitter', type=float, default=0.4, metavar='X', help='strength of color jitter'),
    _value('--color-jitter-prob', type=float, metavar='P', help='probability of color jitter (default: always)'),
    _value('--grayscale-prob', type=float, metavar='P', help='probability of grayscale conversion'),
    _value('--gaussian-blur-prob', type=float, metavar='P', help='probability of Gaussian blur'),
    _value('--aa', metavar='POLICY', help='AutoAugment policy, such as v0, original, rand-m9-mstd0.5, augmix-m5-w4-d2'),
    _value('--aug-repeats', type=float, default=0, help='repetitions of each image (distributed training only)'),
    _value('--aug-splits', type=int, default=0,
           help='views of each image: 0, or 2 or more; the first view is only cropped and flipped'),
    _value('--reprob', type=float, default=0., metavar='P', help='probability of random erasing'),
    _value('--remode', default='pixel', help='random erasing mode: pixel, rand or const'),
    _value('--recount', type=int, default=1, help='number of random erasing rectangles'),
    _flag('--resplit', help='no random erasing in the first view of --aug-splits'),
    _value('--mixup', type=float, default=0.0, help='alpha of image mixup, 0 to disable it'),
    _value('--cutmix', type=float, default=0.0, help='alpha of CutMix, 0 to disable it'),
    _value('--cutmix-minmax', type=float, nargs='+', help='minimum and maximum CutMix ratio, instead of alpha'),
    _value('--mixup-prob', type=float, default=1.0, help='probability of mixup or CutMix'),
    _value('--mixup-switch-prob', type=float, default=0.5, help='probability of CutMix if both are enabled'),
    _value('--mixup-mode', default='batch', help='unit that draws a mixing ratio: batch, pair or elem (image)'),
    _value('--mixup-off-epoch', type=int, default=0, metavar='N',
           help='first epoch without mixup and CutMix, 0 to keep them on'),
    _value('--train-interpolation', default='random', help='resizing of training images: random, bilinear or bicubic'),
    _value('--drop', type=float, default=0.0, metavar='P', help='dropout rate of the classifier'),
    _value('--drop-connect', type=float, metavar='P', help='deprecated, use --drop-path'),
    _value('--drop-path', type=float, metavar='P', help='stochastic depth rate'),
    _value('--drop-block', type=float, metavar='P', help='DropBlock rate'),
))

_BATCH_NORM = Group('Batch norm parameters', (
    _value('--bn-momentum', type=float, help='BatchNorm momentum, for models that support it'),
    _value('--bn-eps', type=float, help='BatchNorm epsilon, for models that support it'),
    _flag('--sync-bn', help='use synchronized BatchNorm'),
    _value('--dist-bn', default='reduce', help="sync of running statistics after each epoch: broadcast, reduce or ''"),
    _flag('--split-bn', help='use separate BatchNorm layers for each of the --aug-splits'),
))

_EMA = Group('Model exponential moving average parameters', (
    _flag('--model-ema', help='track and validate an exponential moving average (EMA) of the weights'),
    _flag('--model-ema-force-cpu', help='keep the EMA on the CPU and do not validate it'),
    _value('--model-ema-decay', type=float, default=0.9998, help='EMA decay'),
    _flag('--model-ema-warmup', help='increase the EMA decay gradually at the start'),
))

_MISCELLANEOUS = Group('Miscellaneous parameters', (
    _value('--seed', type=int, default=42, metavar='N', help='random seed'),
    _value('--worker-seeding', default='all', help='random generators seeded in loader workers: all or part'),
    _value('--log-interval', type=int, default=50, metavar='N', help='updates between log messages'),
    _value('--val-interval', type=int, default=1, metavar='N', help='epochs between validations and checkpoints'),
    _value('--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints'),
    _value('--max-nonfinite', type=int, default=10, metavar='N',
           help='stop after this many consecutive updates with a non-finite loss, which are skipped; 0 applies all '
                'updates, as timm does'),
    _value('--save-epochs', type=int, nargs='+', default=[], metavar='N', help='epochs with a milestone checkpoint'),
    _value('--calibrate', nargs='?', const='0.1', metavar='SHARE|SPLIT',
           help='after training, fit a temperature on this share of the training images, which is held out from '
                'training (0.1 without a value), or on this split, and write model_calibrated.pth.tar: the same '
                'predictions with calibrated probabilities'),
    _value('--checkpoint-hist', type=int, default=10, metavar='N', help='number of checkpoints to keep'),
    _value('-j', '--workers', type=int, default=4, metavar='N', help='number of data loading processes'),
    _flag('--save-images', help='save the images of a training batch at every log message'),
    _flag('--pin-mem', help='use pinned memory in the data loader'),
    _flag('--no-prefetcher',
          help='normalize images on the CPU instead of the device, and mix them on the device instead of the CPU'),
    _value('--output', default='', metavar='DIR', help='parent folder of the runs (default: ./output/train)'),
    _value('--experiment', default='', metavar='NAME', help='run folder in --output (default: time, model and size)'),
    _value('--eval-metric', default='top1', metavar='NAME',
           help='metric that selects the best checkpoint; multilabel uses map unless this option is given. '
                'teacher_top1 is the same as top1 with --eval-weights teacher'),
    _value('--eval-weights', choices=WEIGHTS,
           help='weights that select the best checkpoint by their metric: the trained weights (student), their average '
                '(ema), or the weights of an EMA teacher (teacher). The best checkpoint is pushed and calibrated with '
                'these weights (default: ema with --model-ema, else teacher with an EMA teacher, else student)'),
    _value('--tta', type=int, default=0, metavar='N',
           help='number of views of a validation image to average, if the dataset returns several'),
    _flag('--use-multi-epochs-loader', help='keep data loading processes alive between epochs'),
    _value('--report-to', nargs='+', default=[], choices=('wandb', 'tensorboard', 'trackio'), metavar='NAME',
           help='report the metrics of every epoch to wandb (Weights & Biases), tensorboard (in the run folder) or '
                'trackio'),
    _flag('--log-wandb', help='same as --report-to wandb'),
    _value('--wandb-project', metavar='NAME', help='Weights & Biases project'),
    _value('--wandb-tags', nargs='+', default=[], metavar='TAG', help='Weights & Biases tags'),
    _value('--wandb-resume-id', default='', metavar='ID', help='Weights & Biases run to continue, with --resume'),
    _flag('--dry-run', help='check options, data and model, print the options as a recipe, and write no files'),
    _value('--validate', metavar='FILE', help='validate this checkpoint and exit, without training or writing files'),
))

_HUB = Group('Hugging Face Hub parameters', (
    _flag('--push-to-hub', help='push the model to the Hugging Face Hub; log in with `hf auth login` or set HF_TOKEN'),
    _value('--hub-model-id', metavar='USER/NAME',
           help='repository to push to (default: the name of the run folder, in your account)'),
    _value('--hub-strategy', default='every_save', choices=('end', 'every_save', 'best'),
           help='push at the end only, or also every checkpoint (every_save) or every new best one (best). Pushes '
                'during training run in the background and are skipped while another push is running'),
    _flag('--hub-private-repo', help='create the repository as private'),
    _value('--hub-revision', metavar='BRANCH', help='branch to push to (default: main)'),
    _flag('--hub-always-push', help='push every checkpoint, even while another push is running'),
    _value('--hub-weights', default='best', choices=('best', *WEIGHTS),
           help='weights to push: the weights with the metric of the checkpoint (best), the trained weights (student), '
                'their average (ema), or the teacher weights (teacher)'),
    _flag('--hub-force', help='overwrite another architecture, or weights pushed by somebody else'),
))

_SCHEDULED_SIZES = Group('Scheduled resolution parameters', (
    _value('--train-img-sizes', type=int, nargs='+', metavar='N', help='training image sizes, one per batch'),
    _value('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each image size'),
    _value('--train-size-probs', type=float, nargs='+', metavar='P', help='weight of each image size'),
    _value('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
           help='sampling of sizes: constant, or progressive from the first to the last'),
    _value('--train-size-schedule-spread', type=float, default=0.65, metavar='X',
           help='standard deviation of the progressive window, in sizes'),
    _value('--train-size-random-mix', type=float, default=0.1, metavar='P', help='fraction of random sizes'),
    _value('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches per epoch'),
    _value('--variable-batch-loss-scale', default='none', choices=_LOSS_SCALES,
           help='gradient scaling with the batch size'),
))

_NAFLEX = Group('NaFlex parameters', (
    _flag('--naflex-loader', help='train on patch sequences of any aspect ratio (for NaFlex models)'),
    _value('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N',
           help='training sequence lengths'),
    _value('--naflex-max-seq-len', type=int, default=576, metavar='N', help='maximum validation sequence length'),
    _value('--naflex-patch-sizes', type=int, nargs='+', metavar='N', help="patch sizes (default: the model's)"),
    _value('--naflex-patch-size-probs', type=float, nargs='+', metavar='P', help='probability of each patch size'),
    _value('--naflex-loss-scale', default='linear', choices=_LOSS_SCALES, help='gradient scaling with the batch size'),
    _flag('--naflex-patchify-channels-first', help='flatten patches with the channels first'),
))

_DISTILLATION = Group('Knowledge distillation parameters', (
    _value('--kd-model-name', metavar='MODEL', help='name of the timm model to use as the distillation teacher'),
    _value('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'),
           help='distillation of logits, of features, or with a distillation token'),
    _value('--kd-loss-type', default='kl', help='logit distillation loss; only kl is supported'),
    _value('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation loss'),
    _value('--task-loss-weight', type=float, metavar='W',
           help='weight of the classification loss; without --distill-loss-weight, that weight is 1 minus this one'),
    _value('--kd-temperature', type=float, default=4.0, metavar='T', help='softmax temperature of student and teacher'),
    _value('--kd-student-feature-dim', type=int, metavar='N', help='student feature dimension (default: detected)'),
    _value('--kd-teacher-feature-dim', type=int, metavar='N', help='teacher feature dimension (default: detected)'),
    _value('--kd-token-distill-type', default='soft', choices=('soft', 'hard'),
           help='targets of token distillation: probabilities (soft) or the top class (hard)'),
))

GROUPS = (
    _DATASET, _MODEL, _DEVICE, _OPTIMIZER, _SCHEDULE, _LOSS, _AUGMENTATION, _BATCH_NORM,
    _EMA, _MISCELLANEOUS, _HUB, _SCHEDULED_SIZES, _NAFLEX, _DISTILLATION,
)
