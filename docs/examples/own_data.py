"""A data set of your own: any torch `Dataset` of pairs, read with its transforms; its class names come along."""

import torch
from torch.utils.data import Dataset

import dynrl
from dynrl.backbones import ExitResNet
from dynrl.evaluation import report_text
from dynrl.pretraining import Recipe


class Stripes(Dataset):
    """Images of stripes in noise; others would open files here, which may be larger than memory."""

    classes = ("lying", "standing", "rising", "falling")

    def __len__(self):
        return 1500

    def __getitem__(self, i):
        generator, label = torch.Generator().manual_seed(i), i % 4
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        stripes = (y, x, x + y, x - y)[label].sin()
        noise = torch.randn(3, 16, 16, generator=generator) * torch.rand(1, generator=generator)
        return ((stripes + noise) * 40 + 128).clamp(0, 255).to(torch.uint8), label


backbone = ExitResNet((3, 16, 16), classes=4, layers=(1, 1), widths=(8, 16), exits=(0,))
# For weights that were trained elsewhere, say what they want: weights.transforms(), or a mean and a deviation.
backbone.standardised_by(((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
recipe = Recipe(epochs=3, batch_size=64)
run = dynrl.train(backbone, Stripes(), out="runs/own-data", pretrain=recipe, steps=10_000, price_range=(0.01, 10.0))

report = dynrl.evaluate(run, out=run.path, budgets=(0.8,))  # on the tenth that is kept for the test
print(report_text(report))
raw = torch.stack([Stripes()[i][0] for i in range(8)])  # uint8, as a camera gives them
print([run.model.classes[k] for k in run.model(run.model.preprocess(raw)).argmax(1)])
