"""Dense MultiMix in the Trainer of Hugging Face Transformers, for a timm model in its TimmWrapper.

    pip install transformers accelerate
    python examples/hf_trainer.py
"""
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import random_split
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments, set_seed

from timm_multimix import MultiMixLoss, MultiMixOutput, attach


class MultiMixTrainer(Trainer):
    loss_is_scaled_for_ga = False  # the loss is a mean over the batch
    multimix = MultiMixLoss()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop('labels')
        outputs = model(**inputs)
        criterion = self.multimix if isinstance(outputs.logits, MultiMixOutput) else cross_entropy
        loss = criterion(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def accuracy(prediction):
    return {'accuracy': float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


if __name__ == '__main__':
    set_seed(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=32, mode='bilinear')
    data = [dict(pixel_values=image, labels=label) for image, label in zip(images, digits.target, strict=True)]
    train_data, validation_data = random_split(data, [0.8, 0.2])

    # With pretrained weights: TimmWrapperForImageClassification.from_pretrained('timm/resnet50.a1_in1k', num_labels=10)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(
        architecture='test_resnet', num_labels=10, model_args=dict(in_chans=1, output_stride=8)))
    attach(model.timm_model, mode='dense')
    arguments = TrainingArguments(
        output_dir='digits',
        num_train_epochs=4,
        per_device_train_batch_size=64,
        dataloader_drop_last=True,
        learning_rate=3e-3,
        weight_decay=0.05,
        report_to='none',
    )
    trainer = MultiMixTrainer(
        model, arguments, train_dataset=train_data, eval_dataset=validation_data, compute_metrics=accuracy)
    trainer.train()
    print(f'validation accuracy {100 * trainer.evaluate()["eval_accuracy"]:.1f} %')
    trainer.save_model()  # loads with from_pretrained('digits')
