"""A network of your own learns which of its blocks an image needs: train, plug, set a budget, save, load."""

import torch
from torch import nn

import dynrl
from dynrl.backbones import FAMILIES, SkipModule
from dynrl.pretraining import Recipe


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return x + self.layers(x)  # a block keeps its input's shape, and has its shortcut inside


def network():
    blocks = nn.Sequential(*(Block(16) for _ in range(4)))
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


# A family says how files of this name are loaded: the network, and the arguments that were saved.
FAMILIES["my-network"] = lambda **config: SkipModule(network(), family="my-network", **config)
torch.manual_seed(0)
backbone = FAMILIES["my-network"](input_shape=(1, 24, 24), blocks=["1.0", "1.1", "1.2", "1.3"])

# The network is trained first, then under random routes, then the policy; `pretrain=False` leaves its weights alone.
recipe = Recipe(epochs=6, batch_size=64, learning_rate=0.1)
run = dynrl.train(backbone, "digits", out="runs/own-network", pretrain=recipe, steps=40_000)

model = dynrl.load("runs/own-network")  # as any later program does it
model.set_budget(0.8)  # of the full network's MACs, on average
images = torch.randint(256, (8, 1, 24, 24), dtype=torch.uint8)
outputs = model(model.preprocess(images))
print(outputs.argmax(1).tolist(), model.last_route.macs_fraction.tolist())
