"""What a network was trained on travels with it: nobody types a mean, and no number is false because images came later."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import random_split

import dynrl
from dynrl import plans
from dynrl.backbones import FAMILIES, SkipResNet, load_backbone
from dynrl.data import (
    DATASETS,
    Augmentation,
    Dataset,
    Split,
    as_dataset,
    image_folder,
    load_dataset,
    own_dataset,
    standardised,
    text_folder,
)
from dynrl.deploy import SHIPPED, shipped
from dynrl.envs.skip import SkipVectorEnv
from dynrl.files import load_tensors, read_json, save_tensors, write_json
from dynrl.finetuning import Finetuning
from dynrl.plans import plan
from dynrl.pretraining import Recipe
from dynrl.provenance import Provenance, Standard
from dynrl.recipes import defaults
from dynrl.runs import RunFolder
from dynrl.training import pretrain_into, resume, train
from tests.scripts.calls import main

RECIPE = Recipe(epochs=2, batch_size=16)
PARTS = ("train", "validation", "test")
SMALL = ("layers=[2]", "widths=[4]")


def paint(folder, classes="ab", count=20, start=0, light=0):
    """Noisy images of 16x16 pixels; a class is brighter than the one before."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + count):
            noise = np.random.default_rng(1000 * ord(name) + i).integers(0, 60, (16, 16))
            pixels = noise + 80 * (ord(name) - ord("a")) + light
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    load_dataset.cache_clear()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, and a run that was trained on them; each test takes a copy."""
    root = tmp_path_factory.mktemp("made")
    backbone = SkipResNet((1, 16, 16), 2, layers=(2, 2), widths=(4, 8), stem_stride=2)
    train(
        backbone, paint(root / "photos"), out=root / "run", pretrain=RECIPE, agent="gate", steps=200, num_envs=8,
        price_range=(0.01, 1.0),
    )  # fmt: skip
    yield root
    load_dataset.cache_clear()


@pytest.fixture
def photos(made):
    """The photos as they were when the run was made, in the place where they were."""
    yield made / "photos"
    shutil.rmtree(made / "photos", ignore_errors=True)
    paint(made / "photos")


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def refusals(run, photos, out):
    """All commands that would use a backbone on the data at hand."""
    words = [
        ("evaluate", run), ("train", "skip", "--resume", run), ("calibrate", run, "--batch-size", "2"),
        ("train", "skip", "--data", photos, "--backbone", run, "--agent", "gate", "--out", out / "new"),
        ("sweep", "skip", "--data", photos, "--backbone", run, "--agent", "gate", "--vary", "hidden=4", "--out", out / "s"),
    ]  # fmt: skip
    return [[str(word) for word in each] for each in words]


def test_the_deployer_gets_what_was_trained_on(made, photos, run):
    model, data = run.model, image_folder(str(photos))
    assert model.classes == ("a", "b") and read_json(run.data_file)["classes"] == ["a", "b"]
    raw = torch.from_numpy(np.stack([np.array(Image.open(photos / "b" / f"{i}.png")) for i in range(20)])).unsqueeze(1)
    seen = model.preprocess(raw)
    known = torch.cat([data.split(part).inputs for part in ("train", "validation", "test")])
    assert all((known - each).abs().flatten(1).amax(1).min() < 1e-6 for each in seen)
    torch.testing.assert_close(model.preprocess(raw.double() / 255), seen)
    assert model.bfloat16().preprocess(raw).dtype == torch.bfloat16
    for bad, reason in (
        (seen, "numbers from 0 to 1"), (raw.float(), "got numbers from"), (raw.int(), "torch.uint8, .*got torch.int32"),
        (raw[..., 1:], r"shape \[batch, 1, 16, 16\], got \(20, 1, 16, 15\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            model.preprocess(bad)


@pytest.mark.parametrize("name", shipped())
def test_shipped_models_know_their_data(name):
    model = dynrl.load(name)
    data = load_dataset(model.backbone.trained_on.data)
    assert model.classes == tuple(map(str, range(data.classes))) and data.seen_by(model.backbone.trained_on) is data
    raw = data.test.inputs[:8]
    if raw.is_floating_point():
        raw = data.raw(raw)
    torch.testing.assert_close(model.preprocess(raw), data.test.inputs[:8], atol=1e-5, rtol=1e-5)


def test_a_backbone_that_nobody_trained_says_so(run):
    backbone, _ = load_backbone(run.backbone_file)
    backbone.trained_on = None
    model = dynrl.plug(backbone, run.policy_file)
    assert model.classes == ()
    with pytest.raises(ValueError, match="not known what this backbone was trained on"):
        model.preprocess(torch.zeros(1, 1, 16, 16))


def test_images_that_come_later_change_no_standardisation(photos, run, monkeypatch):
    before = run.model.backbone.trained_on
    old = image_folder(str(photos))
    paint(photos, start=20, light=90)
    new = run.dataset()
    assert abs(new.mean - before.mean) > 0.05
    seen = new.seen_by(before)
    assert (seen.mean, seen.deviation) == (before.mean, before.deviation)
    raw = new.raw(new.test.inputs)
    torch.testing.assert_close(seen.test.inputs, (raw - before.mean) / before.deviation, atol=1e-5, rtol=1e-5)
    both = [row for row in seen.test.inputs if (old.test.inputs - row).abs().flatten(1).amax(1).min() < 1e-5]
    assert len(both) == len(old.test), "each image from before is what it was"
    with torch.no_grad():
        answers = (run.model.backbone(seen.test.inputs).argmax(1) == seen.test.targets).float().mean()
    assert dynrl.evaluate(run, budgets=(0.5,))["dense"]["all_execute_accuracy"] == pytest.approx(float(answers))
    few = Finetuning(rounds=1, epochs=1, steps=100, batch_size=16)
    monkeypatch.setattr(plans, "defaults", lambda *args, **more: replace(defaults(*args, **more), finetuning=few))
    resumed = resume(run.path, finetune=True, steps=300)
    assert resumed.model.backbone.trained_on == before and resumed.kind.tuned


def test_pretraining_that_was_interrupted_goes_on_as_it_began(photos, tmp_path):
    planned = plan("skip", str(photos), network=SMALL)
    planned = replace(planned, recipe=replace(planned.recipe, pretraining=RECIPE))
    pretrain_into(tmp_path, planned, plain_only=True)
    paint(photos, start=20, light=90)
    again = replace(planned, dataset=load_dataset(str(photos)))
    pretrain_into(tmp_path, again)
    plain, backbone = (load_backbone(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "backbone"))
    assert plain.trained_on == backbone.trained_on and plain.trained_on.mean == planned.dataset.mean
    with pytest.raises(ValueError, match="or the same data elsewhere"):
        (tmp_path / "backbone.safetensors").unlink()
        pretrain_into(tmp_path, plan("skip", str(paint(tmp_path / "other", start=50)), network=SMALL))


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_other_classes_are_refused_by_name(change, photos, run, tmp_path, capsys):
    if change == "renamed":
        (photos / "a").rename(photos / "z")
    else:
        paint(photos, "c")
    load_dataset.cache_clear()
    for words in refusals(run.path, photos, tmp_path):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr().err
        now = ["b", "z"] if change == "renamed" else ["a", "b", "c"]
        assert f"has the classes {now}, the network was trained on ['a', 'b']" in said, words
    assert not (tmp_path / "new").exists()


def test_labels_are_the_networks_outputs_of_the_same_names(photos, run):
    """A class that is gone, or another order, must not move the labels."""
    trained_on = run.model.backbone.trained_on
    data = image_folder(str(photos))
    other = {p: replace(data.split(p), targets=1 - data.split(p).targets) for p in PARTS}
    turned = replace(data, names=("b", "a"), **other)
    assert torch.equal(turned.seen_by(trained_on).test.targets, data.test.targets)
    zeros = {p: replace(data.split(p), targets=torch.zeros_like(data.split(p).targets)) for p in PARTS}
    only = replace(data, names=("b",), classes=1, **zeros)
    seen = only.seen_by(trained_on)
    assert seen.train.targets.eq(1).all() and (seen.classes, seen.names) == (2, ("a", "b"))


def test_what_was_kept_from_a_network_of_an_earlier_version_is_kept_from_it(photos):
    data = image_folder(str(photos))
    told = data.provenance.to_dict()
    assert data.seen_by(Provenance.read(told, "here")) is data and told.pop("apart")
    seen = data.seen_by(Provenance.read(told, "here"))
    few = math.ceil(0.1 * len(data.train))
    assert torch.equal(seen.unseen.inputs, data.train.inputs[-few:])
    assert torch.equal(seen.for_backbone.train.inputs, data.train.inputs[:-few])
    assert seen.fingerprint == data.fingerprint and seen.provenance == Provenance.read(told, "here")


def test_other_shapes_and_types_are_refused(photos, run):
    trained_on, data = run.model.backbone.trained_on, image_folder(str(photos))
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 16, 16\), .* got \(1, 8, 8\)"):
        image_folder(f"{photos}@8").seen_by(trained_on)
    with pytest.raises(ValueError, match="raw inputs of type uint8, .* got float32"):
        replace(data, dtype="float32").seen_by(trained_on)


def test_epochs_that_are_drawn_anew_are_seen_alike():
    split = Split(torch.rand(8, 4), torch.arange(8) % 2)
    data = Dataset("drawn", 2, split, split, split, Augmentation(), 0.5, 2.0, anew=lambda seed: split)
    seen = data.seen_by(replace(data.provenance, mean=1.0, deviation=4.0))
    torch.testing.assert_close(seen.in_epoch(0, 1).train.inputs, (split.inputs * 2 + 0.5 - 1) / 4)


class Named(TorchDataset):
    """A torch Dataset as torchvision has them."""

    classes = ("cat", "dog", "fox")

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return (torch.full((1, 4, 4), i) + i % 2).to(torch.uint8), i % 2


def test_names_and_pixels_of_a_torch_dataset_are_kept():
    data = own_dataset(Named())
    assert (data.names, data.classes, data.dtype) == (("cat", "dog", "fox"), 3, "uint8")
    raw = torch.stack([Named()[i][0] for i in range(3)])
    torch.testing.assert_close(data.provenance.preprocess(raw), (raw / 255 - data.mean) / data.deviation)
    part, _ = random_split(Named(), [30, 10])
    assert own_dataset(part).names == Named.classes
    few = Named()
    few.classes = ("cat",)
    with pytest.raises(ValueError, match="got 1 names and targets up to 1"):
        own_dataset(few)
    floats = own_dataset((torch.randn(20, 3), torch.arange(20) % 2))
    assert floats.names == ("0", "1") and own_dataset((torch.randn(20, 3), torch.randn(20))).names == ()
    with pytest.raises(ValueError, match="raw inputs of torch.float32, .* got torch.uint8"):
        floats.provenance.preprocess(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("change", [{"mean": float("nan")}, {"deviation": 0.0}, {"dtype": "nosuch"}, {"more": 1}])
def test_what_is_no_provenance_is_refused_with_its_file(change, run, tmp_path):
    backbone, notes = load_backbone(run.backbone_file)
    backbone.trained_on = None
    wrong = {name: 0.0 if value != value else value for name, value in change.items()} | (
        {"deviation": -1.0} if "mean" in change else {}
    )
    backbone.save(tmp_path / "b.safetensors", **notes | {"trained_on": notes["trained_on"] | wrong})
    with pytest.raises(ValueError, match=r"b\.safetensors: notes\.trained_on is no provenance"):
        load_backbone(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", shipped())
def test_a_file_of_other_inputs_than_it_was_trained_on_is_refused_unbuilt(name, tmp_path, monkeypatch):
    tensors, metadata = load_tensors(SHIPPED / name / "backbone.safetensors", "backbone")
    shape = metadata["config"]["input_shape"]
    assert shape == metadata["notes"]["trained_on"]["input_shape"]
    metadata["config"]["input_shape"] = [1000 * length for length in shape]
    save_tensors(tmp_path / "b.safetensors", "backbone", tensors, metadata)
    monkeypatch.setitem(FAMILIES, metadata["family"], None)
    with pytest.raises(ValueError, match=r"b\.safetensors: config\.input_shape: expected \[.*\], as it was trained on"):
        load_backbone(tmp_path / "b.safetensors")


def test_data_that_moved_are_named_and_compared(photos, run, tmp_path, capsys):
    """In the commands and in the calls; other data are refused, though they look alike."""
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    shutil.rmtree(photos)
    load_dataset.cache_clear()
    with pytest.raises(ValueError, match="elsewhere now, name that place"):
        dynrl.evaluate(run)
    other = paint(tmp_path / "other", start=40)
    for words in (("evaluate",), ("calibrate", "--batch-size", "2"), ("train", "skip", "--resume")):
        with pytest.raises(SystemExit):
            main([*words, str(run.path), "--data", str(other)])
        assert "was trained on other data" in capsys.readouterr().err, words
    assert dynrl.evaluate(run, budgets=(0.5,), data=str(moved))["data"] == str(moved)
    main(["calibrate", str(run.path), "--batch-size", "2", "--data", str(moved)])
    assert resume(run.path, str(moved)).data == str(moved)
    assert dynrl.evaluate(run.path, budgets=(0.5,))["classes"] == ["a", "b"], "the run knows its new place"


def test_networks_that_see_the_data_otherwise_stand_in_no_report(photos, run, tmp_path):
    planned = plan("skip", str(paint(photos, start=20, light=90)), network=SMALL)
    planned = replace(planned, recipe=replace(planned.recipe, pretraining=RECIPE))
    pretrain_into(tmp_path, planned, plain_only=True)
    with pytest.raises(ValueError, match="expected networks that see the data alike"):
        dynrl.evaluate(run, smaller=[tmp_path])


def test_names_that_do_not_fit_are_refused():
    split = Split(torch.rand(8, 4), torch.arange(8) % 2)
    for names in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match="expected 2 different names of classes"):
            Dataset("named", 2, split, split, split, Augmentation(), names=names)


def test_fingerprints_say_what_data_are_not_how_they_are_standardised(photos):
    data = image_folder(str(photos))
    other = replace(data.provenance, mean=data.mean + 0.1, deviation=2 * data.deviation)
    assert data.seen_by(other).fingerprint == data.fingerprint
    assert image_folder(str(paint(photos, start=20, count=1))).fingerprint != data.fingerprint


def relabelled(data):
    """The same inputs, with the labels of the test inverted."""
    return replace(data, test=replace(data.test, targets=1 - data.test.targets))


def test_other_labels_and_other_numbers_are_other_data(photos, tmp_path):
    """Whatever the inputs are: photos, texts, numbers, numbers that are too small to count in 255ths, tokens by name."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(40) % 2
    numbers = [1e-4 * torch.randn(40, 3, generator=generator) for _ in range(2)]
    tokens = [{"ids": ids} for ids in (torch.arange(80).view(40, 2), torch.arange(80).view(40, 2))]
    tokens[1]["ids"][3, 1] = 8
    pairs = [own_dataset((each, labels)) for each in numbers]
    assert pairs[0].fingerprint == pairs[1].fingerprint, "so the second digest is what tells"
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("bad", "good"):
        (texts / f"{name}.txt").write_text("".join(f"{name} text {i}\n" for i in range(40)))
    for data, other in (
        (pairs[0], pairs[1]), (pairs[0], own_dataset((numbers[0], 1 - labels))),
        (own_dataset((tokens[0], labels)), own_dataset((tokens[1], labels))),
        *((made, relabelled(made)) for made in (pairs[0], image_folder(str(photos)), text_folder(str(texts)))),
        (pairs[0], replace(pairs[0], names=("cat", "dog"))),
    ):  # fmt: skip
        known = replace(data.provenance, data="elsewhere")
        data.check_same(known)
        with pytest.raises(ValueError, match="expected elsewhere, or the same data elsewhere, got .* are others"):
            other.check_same(known)


