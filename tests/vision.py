"""Networks of torchvision, timm and transformers as backbones: `make test-vision`, in a virtual environment of its own.

All have random weights and small configurations, and need no network. Each goes in by two lines: a batch of examples or
the shape of one, and the names of its blocks.

Run as a program, it times some: `python -m tests.vision OUT.json [NAME ...]`. Rows of other networks stay in the file.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import nn

import dynrl
from dynrl.backbones import (
    FAMILIES,
    Backbone,
    CellResNet,
    ExitModule,
    ExitResNet,
    ExpertModule,
    Models,
    SkipModule,
    SkipResNet,
    SlimmableResNet,
    TokenModule,
)
from dynrl.backbones.forward import answer, call
from dynrl.backbones.positions import SHARES
from dynrl.backbones.traced import fold_norms
from dynrl.evaluation import medians_in_turn
from dynrl.inputs import as_inputs
from dynrl.machine import commit, hardware
from dynrl.policies import PolicySpec, StaticPolicy
from dynrl.policies.base import RoutePolicy
from dynrl.pretraining import Recipe
from tests.exported import check_exported

tv, ROWS, TOKENS, WORDS = torchvision.models, 4, 12, 64
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LLAMA = TEXT | {"num_key_value_heads": 1, "use_cache": False}


def images(size: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, size, size)


def texts(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Token ids, and the mask of what is padding."""
    lengths = (torch.tensor([12, 7, 3, 9]) * tokens // 12).unsqueeze(1)
    ids = torch.randint(3, WORDS, (ROWS, tokens))
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()}


def numbered(name: str, *at: int | str) -> list[str]:
    return [f"{name}.{i}" for i in at]


@dataclass(frozen=True)
class Case:
    """A network, examples of its inputs, the blocks that may be skipped, and the layers that may have exits."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    blocks: list[str]
    layers: list[str] | None = None
    macs: tuple[int, int] | None = None  # a block, by its place in `blocks`, and what it costs by hand


def conv(inner: int, outer: int, kernel: int, pixels: int) -> int:
    return inner * outer * kernel * kernel * pixels


def transformer(width: int, inner: int, tokens: int, gated: bool = False, kv: int | None = None) -> int:
    """A block's four projections, two attention products, and the two or three layers of its MLP."""
    kv = width if kv is None else kv
    return tokens * (2 * width * (width + kv) + 2 * tokens * width + (2 + gated) * width * inner)


