"""Networks of your own, small and large: the policy decides which one looks at an input, and when the next is asked."""

import torch
from torch import nn

import dynrl
from dynrl.backbones import Models
from dynrl.data import load_dataset


def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


# Two networks that are trained already: here at once, elsewhere they come from a file.
torch.manual_seed(0)
digits = load_dataset("digits").for_backbone.train  # standardised, and without the inputs that policies learn on
networks = [network(4), network(32)]
for each in networks:
    optimizer = torch.optim.Adam(each.parameters(), 0.003)
    for _ in range(300):
        rows = torch.randint(len(digits), (64,))
        loss = nn.functional.cross_entropy(each(digits.inputs[rows]), digits.targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

backbone = Models(networks, (1, 24, 24))
run = dynrl.train(backbone, "digits", out="runs/cascade", pretrain=False, steps=10_000)
test = load_dataset("digits").test
for price in run.model.price_range:
    run.model.set_price(price)
    right = (run.model(test.inputs).argmax(1) == test.targets).float().mean()
    print(f"price {price:g}: {right:.1%} right, {run.model.last_route.macs_fraction.mean():.2f} of the MACs")