def test_data_stay_the_same_whatever_network_sees_them():
    """Rounding moves the last digits of what is standardised anew."""
    data = own_dataset((torch.randn(40, 3), torch.arange(40) % 2))
    seen = data.seen_by(replace(data.provenance, mean=3.7, deviation=0.3))
    assert not torch.equal(seen.raw(seen.train.inputs), data.raw(data.train.inputs))
    assert seen.content == data.content
    assert replace(seen, test=data.train).content != data.content


def test_a_second_data_set_of_a_name_never_has_the_labels_of_the_first():
    data = replace(own_dataset((torch.rand(40, 3), torch.arange(40) % 2)), name="mine")
    assert as_dataset(data) is data and as_dataset(replace(data)) is data
    with pytest.raises(ValueError, match="another data set named 'mine', with other inputs, targets or names"):
        as_dataset(relabelled(data))
    del DATASETS["mine"]
    pixels, labels = zip(*(Named()[i] for i in range(40)), strict=True)
    unnamed, named = as_dataset((torch.stack(pixels), torch.tensor(labels))), as_dataset(Named())
    assert named.name == unnamed.name and named.names == load_dataset(named.name).names == Named.classes


def test_a_run_takes_no_other_data_of_its_name(tmp_path):
    """Not even in another process, which never saw the first; files of earlier versions tell of inputs only."""
    splits = [Split(torch.rand(60, 1, 16, 16), torch.arange(60) % 2) for _ in range(3)]
    data = Dataset("mine", 2, *splits, Augmentation())
    backbone = SkipResNet((1, 16, 16), 2, layers=(2,), widths=(4,), stem_stride=2)
    short = {"agent": "gate", "steps": 64, "num_envs": 32, "price_range": (0.01, 1.0)}
    run = train(backbone, data, out=tmp_path / "run", pretrain=False, **short)
    del DATASETS["mine"]
    load_dataset.cache_clear()
    with pytest.raises(ValueError, match="was trained on other data of the name 'mine'; hand those over again"):
        resume(run.path, relabelled(data), steps=128)
    assert resume(run.path, data, steps=128).finished
    written = read_json(run.data_file)
    assert written.pop("content") == data.content
    write_json(run.data_file, written)
    assert RunFolder(run.path).data_known.content is None and run.dataset(data) is data
    del DATASETS["mine"]