CASES: dict[str, Case] = {
    "torchvision resnet18": Case(
        tv.resnet18, lambda: images(64), ["layer1.1", "layer2.1", "layer3.1", "layer4.1"], ["layer1", "layer2", "layer3"],
        (0, 2 * conv(64, 64, 3, 16 * 16)),
    ),
    "torchvision resnet50": Case(
        tv.resnet50, lambda: images(64), ["layer1.1", "layer2.1", "layer3.1"], ["layer2", "layer3"],
        (0, 2 * conv(256, 64, 1, 256) + conv(64, 64, 3, 256)),
    ),
    "torchvision mobilenet_v3_small": Case(
        tv.mobilenet_v3_small, lambda: images(64), numbered("features", 3, 5, 6), numbered("features", 4, 7),
        (0, 2 * conv(24, 88, 1, 64) + conv(1, 88, 3, 64)),
    ),
    "torchvision efficientnet_b0": Case(
        tv.efficientnet_b0, lambda: images(64), ["features.2.1", "features.3.1"], ["features.3", "features.5"],
        (0, 2 * conv(24, 144, 1, 256) + conv(1, 144, 3, 256) + 2 * 144 * 6),
    ),
    "torchvision regnet_y_400mf": Case(
        tv.regnet_y_400mf, lambda: images(64), ["trunk_output.block2.block2-1", "trunk_output.block3.block3-1"],
        ["trunk_output.block2"], (0, 64 * 104 * (2 * 104 + 9 * 8) + 2 * 104 * 26),
    ),
    "torchvision convnext_tiny": Case(
        tv.convnext_tiny, lambda: images(64), numbered("features.5", 0, 1, 2), ["features.3", "features.5"],
        (0, conv(1, 384, 7, 16) + 2 * conv(384, 1536, 1, 16)),
    ),
    "torchvision vit": Case(
        lambda: tv.VisionTransformer(32, 8, 3, 2, 48, 96), lambda: images(32),
        [f"encoder.layers.encoder_layer_{i}" for i in range(3)], ["encoder.layers.encoder_layer_0"],
        (0, transformer(48, 96, 17)),
    ),
    "torchvision swin_t": Case(
        tv.swin_t, lambda: images(64), ["features.1.0", "features.1.1", "features.3.1"], ["features.1", "features.3"],
        # 16 x 16 tokens are padded to nine windows of 7 x 7; the MLP sees none of the padding.
        (0, 9 * transformer(96, 0, 49) + 2 * 256 * 96 * 384),
    ),
    "timm resnet18d": Case(
        lambda: timm.create_model("resnet18d"), lambda: images(64), ["layer1.0", "layer1.1", "layer2.1"], ["layer2"],
        (0, 2 * conv(64, 64, 3, 16 * 16)),
    ),
    "timm seresnet18": Case(
        lambda: timm.create_model("seresnet18"), lambda: images(64), ["layer1.1", "layer2.1"], ["layer2"],
        (0, 2 * conv(64, 64, 3, 16 * 16) + 2 * 64 * 8),
    ),
    "timm vit_tiny with dynamic_img_size": Case(
        lambda: timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=3), lambda: images(64),
        numbered("blocks", 0, 1, 2), numbered("blocks", 0, 1), (0, transformer(192, 768, 17)),
    ),
    "timm deit distilled": Case(
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3), lambda: images(64),
        numbered("blocks", 0, 1, 2), numbered("blocks", 0, 1), (0, transformer(192, 768, 18)),
    ),
    "timm mixer": Case(
        lambda: timm.models.mlp_mixer.MlpMixer(img_size=64, patch_size=16, num_blocks=3, embed_dim=64),
        lambda: images(64), numbered("blocks", 0, 1, 2), numbered("blocks", 0, 1),
        (0, 2 * 64 * 16 * 32 + 2 * 16 * 64 * 256),
    ),
    "timm mobilevit_xxs, its inner blocks": Case(
        lambda: timm.create_model("mobilevit_xxs"), lambda: images(64), numbered("stages.3.1.transformer", 0, 1, 2),
        None, (0, 4 * transformer(80, 160, 4)),
    ),
    "timm swin_tiny": Case(
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2, 2, 2), window_size=7),
        lambda: images(56), ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.1"], ["layers.0", "layers.1"],
        (0, 4 * transformer(96, 384, 49)),
    ),
    "transformers resnet": Case(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
        ),
        lambda: images(32), ["resnet.encoder.stages.0.layers.1", "resnet.encoder.stages.1.layers.1"],
        ["resnet.encoder.stages.0"], (0, 2 * conv(16, 16, 3, 64)),
    ),
    "transformers vit": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
            )
        ),
        lambda: images(32), numbered("vit.layers", 0, 1, 2), numbered("vit.layers", 0, 1), (0, transformer(32, 64, 17)),
    ),
    "transformers bert": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), texts, numbered("bert.encoder.layer", 0, 1, 2),
        numbered("bert.encoder.layer", 0, 1), (0, transformer(32, 64, TOKENS)),
    ),
    "transformers distilbert": Case(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=WORDS, dim=32, n_layers=3, n_heads=2, hidden_dim=64)
        ),
        texts, numbered("distilbert.transformer.layer", 0, 1, 2), numbered("distilbert.transformer.layer", 0, 1),
        (0, transformer(32, 64, TOKENS)),
    ),
    "transformers gpt2": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=3, n_head=2, use_cache=False, bos_token_id=1, eos_token_id=1)
        ),
        texts, numbered("transformer.h", 0, 1, 2), None, (0, transformer(32, 128, TOKENS)),
    ),
    "transformers llama": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), texts, numbered("model.layers", 0, 1, 2), None,
        (0, transformer(32, 64, TOKENS, True, 16)),
    ),
    "transformers qwen2": Case(
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)), texts, numbered("model.layers", 0, 1, 2), None,
        (0, transformer(32, 64, TOKENS, True, 16)),
    ),
    "transformers mixtral": Case(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)), texts,
        numbered("model.layers", 0, 1, 2), None,
        # Each token goes through two experts of three layers, and a router chooses among four.
        (0, transformer(32, 64, TOKENS, True, 16) + TOKENS * (3 * 32 * 64 + 4 * 32)),
    ),
    "transformers t5, encoder": Case(  # its first block makes the bias of places for all others
        lambda: hf.T5EncoderModel(
            hf.T5Config(vocab_size=WORDS, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2)
        ),
        texts, numbered("encoder.block", 1, 2), None, (0, transformer(32, 64, TOKENS)),
    ),
}  # fmt: skip
WITH_EXITS = [name for name, case in CASES.items() if case.layers]


