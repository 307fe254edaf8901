"""A reader of texts with exits: token ids, and a mask of what is padding, go in by name."""

import torch
from torch import nn

import dynrl
from dynrl.backbones import ExitModule
from dynrl.pretraining import Recipe


class Reader(nn.Module):
    """It has the form of BERT and its kin: embeddings, layers that are given the mask, a head on the first token."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 2)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True) for _ in range(3))

    def forward(self, ids, mask):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.head(x[:, 0])


# 600 texts of up to 12 words: does the word 7 occur?
torch.manual_seed(0)
ids, mask = torch.randint(8, 50, (600, 12)), (torch.arange(12) < torch.randint(4, 13, (600, 1))).long()
found = torch.arange(600) % 2
ids[found == 1, 2] = 7
texts = {"ids": ids, "mask": mask}

backbone = ExitModule(Reader(), texts, ["layers.0", "layers.1"])  # examples say the shapes, and which are integers
recipe = Recipe(epochs=5, batch_size=64, learning_rate=0.003, optimizer="adam")
run = dynrl.train(backbone, (texts, found), out="runs/masked-texts", pretrain=recipe, steps=5_000)
model = run.model
model.set_limit(0.9)  # no text may spend more than this share of the full network's MACs
print(model(ids=ids[:4], mask=mask[:4]).softmax(1).tolist(), model.last_route.macs_fraction.tolist())