MEAN, DEVIATION = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RECIPES = {  # what says so: torchvision's transforms, timm's dictionary, Hugging Face's processors
    "a pair": (list(MEAN), DEVIATION),
    "an object": SimpleNamespace(crop_size=[224], mean=list(MEAN), std=list(DEVIATION)),
    "a dictionary": {"input_size": (3, 16, 16), "mean": MEAN, "std": DEVIATION},
    "a processor": SimpleNamespace(
        image_mean=MEAN, image_std=DEVIATION, do_normalize=True, do_rescale=True, rescale_factor=1 / 255
    ),
    "a processor of 0 to 255": SimpleNamespace(
        image_mean=[255 * each for each in MEAN], image_std=[255 * each for each in DEVIATION], do_rescale=False
    ),
}


@pytest.mark.parametrize("given", RECIPES.values(), ids=RECIPES)
def test_weights_say_what_inputs_are_standardised_by(given):
    found = Standard.of(given)
    assert found.mean == pytest.approx(MEAN) and found.deviation == pytest.approx(DEVIATION)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.nn.Flatten(), "expected a mean and a deviation as a pair, or what has them .* got Flatten"),
        ({"mean": 0.5}, "expected a mean and a deviation as a pair"),
        ((0.5, 0), "a deviation above 0"), ((0.5, "b"), "a deviation above 0"), (((), ()), "a deviation above 0"),
        ((0.5, DEVIATION), "for each of the channels"), ((MEAN[:2], DEVIATION[:2]), r"inputs \(3, 16, 16\)"),
        (SimpleNamespace(image_mean=MEAN, image_std=DEVIATION, rescale_offset=True), "standardises twice"),
    ],
)  # fmt: skip
def test_other_standards_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SkipResNet((3, 16, 16), 2, layers=(2,), widths=(4,)).standardised_by(given)


