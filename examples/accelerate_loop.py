"""Dense MultiMix in a training loop with Accelerate, on one or several devices.

    pip install accelerate
    accelerate launch examples/accelerate_loop.py
"""
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

from timm_multimix import MultiMixLoss, attach

EPOCHS = 4

set_seed(0)
accelerator = Accelerator()
digits = load_digits()
images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=32, mode='bilinear')
train_data, validation_data = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

model = timm.create_model('test_resnet', num_classes=10, in_chans=1, output_stride=8)  # 4 x 4 positions
attach(model, mode='dense')
criterion = MultiMixLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
model, optimizer, train_loader, validation_loader = accelerator.prepare(
    model,
    optimizer,
    DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True),
    DataLoader(validation_data, batch_size=128),
)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * len(train_loader))

for epoch in range(EPOCHS):
    model.train()
    for images, target in train_loader:
        loss = criterion(model(images), target)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()

    model.eval()  # the model returns plain logits
    correct = 0
    for images, target in validation_loader:
        with torch.inference_mode():
            prediction = model(images).argmax(1)
        prediction, target = accelerator.gather_for_metrics((prediction, target))
        correct += (prediction == target).sum().item()
    accuracy = 100 * correct / len(validation_data)
    accelerator.print(f'epoch {epoch}: validation accuracy {accuracy:.1f} %')

accelerator.save(accelerator.unwrap_model(model).state_dict(), 'digits.pth')  # a plain timm checkpoint
