"""Dense MultiMix in your own training loop: MultiMix on half of the batches, mixup on the others.

    python examples/plain_loop.py
"""
import random

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

from timm_multimix import MultiMixLoss, attach

EPOCHS = 4

random.seed(0)
torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=32, mode='bilinear')
train_data, validation_data = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
train_loader = DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True)  # Mixup needs an even batch size
validation_loader = DataLoader(validation_data, batch_size=128)

model = timm.create_model('test_resnet', num_classes=10, in_chans=1, output_stride=8)  # 4 x 4 positions
handle = attach(model, mode='dense')
criterion = MultiMixLoss()
mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * len(train_loader))

for epoch in range(EPOCHS):
    model.train()
    for images, target in train_loader:
        handle.enabled = random.random() < 0.5
        if handle.enabled:
            loss = criterion(model(images), target)
        else:
            images, target = mixup(images, target)
            loss = cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    model.eval()  # the model returns plain logits
    with torch.inference_mode():
        correct = sum((model(images).argmax(1) == target).sum().item() for images, target in validation_loader)
    print(f'epoch {epoch}: loss {loss.item():.3f}, validation accuracy {100 * correct / len(validation_data):.1f} %')

handle.remove()
torch.save(model.state_dict(), 'digits.pth')  # a plain timm checkpoint