def test_a_network_from_elsewhere_sees_inputs_by_its_own_standard(tmp_path):
    """In every way that it may be handed over; and from then on, its file says so."""
    pixels, labels = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8), torch.arange(60) % 2
    backbone = SkipResNet((3, 16, 16), 2, layers=(2,), widths=(4,)).standardised_by(RECIPES["an object"])
    (tmp_path / "saved").mkdir()
    backbone.save(tmp_path / "saved" / "backbone.safetensors")
    short = {"agent": "gate", "steps": 64, "num_envs": 32, "price_range": (0.01, 1.0)}
    shift, scale = (torch.tensor(each).view(-1, 1, 1) for each in (MEAN, DEVIATION))
    for decision, more in ((backbone, {"pretrain": False}), ("skip", {"backbone": tmp_path / "saved"})):
        run = train(
            decision, (pixels, labels), out=tmp_path / f"run-{len(more)}-{decision is backbone}", **more, **short
        )
        standardised = run.model.preprocess(pixels)
        torch.testing.assert_close(standardised, (pixels / 255 - shift) / scale)
        known = load_backbone(run.backbone_file)[0].trained_on
        assert (known.mean, known.deviation, known.classes) == (MEAN, DEVIATION, ("0", "1"))
    assert run.dataset().seen_by(known).train.inputs.std() != run.dataset().train.inputs.std()
    with pytest.raises(ValueError, match="was trained on own-"):
        run.backbone.standardised_by((0, 1))