def trained(module: nn.Module) -> nn.Module:
    """With statistics, shifts and a head as training leaves them: zeros and ones hide what is mixed up."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.1, 0.4)
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
    return module.eval()


def plugged(kind: type[Backbone], case: Case) -> tuple[nn.Module, Any, Backbone]:
    torch.manual_seed(0)
    module, inputs = trained(case.make()), case.inputs()
    names = case.blocks if kind is SkipModule else case.layers
    return module, inputs, kind(module, inputs, names)


def said(module: nn.Module, inputs: Any) -> torch.Tensor:
    return answer(call(module, as_inputs(inputs)), "it")


@torch.no_grad()
def check(module: nn.Module, inputs: Any, backbone: Backbone) -> None:
    """The full route is the network; rows that take half of it by chance give the same together as alone."""
    expected = said(module, inputs)
    assert float(expected.std()) > 1e-5
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(model(inputs), expected, **close)
    assert float(model.last_route.macs_fraction[0]) == 1
    route = torch.randint(0, 2, (ROWS, backbone.columns), generator=torch.Generator().manual_seed(1))
    together = model.backbone.run_route(inputs, route)
    for row in range(ROWS):
        alone = backbone(as_inputs(inputs)[row : row + 1], route[row : row + 1])
        torch.testing.assert_close(together.outputs[row : row + 1], alone, **close)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_skipped(name):
    case = CASES[name]
    module, inputs, backbone = plugged(SkipModule, case)
    check(module, inputs, backbone)
    if case.macs is not None:
        column, macs = case.macs
        skip, run = backbone.costs[column].tolist()
        assert run - skip == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("name", WITH_EXITS)
def test_exits_stop_rows(name):
    check(*plugged(ExitModule, CASES[name]))


RESNETS = {
    "torchvision, skip": (tv.resnet50, SkipResNet, {}), "torchvision, exits": (tv.resnet18, ExitResNet, {"exits": (1, 3)}),
    "torchvision, widths": (tv.resnet18, SlimmableResNet, {}), "torchvision, cells": (tv.resnet50, CellResNet, {"grid": 2}),
    "timm, skip": (lambda: timm.create_model("resnet18"), SkipResNet, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RESNETS)
@torch.no_grad()
def test_resnets_become_families(name):
    make, family, settings = RESNETS[name]
    module, inputs = trained(make()), images(64)
    backbone, expected = family.from_module(module, (3, 64, 64), **settings), module(inputs)
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


CASCADES = {
    "torchvision": (tv.mobilenet_v3_small, tv.resnet18, tv.resnet50),
    "timm": tuple(partial(timm.create_model, name) for name in ("mobilenetv3_small_050", "resnet18d", "convnext_nano")),
}


@pytest.mark.parametrize("sizes", [None, (32, 48, 64)])
@pytest.mark.parametrize("name", CASCADES)
@torch.no_grad()
def test_three_networks_become_a_cascade(name, sizes):
    """Each row gets the answer of the last network it asked, and pays for all of them."""
    modules, inputs = [trained(make()) for make in CASCADES[name]], images(64)
    backbone = Models(modules, (3, 64, 64), sizes)
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    seen = [
        nn.functional.interpolate(inputs, (size, size), mode="bilinear", antialias=True) if size != 64 else inputs
        for size in sizes or (64, 64, 64)
    ]
    expected = [module(given) for module, given in zip(modules, seen, strict=True)]
    macs = backbone.costs[0].tolist()
    assert macs == sorted(macs) and macs[0] < 0.5 * macs[2]
    for route, last, asked in (
        ((0, 0, 0), 0, [0]),
        ((0, 1, 1), 2, [0, 1, 2]),
        ((1, 0, 1), 2, [1, 2]),
        ((2, 0, 0), 2, [2]),
    ):
        walk = model.backbone.run_route(inputs, torch.tensor(route).expand(ROWS, -1))
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected[last].abs().max())}
        torch.testing.assert_close(walk.outputs, expected[last], **close)
        assert walk.macs.tolist() == [sum(macs[k] for k in asked)] * ROWS
    mixed = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 0, 0], [2, 0, 0]])
    outputs = model.backbone.run_route(inputs, mixed).outputs
    for row, last in enumerate((0, 2, 1, 2)):
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected[last].abs().max())}
        torch.testing.assert_close(outputs[row], expected[last][row], **close)


def by_timm(recipe: dict[str, Any], image: torch.Tensor) -> torch.Tensor:
    return timm.data.create_transform(**recipe)(torchvision.transforms.functional.to_pil_image(image))


STANDARDS = {  # what the weights come with, and what makes a network's input of an image by it
    "torchvision": (
        lambda: tv.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32),
        lambda recipe, image: recipe(image),
    ),
    "timm": (lambda: timm.data.resolve_data_config({"input_size": (3, 32, 32), "crop_pct": 1.0}), by_timm),
    "transformers": (
        lambda: hf.CLIPImageProcessor(do_resize=False, do_center_crop=False),
        lambda recipe, image: recipe(image, return_tensors="pt")["pixel_values"][0],
    ),
}


@pytest.mark.parametrize("name", STANDARDS)
def test_weights_say_what_inputs_are_standardised_by(name, tmp_path):
    make, ready = STANDARDS[name]
    recipe, pixels = make(), torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    backbone = SkipModule(trained(tv.resnet18(num_classes=2)), (3, 32, 32), ["layer1.1"], family=f"resnet-{name}")
    run = dynrl.train(
        backbone.standardised_by(recipe), (pixels, torch.arange(40) % 2), out=tmp_path / "run", pretrain=False,
        agent="gate", steps=64, num_envs=32, price_range=(0.01, 1.0),
    )  # fmt: skip
    expected = torch.stack([ready(recipe, image) for image in pixels[:4]])
    torch.testing.assert_close(dynrl.load(run.path).preprocess(pixels[:4]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [hf.GPT2LMHeadModel, hf.LlamaForCausalLM])
def test_caches_are_refused_by_name(make):
    config = make.config_class(
        **({} if make is hf.GPT2LMHeadModel else LLAMA) | {"use_cache": True, "vocab_size": WORDS}
    )
    blocks = ["transformer.h.0"] if make is hf.GPT2LMHeadModel else ["model.layers.0"]
    with pytest.raises(ValueError, match=r"is given a DynamicCache at .*use_cache=False"):
        SkipModule(make(config), texts(), blocks)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, hidden_dropout_prob=0.0))


def labelled(count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Texts with and without the token 7 among those that are no padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, WORDS, (count, TOKENS), generator=generator)
    mask = (torch.arange(TOKENS) < torch.randint(4, TOKENS + 1, (count, 1), generator=generator)).long()
    marked = torch.rand(count, generator=generator) < 0.5
    ids[marked, 2] = 7
    ids[:, -1][mask[:, -1] == 0] = 7  # what is hidden tells nothing
    return {"input_ids": ids, "attention_mask": mask}, marked.long()


def test_a_policy_is_trained_on_bert_and_loaded(tmp_path):
    inputs, labels = labelled(640)
    backbone = SkipModule(bert(), inputs, numbered("bert.encoder.layer", 0, 1, 2), family="toy-bert")
    recipe = Recipe(epochs=3, batch_size=64, learning_rate=0.003, optimizer="adam")
    run = dynrl.train(backbone, (inputs, labels), out=tmp_path / "run", pretrain=recipe, steps=2000)
    model = dynrl.load(run.path)
    with torch.no_grad():
        outputs = model(inputs)
    assert float((outputs.argmax(1) == labels).float().mean()) > 0.9
    model.set_price(model.price_range[1])
    assert torch.isfinite(model(inputs)).all()
    policy = PolicySpec.of("sequential", backbone, (0.01, 1.0), 0).build()
    torch.testing.assert_close(dynrl.plug(model.backbone, policy)(inputs).shape, outputs.shape)
    assert "toy-bert" in FAMILIES


PLUGIN = """
import torch
from tests.vision import bert, labelled, numbered
from dynrl.backbones import FAMILIES, SkipModule
from dynrl.data import DATASETS, own_dataset
from dynrl.pretraining import Recipe

