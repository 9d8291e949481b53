"""Dense MultiMix for segmentation: the class of every pixel of handwritten digits.

The target of a pixel is the digit if the pixel has much ink, and background if it has almost none. Pixels in between
have no target.

    python examples/segmentation.py
"""
import torch
from sklearn.datasets import load_digits
from torch import nn

from timm_multimix import MultiMixLoss, MultiMixOutput

BACKGROUND = 10
IGNORED = -100


def load():
    """Return images (n, 1, 8, 8) and the classes of their pixels (n, 8, 8)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    target = torch.tensor(digits.target).view(-1, 1, 1).expand(images.shape).clone()
    target[images < 0.5] = IGNORED
    target[images < 0.2] = BACKGROUND
    return images.unsqueeze(1), target


def build(width=32, num_blocks=4):
    """Return a network that keeps the size of the image, with a segmentation head."""
    layers = [nn.Conv2d(1, width, 3, padding=1)]
    for _ in range(num_blocks):
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, BACKGROUND + 1, 1))


def main(epochs=8, batch_size=64):
    torch.manual_seed(0)
    images, target = load()
    train, validation = torch.arange(1297), torch.arange(1297, len(images))
    model, criterion = build(), MultiMixLoss(num_mixes=200, ignore_index=IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(batch_size):
            logits = model(images[batch])  # (b, c, h, w)
            output = MultiMixOutput(logits=None, dense_logits=logits.flatten(2).mT)  # (b, h * w, c)
            loss = criterion(output, dense_target=target[batch].flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        prediction = model.eval()(images[validation]).argmax(1)
    has_target = target[validation] != IGNORED
    correct = (prediction == target[validation])[has_target]
    print(f'validation accuracy {100 * correct.float().mean():.1f} % of the pixels with a target')


if __name__ == '__main__':
    main()