def test_inputs_are_not_standardised_twice():
    """A `Dataset` whose transforms standardise already is told from pixels, and may say that it is ready."""
    backbone = SkipResNet((3, 16, 16), 2, layers=(2,), widths=(4,))
    data = own_dataset((torch.randn(60, 3, 16, 16), torch.arange(60) % 2))
    with pytest.raises(ValueError, match=r"expected pixels from 0 to 1 .* say standardised_by\(\(0, 1\)\)"):
        plan(backbone.standardised_by(RECIPES["a dictionary"]), data)
    ready = plan(backbone.standardised_by((0, 1)), data, agent="gate").dataset
    torch.testing.assert_close(ready.test.inputs, data.raw(data.test.inputs))


def unseeded():
    """Labels of noise, split without a seed."""
    order = torch.randperm(60)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.rand(60, 1, 16, 16, generator=generator), torch.randint(2, (60,), generator=generator)
    return standardised("unseeded", 2, Augmentation(), [(inputs[rows], labels[rows]) for rows in order.split(20)])


def test_rows_that_were_trained_on_never_test(tmp_path, monkeypatch):
    """A plugin's parts may be others in the next process: whoever loads them again is told, wherever that is."""
    again = "expected unseeded as it was trained on, .* with a fixed seed"
    monkeypatch.setitem(DATASETS, "unseeded", unseeded)
    backbone = SkipResNet((1, 16, 16), 2, layers=(2,), widths=(4,), stem_stride=2)
    short = {"agent": "gate", "steps": 64, "num_envs": 32, "price_range": (0.01, 1.0)}
    run = train(backbone, "unseeded", out=tmp_path / "run", pretrain=False, **short)
    assert run.dataset() is load_dataset("unseeded") is run.dataset("unseeded")
    load_dataset.cache_clear()
    for refused in (
        lambda: dynrl.evaluate(run.path), lambda: run.dataset("unseeded"), lambda: resume(run.path, steps=128),
        lambda: plan("skip", "unseeded", run.path, agent="gate"),
        lambda: SkipVectorEnv(backbone=run.backbone, data="unseeded"),
        lambda: load_dataset("unseeded").check_same(run.backbone.trained_on),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=again):
            refused()
    old = replace(run.backbone.trained_on, content=None)
    assert load_dataset("unseeded").seen_by(old), "files of earlier versions do not tell"


def test_data_whose_rows_keep_their_parts_may_change():
    """The digits of another version, say; but not what a plugin makes of them under their name."""
    digits = load_dataset("digits")
    known = replace(digits.provenance, content="another version's")
    assert digits.seen_by(known) is digits and digits.seen_by(replace(known, mean=0.1)).seen_by(known)
    with pytest.raises(ValueError, match="expected digits as it was trained on"):
        replace(digits, test=digits.validation).seen_by(known)