FAMILIES["my-bert"] = lambda **config: SkipModule(bert(), family="my-bert", **config)
DATASETS["marked-texts"] = lambda: own_dataset(labelled(640))
"""


def test_a_policy_is_trained_on_bert_by_the_command(tmp_path):
    from dynrl.pretraining import pretrain
    from dynrl.scripts.cli import main

    inputs, labels = labelled(640)
    backbone = SkipModule(bert(), inputs, numbered("bert.encoder.layer", 0, 1, 2), family="my-bert")
    (tmp_path / "mine.py").write_text(PLUGIN)
    data = dynrl.data.own_dataset((inputs, labels))
    pretrain(backbone, data, Recipe(epochs=2, batch_size=64, learning_rate=0.003, optimizer="adam"))
    backbone.trained_on = data.provenance
    (tmp_path / "backbone").mkdir()
    backbone.save(tmp_path / "backbone" / "backbone.safetensors")
    command = [
        "--plugin",
        str(tmp_path / "mine.py"),
        "train",
        "skip",
        "--data",
        "marked-texts",
        "--steps",
        "1000",
        "--agent",
        "gate",
    ]
    assert not main([*command, "--backbone", str(tmp_path / "backbone"), "--out", str(tmp_path / "run")])
    assert dynrl.load(tmp_path / "run")(inputs).shape == (640, 2)


EXPORTED: dict[str, tuple[type[Backbone], Callable[[], nn.Module], list[str]]] = {
    name: (kind, CASES[name].make, CASES[name].blocks if kind is SkipModule else CASES[name].layers or [])
    for name, kind in {
        "torchvision resnet18": SkipModule, "torchvision resnet50": ExitModule,
        "torchvision mobilenet_v3_small": SkipModule, "torchvision efficientnet_b0": SkipModule,
        "torchvision regnet_y_400mf": SkipModule, "torchvision convnext_tiny": ExitModule,
        "timm resnet18d": SkipModule, "timm seresnet18": ExitModule,
    }.items()
} | {
    "torchvision densenet121": (ExitModule, tv.densenet121, ["features.denseblock2"]),
    "torchvision shufflenet": (SkipModule, tv.shufflenet_v2_x0_5, numbered("stage2", 1, 2)),
    "torchvision mobilenet_v2": (SkipModule, tv.mobilenet_v2, numbered("features", 3, 5, 6)),
    "timm convnext_atto": (SkipModule, lambda: timm.create_model("convnext_atto"), ["stages.1.blocks.1"]),
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.pt2", "model.onnx"])
@pytest.mark.parametrize("name", EXPORTED)
def test_networks_are_exported(name, file, tmp_path):
    kind, make, parts = EXPORTED[name]
    torch.manual_seed(0)
    backbone = kind(trained(make()), (3, 32, 32), parts, channels="first")
    check_exported(backbone, torch.randn(76, 3, 32, 32), tmp_path / file)


def every(stages: dict[str, range]) -> list[str]:
    return [name.format(i) for name, numbers in stages.items() for i in numbers]


# Half of the blocks are skipped, or half of the rows leave behind a layer.
MEASURED: dict[str, Case] = {
    "torchvision resnet18": Case(
        tv.resnet18, lambda: images(96), ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], ["layer2"]
    ),
    "torchvision resnet50": Case(
        tv.resnet50, lambda: images(96),
        every({"layer1.{}": range(1, 3), "layer2.{}": range(1, 4), "layer3.{}": range(1, 6), "layer4.{}": range(1, 3)}),
        ["layer2"],
    ),
    "torchvision mobilenet_v3_small": Case(
        tv.mobilenet_v3_small, lambda: images(96), numbered("features", 3, 5, 6, 8, 10, 11), ["features.6"]
    ),
    "torchvision efficientnet_b0": Case(
        tv.efficientnet_b0, lambda: images(96),
        ["features.2.1", "features.3.1", *every({"features.4.{}": range(1, 3), "features.5.{}": range(1, 3)}),
         *every({"features.6.{}": range(1, 4)})],
        ["features.4"],
    ),
    "torchvision regnet_y_400mf": Case(
        tv.regnet_y_400mf, lambda: images(96),
        every({"trunk_output.block2.block2-{}": range(1, 3), "trunk_output.block3.block3-{}": range(1, 6),
               "trunk_output.block4.block4-{}": range(1, 6)}),
        ["trunk_output.block3"],
    ),
    "torchvision convnext_tiny": Case(
        tv.convnext_tiny, lambda: images(96),
        every({"features.1.{}": range(3), "features.3.{}": range(3), "features.5.{}": range(9), "features.7.{}": range(3)}),
        ["features.3"],
    ),
    "timm vit_tiny": Case(
        lambda: timm.create_model("vit_tiny_patch16_224"), lambda: images(224), numbered("blocks", *range(12)),
        ["blocks.5"],
    ),
    "transformers vit, small": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=96, num_hidden_layers=12
            )
        ),
        lambda: images(96), numbered("vit.layers", *range(12)), ["vit.layers.5"],
    ),
    "timm resnet18d": Case(
        lambda: timm.create_model("resnet18d"), lambda: images(96),
        ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], ["layer2"],
    ),
    "timm seresnet18": Case(
        lambda: timm.create_model("seresnet18"), lambda: images(96),
        ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], ["layer2"],
    ),
    "transformers resnet18": Case(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
        ),
        lambda: images(96),
        numbered("resnet.encoder.stages", "0.layers.0", "0.layers.1", "1.layers.1", "2.layers.1", "3.layers.1"),
        ["resnet.encoder.stages.1"],
    ),
    "transformers bert, 6 layers": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=6)), partial(texts, 64),
        numbered("bert.encoder.layer", *range(6)), ["bert.encoder.layer.2"],
    ),
}  # fmt: skip


# Encoders of `CASES` in which some tokens run a block: how many tokens lead, and what a block costs by hand on so many.
WITH_TOKENS: dict[str, tuple[int, Callable[[int], int]]] = {
    "torchvision vit": (1, partial(transformer, 48, 96)),
    "timm vit_tiny with dynamic_img_size": (1, partial(transformer, 192, 768)),
    "timm deit distilled": (2, partial(transformer, 192, 768)),
    "transformers vit": (1, partial(transformer, 32, 64)),
    "transformers bert": (1, partial(transformer, 32, 64)),
    "transformers distilbert": (1, partial(transformer, 32, 64)),
}


@pytest.mark.parametrize("name", WITH_TOKENS)
@torch.no_grad()
def test_some_tokens_run_and_all_of_them_are_the_network(name):
    torch.manual_seed(0)
    case, (leading, by_hand) = CASES[name], WITH_TOKENS[name]
    module, inputs = trained(case.make()), as_inputs(case.inputs())
    backbone, expected = TokenModule(module, inputs, case.blocks, leading=leading), said(module, inputs)
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    route = torch.randint(0, backbone.num_choices, (ROWS, backbone.columns))
    together, rows = model.backbone.run_route(inputs, route), range(ROWS)
    alone = [backbone.run_route(inputs[row : row + 1], route[row : row + 1]) for row in rows]
    torch.testing.assert_close(together.outputs, torch.cat([walk.outputs for walk in alone]), rtol=1e-4, atol=1e-4)
    real = inputs["attention_mask"].sum(1) if backbone.form.named else torch.full((ROWS,), backbone._counts[-1])
    fixed = backbone.start_macs + int(backbone.costs[:, 0].sum())
    for row, length in enumerate(real.tolist()):
        ran = [leading + math.ceil(SHARES[c] * (length - leading)) if c else 0 for c in route[row].tolist()]
        macs = int(together.macs[row]) - fixed
        assert macs == int(alone[row].macs) - fixed == pytest.approx(sum(map(by_hand, ran)), rel=0.01)


def test_bert_on_some_tokens_is_blind_to_padding():
    """Beside a longer text, a text gives what the same network for texts of its own length gives."""
    torch.manual_seed(0)
    case, inputs = CASES["transformers bert"], texts()
    module, route = trained(case.make()), torch.randint(1, 4, (ROWS, 3))
    whole = TokenModule(module, inputs, case.blocks)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        if length > 5:
            alone = {name: x[row : row + 1, :length] for name, x in inputs.items()}
            short = TokenModule(module, alone, case.blocks)
            short.scorers.load_state_dict(whole.scorers.state_dict())
            with torch.no_grad():
                expected = short.run_route(as_inputs(alone), route[row : row + 1])
                walk = whole.run_route(as_inputs(inputs), route)
            torch.testing.assert_close(walk.outputs[row : row + 1], expected.outputs, rtol=1e-4, atol=1e-5)


MOE = LLAMA | {"num_experts_per_tok": 3}
# Mixtures of experts: fused weights, weights that do not sum to 1, a shared expert, routers that return more, groups.
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForSequenceClassification(
        hf.MixtralConfig(**MOE, num_local_experts=4, pad_token_id=0, num_labels=3)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**MOE, num_experts=4, norm_topk_prob=False)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**MOE, num_local_experts=4, head_dim=16)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **MOE | {"num_key_value_heads": 2}, n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=24,
            first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_texts_take_fewer_experts_and_at_its_own_number_it_is_the_network(name):
    torch.manual_seed(0)
    module, inputs = trained(MIXTURES[name]()), as_inputs(texts())
    for part in module.modules():  # routers as training leaves them, which tell experts apart
        if vars(part).get("top_k") and hasattr(part, "weight"):
            nn.init.normal_(part.weight)
    backbone = ExpertModule(module, inputs, numbered("model.layers", 0, 1, 2), "mlp")
    assert backbone.config["counts"] == [1, 2, 3]
    expected = said(module, inputs)
    assert torch.equal(backbone(inputs), expected)
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    assert torch.equal(model(inputs), expected) and float(model.last_route.macs_fraction[0]) == 1
    less, more, most = backbone.costs[0].tolist()
    assert more - less == most - more > TOKENS * 3 * 32 * 24 - 1
    route = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0], [0, 2, 1]])
    walk = backbone.run_route(inputs, route)
    parts = [
        [part for part in layer.modules() if type(vars(part).get("top_k")) is int] for layer in module.model.layers
    ]
    for row in range(ROWS):
        for mine, choice in zip(parts, route[row].tolist(), strict=True):
            for part in mine:
                part.top_k = choice + 1
        torch.testing.assert_close(
            walk.outputs[row : row + 1], said(module, inputs[row : row + 1]), rtol=1e-4, atol=1e-5
        )


# Half of the tokens run each of the twelve blocks; batch 32.
TOKENS_OF: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision vit_b_16": (tv.vit_b_16, "encoder.layers.encoder_layer_{}"),
    "timm vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), "blocks.{}"),
}

# Half of the twelve blocks run, by chance; batch 32, by both ways to hold a network if torch.fx can trace it.
BLOCKS_OF: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision vit_b_16": TOKENS_OF["torchvision vit_b_16"],
    "transformers vit_b_16": (lambda: hf.ViTForImageClassification(hf.ViTConfig()), "vit.layers.{}"),
}


class Given(RoutePolicy):
    """This policy is told the routes, so that its model's time is that of the network and of moving rows."""

    routes: torch.Tensor

    def route(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.routes


def dense_sides(module: nn.Module, inputs: Any) -> dict[str, Callable[[], Any]]:
    """Return ways to compute the network without dynrl: as it came and, if it has batch norms, with these folded.

    A network with convolutions is computed in both memory formats.
    """
    kinds = {type(part) for part in module.modules()}
    forms = {"": torch.contiguous_format}
    if nn.Conv2d in kinds and isinstance(inputs, torch.Tensor):
        forms[", channels_last"] = torch.channels_last
    networks = {"as it came": module}
    if any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds):
        networks["folded"] = copy.deepcopy(module)
        fold_norms(networks["folded"], [])
    sides = {}
    for name, network in networks.items():
        for suffix, form in forms.items():
            twin: Any = copy.deepcopy(network).to(memory_format=form)  # type: ignore[call-overload]
            given = inputs.contiguous(memory_format=form) if isinstance(inputs, torch.Tensor) else inputs
            sides[f"dense, {name}{suffix}"] = partial(call, twin, given)
    return sides


