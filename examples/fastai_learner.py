"""Dense MultiMix in a Learner of fastai.

    pip install fastai
    python examples/fastai_learner.py
"""
import fastai.callback.schedule  # noqa: F401  (adds fit_one_cycle to Learner)
import timm
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

from timm_multimix import MultiMixLoss, MultiMixOutput, attach

multimix = MultiMixLoss()


def loss_function(output, target):
    """MultiMix on the output of training mode, cross-entropy on the logits of evaluation mode."""
    return multimix(output, target) if isinstance(output, MultiMixOutput) else cross_entropy(output, target)


if __name__ == '__main__':
    set_seed(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=32, mode='bilinear')
    train_data, validation_data = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    loaders = DataLoaders(
        DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(validation_data, batch_size=128),
    )

    model = timm.create_model('test_resnet', num_classes=10, in_chans=1, output_stride=8)  # 4 x 4 positions
    attach(model, mode='dense')
    learner = Learner(loaders, model, loss_func=loss_function, metrics=accuracy)
    learner.fit_one_cycle(4, 3e-3)
    print(f'validation accuracy {100 * learner.validate()[1]:.1f} %')
