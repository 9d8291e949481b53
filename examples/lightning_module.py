"""Dense MultiMix in a LightningModule.

    pip install lightning
    python examples/lightning_module.py
"""
import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

from timm_multimix import MultiMixLoss, attach


class MultiMixClassifier(lightning.LightningModule):
    def __init__(self, learning_rate: float = 3e-3, **model_options):
        super().__init__()
        self.learning_rate = learning_rate
        self.model = timm.create_model(**model_options)
        self.criterion = MultiMixLoss()
        attach(self.model, mode='dense')

    def training_step(self, batch, batch_index):
        images, target = batch
        output = self.model(images)  # a MultiMixOutput
        self.log('train_accuracy', (output.logits.argmax(1) == target).float().mean())
        return self.criterion(output, target)

    def validation_step(self, batch, batch_index):
        images, target = batch
        logits = self.model(images)  # plain logits, because the model is in evaluation mode
        self.log('accuracy', (logits.argmax(1) == target).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.trainer.estimated_stepping_batches)
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}


if __name__ == '__main__':
    lightning.seed_everything(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=32, mode='bilinear')
    train_data, validation_data = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

    classifier = MultiMixClassifier(model_name='test_resnet', num_classes=10, in_chans=1, output_stride=8)
    trainer = lightning.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(
        classifier,
        DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(validation_data, batch_size=128),
    )
    print(f'validation accuracy {100 * trainer.callback_metrics["accuracy"].item():.1f} %')