def best(times: dict[str, float]) -> float:
    """Return the time of the dense network at its best."""
    return min(ms for side, ms in times.items() if side.startswith("dense"))


def row_of(
    name: str, backbone: Backbone, batch: int, times: dict[str, float], share: float, allowed: float
) -> dict[str, Any]:
    """Return a row of the results: what was plugged may take `allowed` milliseconds."""
    dense, plugged = best(times), times["plugged"]
    return {
        "network": name, "decision": backbone.decision, "way": backbone.way, "batch": batch, "ms": times,
        "macs_fraction": share, "dense_ms": dense, "plugged_ms": plugged, "speedup": dense / plugged,
        "allowed_ms": allowed, "holds": plugged <= allowed, "date": f"{date.today()}", "commit": commit(),
    }  # fmt: skip


def measure_tokens(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time half of the tokens at each block beside the network itself, and beside its blocks on as many tokens."""
    torch.manual_seed(0)
    make, block = TOKENS_OF[name]
    module, inputs = trained(make()).requires_grad_(False), torch.randn(batch, 3, 224, 224)
    backbone = TokenModule(module, inputs, every({block: range(12)})).for_inference()
    route, full = torch.full((batch, backbone.columns), 2), backbone.dense_actions(batch)
    with torch.inference_mode():
        times = medians_in_turn(
            dense_sides(module, inputs) | {
                "all tokens": lambda: backbone.run_route(inputs, full),
                "plugged": lambda: backbone.run_route(inputs, route), "ideal": backbone.ideal(inputs, route),
            },
            rounds,
        )  # fmt: skip
        share = float(backbone.run_route(inputs[:1], route[:1]).macs) / backbone.dense_macs
    return row_of(name, backbone, batch, times, share, min(best(times) / 1.5, times["ideal"] / 0.85))


def measure_ways(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time half of the blocks, traced and in place where torch.fx can trace the network, and else in place.

    A network whose input is given by its name is never traced.
    """
    torch.manual_seed(0)
    make, block = BLOCKS_OF[name]
    module, inputs = trained(make()).requires_grad_(False), torch.randn(batch, 3, 224, 224)
    argument = next(iter(inspect.signature(module.forward).parameters))
    sides, backbones = dense_sides(module, inputs), dict[str, Backbone]()
    for given in (as_inputs({argument: inputs}), inputs):
        backbone: Any = SkipModule(module, given, every({block: range(12)}))
        routes, model = routes_of(backbone, batch), dynrl.plug(backbone, Given())
        model.policy.routes = routes
        backbones[backbone.way] = backbone
        sides |= {backbone.way: partial(model, given), "ideal": model.backbone.ideal(given, routes)}
    with torch.inference_mode():
        times = medians_in_turn(sides, rounds)
        macs = backbone.run_route(inputs, routes).macs.double().mean()
    share, rows = float(macs) / backbone.dense_macs, []
    for way, backbone in backbones.items():
        most = math.inf if way == "traced" else 1.05 * times.get("traced", math.inf)
        mine = times | {"plugged": times[way]}
        rows.append(row_of(name, backbone, batch, mine, share, min(best(times) / 1.6, most)))
    return rows


def routes_of(backbone: Backbone, rows: int) -> torch.Tensor:
    """Return routes on which half of the blocks are skipped, by chance, or every other row leaves."""
    if isinstance(backbone, ExitModule):
        return (torch.arange(rows) % 2).unsqueeze(1)
    return torch.randint(0, 2, (rows, backbone.columns), generator=torch.Generator().manual_seed(0))


def measure(name: str, kind: type[Backbone], batch: int, rounds: int) -> dict[str, Any]:
    """Time a plugged network on given routes beside the network itself; of a batch of one, the mean of four inputs.

    What is ideal is less than the time that shares of MACs allow where the layers that are spared take less time for
    their MACs than others do.
    """
    torch.manual_seed(0)
    case = MEASURED[name]
    module = trained(case.make()).requires_grad_(False)
    examples = as_inputs(case.inputs())
    backbone = kind(module, examples, case.blocks if kind is SkipModule else case.layers)
    model = dynrl.plug(backbone, Given())
    inputs = examples[torch.arange(max(batch, ROWS)) % ROWS]
    routes = routes_of(backbone, len(inputs))
    given = list(zip(inputs.split(batch), routes.split(batch), strict=True))

    ideals = [model.backbone.ideal(*pair) for pair in given]

    def plugged() -> None:
        for rows, model.policy.routes in given:
            model(rows)

    sides: dict[str, Callable[[], Any]] = {}
    for side, call_once in dense_sides(module, given[0][0]).items():
        sides[side] = lambda call_once=call_once: [call_once() for _ in given]
    every_side = sides | {"ideal": lambda: [ideal() for ideal in ideals], "plugged": plugged}
    with torch.inference_mode():
        times = {side: ms / len(given) for side, ms in medians_in_turn(every_side, rounds).items()}
        macs = sum(float(model.backbone.run_route(*pair).macs.double().sum()) for pair in given)
    share = macs / len(inputs) / backbone.dense_macs
    return row_of(name, backbone, batch, times, share, best(times) * (share / 0.85 if batch > 1 else 1.03))


def rows_of(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure all that is to be known of the network `name`."""
    for kind in (SkipModule, ExitModule) if name in MEASURED else ():
        for batch in (64, 1):
            yield measure(name, kind, batch, rounds if batch > 1 else 5 * rounds)
    if name in TOKENS_OF:
        yield measure_tokens(name, 32, rounds)
    if name in BLOCKS_OF:
        yield from measure_ways(name, 32, rounds)


def keep(row: dict[str, Any], path: Path, about: dict[str, Any]) -> None:
    """Put `row` into the file, in the place of one that measured the same."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    same = [[other[key] for key in ("network", "decision", "way", "batch")] for other in rows]
    mine = [row[key] for key in ("network", "decision", "way", "batch")]
    at = same.index(mine) if mine in same else len(rows)
    rows[at : at + 1] = [row]
    path.write_text(json.dumps({"hardware": about, "rows": rows}, indent=2) + "\n")


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['network']:30} {row['decision']:9} {row['way']:8} batch {row['batch']:2} MACs {row['macs_fraction']:.2f} "
        f"dense {row['dense_ms']:8.2f} ideal {row['ms']['ideal']:8.2f} plugged {row['plugged_ms']:8.2f} "
        f"allowed {row['allowed_ms']:8.2f} {'holds' if row['holds'] else 'FAILS'}",
        flush=True,
    )


def main() -> None:
    """Measure the networks that the command names."""
    known = list(dict.fromkeys([*MEASURED, *TOKENS_OF, *BLOCKS_OF]))
    parser = argparse.ArgumentParser(description="Time plugged networks beside themselves, and write a JSON file.")
    parser.add_argument("out", type=Path, help="the file to write; rows of other networks stay in it")
    parser.add_argument("names", nargs="*", help=f"the networks to measure, by default all: {', '.join(known)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed; medians count")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"expected names among {known}, got {unknown}")
    torch.set_num_threads(args.threads)
    versions = {"torchvision": torchvision.__version__, "timm": timm.__version__, "transformers": hf.__version__}
    about = hardware() | versions
    if args.out.exists() and (other := json.loads(args.out.read_text())["hardware"]) != about:
        parser.error(f"{args.out} was measured on {other}, which is not {about}; name another file")
    for name in args.names or known:
        for row in rows_of(name, args.rounds):
            keep(row, args.out, about)
            show(row)


if __name__ == "__main__":
    main()
