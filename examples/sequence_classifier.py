"""Dense MultiMix on sequences with padding: a small transformer reads handwritten digits row by row.

The sequence of an image is its first 6 to 8 rows. Shorter sequences are padded, and a mask marks the valid rows.

    python examples/sequence_classifier.py
"""
import torch
from sklearn.datasets import load_digits
from torch import nn

from timm_multimix import MultiMixLoss, MultiMixOutput, attention_map


class SequenceClassifier(nn.Module):
    def __init__(self, width=64, num_classes=10):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, rows, mask):
        features = self.encoder(self.embed(rows) + self.position, src_key_padding_mask=~mask)  # (b, r, d)
        pooled = (features * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        attention = attention_map(features, mask=mask)  # (b, r), 0 at padding
        return MultiMixOutput(self.classifier(pooled), self.classifier(features), attention)


def load():
    """Return the rows (n, 8, 8), the mask of valid rows (n, 8) and the classes (n,) of the digits."""
    digits = load_digits()
    rows = torch.tensor(digits.images, dtype=torch.float32) / 16
    lengths = torch.randint(6, 9, (len(rows), 1))
    mask = torch.arange(8) < lengths
    return rows * mask.unsqueeze(2), mask, torch.tensor(digits.target)


def main(epochs=15, batch_size=64):
    torch.manual_seed(0)
    rows, mask, target = load()
    train, validation = torch.arange(1297), torch.arange(1297, len(rows))
    model, criterion = SequenceClassifier(), MultiMixLoss(num_mixes=200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(batch_size):
            output = model(rows[batch], mask[batch])
            loss = criterion(output, target[batch], mask=mask[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        prediction = model.eval()(rows[validation], mask[validation]).logits.argmax(1)
    print(f'validation accuracy {100 * (prediction == target[validation]).float().mean():.1f} %')


if __name__ == '__main__':
    main()
