"""Training from Python: data and backbones of one's own, silence, refusals before anything is made, going on."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset

import dynrl
from dynrl.agents.gates import Gates
from dynrl.agents.joint import tuning_file
from dynrl.backbones import FAMILIES, ExitModule, Models, SkipModule, SkipResNet, load_backbone
from dynrl.data import Augmentation, Dataset, Split, as_dataset, load_dataset, own_dataset
from dynrl.data.own import SHARE
from dynrl.deploy import policy_fingerprint
from dynrl.evaluation import score
from dynrl.files import load_tensors, read_json, write_json
from dynrl.finetuning import Finetuning
from dynrl.inputs import Named, parts
from dynrl.plans import plan, plan_again
from dynrl.policies import load_policy, save_policy
from dynrl.pretraining import Recipe, pretrain
from dynrl.progress import talking
from dynrl.provenance import Provenance
from dynrl.runs import RunFolder
from dynrl.schema import parse
from dynrl.settings import Settings
from dynrl.tasks import CLASSIFICATION, Detection, Regression, Segmentation
from dynrl.training import learn, make_run, nothing_learned, pretrain_into, resume, train
from tests.cases import make_policy

pytestmark = pytest.mark.usefixtures("registries")

RECIPE = Recipe(12, 32, 5e-3, optimizer="adam")
SHORT = {"agent": "gate", "steps": 600, "num_envs": 16, "price_range": (0.1, 2.0)}


def small_images(count=200, classes=3):
    """Inputs [count, 1, 8, 8] of which a bright row tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    images[torch.arange(count), 0, labels] += 3
    return images, labels


class Pairs(TorchDataset):
    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return self.inputs[i].numpy(), int(self.targets[i])


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).relu()


def own_backbone(classes=3, blocks=("2", "3")):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Residual(), Residual(), nn.Linear(16, classes))
    return SkipModule(module, (1, 8, 8), list(blocks))


# Data ---------------------------------------------------------------------------------------------------------


def test_pairs_become_three_splits():
    inputs, labels = small_images()
    data = own_dataset((inputs, labels))
    assert data.task == CLASSIFICATION and data.classes == 3 and data.input_shape == (1, 8, 8)
    few = int(SHARE * len(inputs))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [len(inputs) - 2 * few, few, few]
    raw = torch.cat([part.inputs for part in (data.train, data.validation, data.test)]) * data.deviation + data.mean
    met = sorted(map(tuple, raw.flatten(1).round(decimals=3).tolist()))
    assert met == sorted(map(tuple, inputs.flatten(1).round(decimals=3).tolist()))  # each in one part
    assert float(data.train.inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=1e-5)
    same, other = own_dataset((inputs, labels)), own_dataset((inputs, labels), seed=1)
    assert torch.equal(same.test.inputs, data.test.inputs) and same.name == data.name
    assert not torch.equal(other.test.targets, data.test.targets) or other.name != data.name


class Broken(Pairs):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("no image")
        return super().__getitem__(i)


class Backwards(Pairs):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return np.asarray(x)[::-1], y


class Made(Pairs):
    def __getitem__(self, i):
        return self.inputs[i], int(self.targets[i])


def test_inputs_that_another_network_made_carry_no_graph():
    made = torch.nn.Linear(4, 4)(torch.rand(20, 4))
    for data in ((made, torch.arange(20) % 2), ({"x": made}, torch.arange(20) % 2), Made(made, torch.arange(20) % 2)):
        assert not any(x.requires_grad for x in parts(own_dataset(data).train.inputs).values())


def test_all_ways_to_hold_pairs_are_the_same_data():
    inputs, labels = small_images(40)
    names = {
        own_dataset(data).name
        for data in ((inputs, labels), [inputs, labels], TensorDataset(inputs, labels), Pairs(inputs, labels))
    }
    assert len(names) == 1
    assert own_dataset((inputs, labels + 1)).name not in names


class Mixed(Pairs):
    """Its first half are pixels in 0 to 255, and the rest are in 0 to 1."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x * 255).astype("uint8") if i < 10 else x, y


def test_large_numbers_keep_their_differences():
    """Unix times, one a second, would be as few numbers as float32 has there: one in 128."""
    seconds = 1_700_000_000 + torch.arange(1000)
    pictures = torch.stack([seconds.view(-1, 1, 1).expand(-1, 2, 2).double(), torch.rand(1000, 2, 2).double()], 1)
    for times in (torch.stack([seconds, seconds], 1), torch.stack([seconds, seconds], 1).double(), pictures):
        data = own_dataset((times, seconds % 2))
        first = data.train.inputs.flatten(1)[:, 0]
        assert len(first.unique()) == len(data.train) == 800
        assert float(first.std()) == pytest.approx(1, abs=1e-3) and float(first.mean()) == pytest.approx(0, abs=1e-3)
        moved = times.clone()
        moved[3] += 1
        assert own_dataset((moved, seconds % 2)).content != data.content
        again = data.provenance.preprocess(times).flatten(1)[:, 0]
        assert set(first.tolist()) <= set(again.tolist()), "a deployed network sees the same"


def test_numbers_make_a_regression():
    inputs = torch.randn(50, 4)
    data = own_dataset((inputs, inputs.sum(1)))
    assert data.task == Regression.of(data.train.targets) and data.classes == 1 and data.train.targets.shape == (40, 1)
    assert own_dataset((inputs.double(), inputs[:, :2].double())).classes == 2


def test_classes_of_pixels_make_a_segmentation():
    images = torch.randn(20, 2, 6, 5)
    classes = (images[:, 0] > 0).long()
    data = own_dataset((images, classes))
    assert data.task == Segmentation() and data.classes == 2 and data.train.targets.shape == (16, 6, 5)
    assert torch.equal(data.raw(data.test.inputs)[:, 0] > 0, data.test.targets == 1)
    with pytest.raises(ValueError, match="for each pixel of images"):
        own_dataset((images, classes[:, :5]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (3, "got int"), ([1, 2], "got list"), ((torch.randn(5, 4), torch.zeros(5)), "at least 10 inputs"),
        ((torch.randn(20, 4), torch.zeros(19)), "as many targets"), ((torch.randn(20), torch.zeros(20)), "at least 10 inputs"),
        ((torch.randn(20, 4), torch.zeros(20).long() - 1), "classes .n. from 0 on"),
        ((torch.randn(20, 4), torch.zeros(20, 2).long()), "classes .n. from 0 on"),
        ((torch.randn(20, 4), torch.zeros(20).bool()), "classes .n. from 0 on"),
        ((torch.randn(20, 4), torch.eye(4).repeat(5, 1)), r"of zeros with a 1 in each row; give targets\.argmax"),
        ((torch.randn(20, 4).numpy(), torch.zeros(20)), "got tuple of 2, the first of them ndarray, Tensor"),
        ((torch.randn(20, 4), torch.zeros(20).long()), "two classes or more"),
        ((torch.randn(20, 4), torch.ones(20).long()), "two classes or more .* are 1; a regression"),
        ((torch.randn(20, 4), 10**9 * (torch.arange(20) % 2)), "got 1,000,000,000 in 20 targets, of which 2 differ; "),
        (Backwards(torch.rand(20, 4), torch.zeros(20)), r"got ndarray \(.*negative.*\); .* np.ascontiguousarray"),
        ((torch.full((20, 4), torch.nan), torch.arange(20) % 2), "NaN or infinity"),
        *(((torch.randn(20, 4), torch.arange(20).to(kind)), f"got targets torch.{name} .* targets.long.. makes classes")
          for name in ("uint16", "uint32", "uint64", "complex64") for kind in [getattr(torch, name)]),
        ((torch.randn(20, 4), torch.ones(20)), "expected targets that differ, .* got 0.0 for targets from 1 to 1"),
        ((torch.randn(20, 4), 1e9 + torch.rand(20).double()), "whose differences float32 can hold, .* subtract their mean"),
        ((torch.randn(20, 4), 1e30 * torch.rand(20)), "with a variance that float32 can hold, got inf"),
        ((torch.zeros(20, 0), torch.arange(20) % 2), r"that are not empty, .* got \[20, 0\]"),
        ((torch.randn(20, 4).to(torch.complex64), torch.arange(20) % 2), "expected real inputs"),
        (Mixed(torch.rand(20, 4), torch.zeros(20)), r"of one shape and type, got torch\.float32, torch\.uint8; give all as"),
        (Pairs(torch.zeros(0, 4), torch.zeros(0)), "to hold pairs"),
        (Broken(torch.zeros(20, 4), torch.zeros(20)), r"pair 7 of Broken cannot be read \(OSError: no image\); repair"),
    ],
)  # fmt: skip
def test_what_are_no_pairs_is_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        own_dataset(data)


def test_a_torch_dataset_of_unequal_inputs_is_refused():
    class Unequal(Pairs):
        def __getitem__(self, i):
            return torch.zeros(3 + i % 2), 0

    with pytest.raises(ValueError, match="of one shape"):
        own_dataset(Unequal(torch.zeros(12, 1), torch.zeros(12)))


class Tokens(TorchDataset):
    """Pairs whose inputs are tensors by name, in a dict each."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"ids": torch.arange(i, i + 4), "weight": torch.full((2,), float(i))}, i % 2


def test_tensors_by_name_stay_as_they_are():
    data = own_dataset(Tokens())
    assert data.input_shape == {"ids": (4,), "weight": (2,)} and data.dtype == {"ids": "int64", "weight": "float32"}
    rows = data.train.inputs
    assert rows["ids"].dtype is torch.int64 and torch.equal(rows["ids"][:, 0].float(), rows["weight"][:, 0])
    assert torch.equal(data.train.targets, rows["ids"][:, 0] % 2)
    both = {name: torch.stack([Tokens()[i][0][name] for i in range(40)]) for name in ("ids", "weight")}
    same = own_dataset((both, torch.arange(40) % 2))
    assert same.name == data.name and as_dataset(Tokens()) is as_dataset(Tokens())
    known = Provenance.read(json.loads(json.dumps(data.provenance.to_dict())), "here")
    assert known == data.provenance and data.seen_by(known) is data
    assert known.preprocess(rows)["ids"] is rows["ids"]
    placed = data.test.to(torch.device("cpu"), torch.bfloat16).inputs
    assert (placed["ids"].dtype, placed["weight"].dtype) == (torch.int64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected 'ids' of torch\.int64, got torch\.float32"):
        known.preprocess(Named({"ids": rows["ids"].float(), "weight": rows["weight"]}))
    with pytest.raises(ValueError, match="expected 3 classes, as many as the backbone has outputs, got 2 in own-"):
        plan(SkipModule(Ids(3), rows, ["block"]), Tokens())
    assert plan(SkipModule(Ids(2), rows, ["block"]), Tokens()).backbone.form == data.form


class Ids(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(50, 4), Residual(4), nn.Linear(4, classes)

    def forward(self, ids, weight):
        return self.head(self.block(self.embed(ids).mean(1)) * weight[:, :1])


def test_data_is_known_by_its_name_from_then_on():
    data = as_dataset(small_images(30))
    assert load_dataset(data.name).train.inputs is data.train.inputs
    assert as_dataset("digits") is load_dataset("digits") and as_dataset(load_dataset("digits")).name == "digits"
    split = Split(torch.zeros(3, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match="another data set named 'digits'"):
        as_dataset(Dataset("digits", 2, split, split, split, Augmentation()))


# Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learns", "plain_epochs", "full_share"), [(True, 12, 0.25), (True, 0, 0.25), (False, 1, 0.25), (False, 0, 0.0)]
)
def test_a_network_that_learned_nothing_is_named(learns, plain_epochs, full_share, tmp_path, capfd):
    """But not one that nobody trained: a recipe may begin with random routes, and may leave the full route out."""
    images, labels = small_images()
    if not learns:
        labels[torch.arange(200) % 4 > 0] = 0  # so frequent a class that an untrained network is no better than it
    planned = plan(own_backbone(), (images, labels))
    pretraining = replace(
        RECIPE, plain_epochs=plain_epochs, full_share=full_share, learning_rate=5e-3 if learns else 1e-9
    )
    with talking(True):
        pretrain_into(tmp_path, replace(planned, recipe=replace(planned.recipe, pretraining=pretraining)))
    heard, said = capfd.readouterr()
    assert ("plain: has learned nothing: accuracy is" in said) == (not learns and plain_epochs > 0), said
    assert ("backbone: has learned nothing" in said) == (not learns and full_share > 0), said
    assert ("plain: accuracy" in heard) == (plain_epochs > 0), heard
    assert ("along the full route, which was not trained" in heard) == (full_share == 0), heard
    assert (RunFolder(tmp_path).plain is None) == (plain_epochs == 0)


def test_what_is_rare_need_not_be_as_rare_in_each_split():
    """One answer for all has a balanced accuracy of a half, whatever share of class 1 the task was made with."""
    split = Split(torch.zeros(40, 2), torch.arange(40) % 2, Detection(0.01))
    assert "one answer for all inputs has 0.5." in (nothing_learned(split, 0.5) or "")
    assert nothing_learned(split, 0.9) is None


def test_a_network_and_data_of_ones_own(tmp_path, capfd):
    """Pretrained under random routes, learned, plugged, gone on with; and not a word is said."""
    data, backbone = small_images(), own_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    run = train(backbone, data, out=tmp_path / "run", pretrain=RECIPE, **SHORT)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items()), "the user's stays"
    settings = Settings.read(run.config_file)
    assert settings.problem.data == own_dataset(data).name and settings.learning.agent == "gate"
    model, test = dynrl.load(run.path), own_dataset(data).test
    assert run.finished and (model(test.inputs).argmax(1) == test.targets).float().mean() > 0.8
    assert load_backbone(run.backbone_file)[0].fingerprint() != backbone.fingerprint()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    resume(run.path, data)
    assert plan_again(run, data).recipe.pretraining == RECIPE  # a run that was killed is pretrained as it was asked to
    with pytest.raises(ValueError, match="was trained on other data: expected own-"):
        resume(run.path, small_images(50))
    # Another process knows neither.
    code = f"from dynrl.training import resume; resume({str(run.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "hand it over again, by data=" in done.stderr


def test_a_trained_backbone_is_taken_as_it_is(tmp_path):
    data, backbone = small_images(), own_backbone()
    run = train(backbone, data, out=tmp_path / "run", pretrain=False, **SHORT)
    assert load_backbone(run.backbone_file)[0].fingerprint() == backbone.fingerprint()
    assert not run.plain_file.exists()
    dynrl.plug(backbone, run.policy_file)(data[0])  # fits the user's own


class Killed(BaseException):
    """A kill, as far as files are concerned."""


@pytest.mark.parametrize("asked", ["by default", "by a recipe", "by settings"])
def test_what_a_kill_interrupts_before_there_is_a_backbone_goes_on_with_the_same_network(asked, tmp_path, monkeypatch):
    """Not with one that the settings would build: nothing would tell that it is another."""
    own, data = asked != "by settings", small_images()
    more = (
        {"pretrain": RECIPE} if asked == "by a recipe" else {} if own else {"network": ("widths=[2,2]", "layers=[1,1]")}
    )

    def killed(*rest, **named):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dynrl.pretraining._learn_batch", killed)
        train(own_backbone() if own else "skip", data, out=tmp_path / "run", epochs=2, **SHORT, **more)
    run = RunFolder(tmp_path / "run")
    first, recipe = load_backbone(run.first_file)[0], read_json(run.recipe_file)
    assert not own or first.fingerprint() == own_backbone().fingerprint()
    assert (recipe == json.loads(json.dumps(asdict(RECIPE)))) == (asked == "by a recipe")
    with pytest.raises(
        ValueError, match=r"expected the backbone that .*run was given, or none, got another: skip_module"
    ):
        resume(run.path, data, backbone=own_backbone(blocks=["3"]))
    FAMILIES.pop("skip_module", None)  # as in another program
    if own:
        with pytest.raises(ValueError, match="unknown family 'skip_module'"):
            resume(run.path, data)
    again = plan_again(run, data, own_backbone() if own else None)
    assert again.backbone.fingerprint() == first.fingerprint() and asdict(again.recipe.pretraining) == asdict(
        parse(Recipe, recipe)
    )
    for file in (run.recipe_file, run.first_file):
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=f"{file.name}, .*put that back"):
            resume(run.path, data, backbone=own_backbone() if own else None)
        file.write_bytes(kept)


def test_a_trained_backbone_is_in_a_run_from_the_beginning_or_there_is_no_run(tmp_path, monkeypatch):
    """What a full disk or a kill would leave without it would be pretrained when it goes on."""

    def full(*rest, **named):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("dynrl.backbones.base.save_tensors", full)
        train(own_backbone(), small_images(), out=tmp_path / "run", pretrain=False, **SHORT | {"steps": 64})
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dynrl.training.learn", lambda *rest: (_ for _ in ()).throw(Killed))
        train(own_backbone(), small_images(), out=tmp_path / "run", pretrain=False, **SHORT | {"steps": 64})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "backbone.safetensors",
        "config.json",
        "data.json",
    ]
    assert resume(tmp_path / "run", small_images()).backbone.fingerprint() == own_backbone().fingerprint()


def test_what_is_frozen_is_taken_as_it_is(tmp_path):
    frozen, recipe = own_backbone().requires_grad_(False), Recipe(1, 32)
    for more in ({}, {"pretrain": recipe}, {"pretrain": False, "finetune": True}):
        with pytest.raises(ValueError, match=r"train in SkipModule, .* none .* needs a gradient.*pretrain=False"):
            dynrl.train(frozen, small_images(), out=tmp_path / "run", **SHORT, **more)
    exits = ExitModule(frozen.module, (1, 8, 8), ["2", "3"])
    data = as_dataset(small_images())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"needs a gradient, .* leave the plain network as it is: plain=False"):
        pretrain(copy.deepcopy(exits), data, recipe, random_routes=False)
    trained = pretrain(copy.deepcopy(exits), data, replace(recipe, plain_epochs=0))
    assert not torch.equal(trained.heads[0].weight, exits.heads[0].weight)
    mixed = Models([nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), frozen.module], (1, 8, 8))
    before = copy.deepcopy(mixed.state_dict())
    after = pretrain(mixed, data, recipe).state_dict()
    assert {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])} == {"0"}


def test_a_network_of_a_known_family_stays_frozen_where_it_is_and_when_it_goes_on(tmp_path):
    """Files of weights do not say what is frozen."""
    own, data = SkipResNet((1, 8, 8), classes=3, layers=(1,), widths=(4,)), small_images()
    own.conv1.requires_grad_(False)
    planned = plan(own, data, epochs=1, **SHORT)
    pretrain_into(tmp_path, planned)
    assert torch.equal(load_backbone(tmp_path / "backbone.safetensors")[0].conv1.weight, own.conv1.weight)
    again = plan_again(make_run(planned, tmp_path / "run"), data).backbone
    assert [name for name, weight in again.named_parameters() if not weight.requires_grad] == ["conv1.weight"]


def test_a_program_may_train_several_of_one_family(tmp_path):
    data, all_blocks, fewer = small_images(), own_backbone(), own_backbone(blocks=["3"])
    runs = [
        train(each, data, out=tmp_path / str(len(each.points)), pretrain=False, **SHORT) for each in (all_blocks, fewer)
    ]
    for each, run in zip((all_blocks, fewer), runs, strict=True):
        assert load_backbone(run.backbone_file)[0].fingerprint() == each.fingerprint()
        dynrl.load(run.path)
    with pytest.raises(ValueError, match="'skip_module' is known here with other settings"):
        own_backbone(blocks=["2"]).save(tmp_path / "third.safetensors")
        load_backbone(tmp_path / "third.safetensors")


def test_it_is_tuned_in_turn_with_its_policy(tmp_path):
    planned = plan(own_backbone(), small_images(), finetune=True, **SHORT)
    tuning = Finetuning(rounds=1, epochs=1, steps=400, batch_size=32, optimizer="adam", learning_rate=1e-3)
    planned = replace(planned, recipe=replace(planned.recipe, pretraining=RECIPE, finetuning=tuning))
    run = make_run(planned, tmp_path / "run")
    assert learn(run, planned)
    tuned, notes = load_backbone(run.backbone_file)
    before = load_backbone(run.kept_file)[0].fingerprint()
    assert notes["rounds"] == 1 and tuned.fingerprint() != before
    dynrl.load(run.path)
    # Another run that tunes begins where this one began; one that does not takes what is plugged.
    again = make_run(planned, tmp_path / "again", run.path)
    assert load_backbone(again.backbone_file)[0].fingerprint() == before and not again.kept_file.exists()
    frozen = replace(
        planned, settings=replace(planned.settings, learning=replace(planned.settings.learning, finetune=False))
    )
    taken = make_run(frozen, tmp_path / "taken", run.path)
    assert load_backbone(taken.backbone_file)[0].fingerprint() == tuned.fingerprint() and taken.kept_file.is_file()


def test_what_was_tuned_is_not_tuned_again_when_checkpoints_are_gone(tmp_path, capfd):
    def planned(rounds):
        tuning = Finetuning(rounds, epochs=1, steps=64, batch_size=32)
        tuned = plan(own_backbone(), small_images(), finetune=True, **SHORT | {"steps": 64})
        return replace(tuned, recipe=replace(tuned.recipe, pretraining=replace(RECIPE, epochs=1), finetuning=tuning))

    def tuned(run, rounds):
        with talking(True):
            assert learn(run, planned(rounds))
        backbone, notes = load_backbone(run.backbone_file)
        assert notes["rounds"] == rounds
        return backbone.fingerprint()

    run = make_run(planned(1), tmp_path / "run")
    once = tuned(run, 1)
    twice = tuned(make_run(planned(2), tmp_path / "twice", run.path), 2)
    capfd.readouterr()
    shutil.rmtree(run.checkpoints)
    assert tuned(run, 1) == once and not run.checkpoints.exists(), "what is done stays"
    run.policy_file.unlink()
    assert tuned(run, 1) == once
    assert "begin again" not in capfd.readouterr().err
    tuning_file(run.checkpoints).unlink()
    assert tuned(run, 2) == twice
    assert "finetuning.safetensors is not there: fine-tuning and its policy begin again" in capfd.readouterr().err


def test_prices_are_found_and_written_down(tmp_path, monkeypatch):
    """Before anything is learned: a run that is killed then goes on with the same prices."""

    def killed(*rest):
        raise KeyboardInterrupt

    settings = {name: value for name, value in SHORT.items() if name != "price_range"}
    planned = plan(own_backbone(), small_images(), **settings)
    planned = replace(planned, recipe=replace(planned.recipe, pretraining=RECIPE))
    run = make_run(planned, tmp_path / "run")
    assert run.settings["price_range"] is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dynrl.training.train_policy", killed)
        learn(run, planned)
    found = Settings.read(run.config_file).learning.prices
    monkeypatch.setattr("dynrl.training.find_price_range", None)
    resumed = resume(run.path, small_images(), backbone=own_backbone())
    assert resumed.model.price_range == found and Settings.read(run.config_file).learning.prices == found


def test_budgets_are_what_all_of_validation_costs(tmp_path, monkeypatch):
    def drawn(settings, backbone, *rest):
        """A policy whose choices differ from input to input."""
        policy = make_policy(load_backbone(backbone)[0], settings.learning.prices)
        for weights in policy.parameters():
            weights.data = torch.randn_like(weights)
        return policy, True

    monkeypatch.setattr("dynrl.training.train_policy", drawn)
    data = small_images(12_000)
    run = train(own_backbone(), data, out=tmp_path / "run", pretrain=False, **SHORT)
    model, validation = run.model, run.dataset(data).validation
    assert len(validation) == 1200
    for price, macs in model.curve[::4]:
        model.set_price(price)
        assert score(model, validation).macs_fraction == pytest.approx(macs, rel=1e-6)


def test_a_call_may_talk(tmp_path, capfd):
    train(own_backbone(), small_images(), out=tmp_path / "run", pretrain=False, show=True, **SHORT)
    said = capfd.readouterr()
    assert "policy: " in said.out and "learning: 100%" in said.err


def test_settings_are_filled_in_by_decision_data_and_agent():
    usual = plan("skip", "digits").settings.learning
    assert (usual.steps, usual.num_envs, usual.price_range) == (300_000, 64, None)
    assert plan("skip", "digits", agent="gate").settings.learning.steps == 150_000
    adding = plan("hidden-update", "adding", hidden=3).settings.learning
    assert (adding.hidden, adding.num_envs, adding.finetune, adding.price_range) == (3, 256, True, (0.03, 1.0))
    assert plan("hidden-update").settings.problem.data == "sequential-digits"
    assert plan("skip", "digits", network=["widths=[4,4,4]"]).backbone.config["widths"] == [4, 4, 4]
    assert plan("jump", "needle", network=["follow=true"]).backbone.config["follow"]
    assert plan("skip", "digits", epochs=3).recipe.pretraining.length(False) == 3
    recipe = plan("skip", "digits", epochs=3, plain=False).recipe.pretraining
    assert [recipe.length(routes) for routes in (False, True)] == [0, 3]
    assert plan("skip", small_images(600)).recipe.pretraining.epochs == 100, "few images are not learned by heart"


def test_a_family_of_ones_own_is_named_in_the_settings_of_the_network():
    FAMILIES["mine"] = lambda classes, **more: own_backbone(classes)
    planned = plan("skip", small_images(), network=["family=mine", "depth=3"])
    assert planned.backbone.way == "traced" and planned.recipe.backbone == {"depth": 3}
    for network, reason in (
        (["family=nosuch"], "unknown family 'nosuch'; expected one of"), (["family=skip_gru", "widths=3"], "NAME=VALUE"),
        (["family=mine", "classes=3"], "NAME=VALUE"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            plan("skip", small_images(), network=network)


@pytest.mark.parametrize(
    ("decision", "data", "given", "reason"),
    [
        ("skip", "digits", {"nosuch": 1}, "unknown settings nosuch; expected network, epochs, plain, seed"),
        ("skip", "digits", {"steps": "many"}, "steps: expected int, got 'many'"),
        ("skip", "digits", {"agent": "nosuch"}, "unknown agent"), ("skip", "digits", {"reward": "nosuch"}, "unknown reward"),
        ("skip", "digits", {"policy": "nosuch"}, "unknown kind of policy"), ("skip", "digits", {"device": "nosuch"}, "no device"),
        ("skip", "digits", {"reward": "blockdrop"}, "decides upfront"), ("skip", 3, {}, "got int"),
        ("skip", "digits", {"network": ("nosuch=1",)}, "NAME=VALUE"), ("nosuch", "digits", {}, "unknown decision"),
        ("hidden-update", None, {"policy": "upfront"}, "needs images"), ("skip", "adding", {}, "no defaults"),
        ("skip", "digits", {"baseline": "group", "num_envs": 12}, "expected 8 x n"),
        (SkipResNet((1, 8, 8), classes=10, layers=(1,), widths=(4,)), "digits", {}, r"expected inputs \(1, 8, 8\), which"),
        (SkipResNet((1, 24, 24), classes=4, layers=(1,), widths=(4,)), "digits", {}, "expected 4 classes, .* got 10 in digits"),
        (torch.nn.ReLU(), "digits", {}, "got ReLU; a module becomes a backbone by SkipModule"),
        (SkipResNet((1, 8, 8), layers=(1,), widths=(4,)), "digits", {"network": ("a=1",)}, "leave it out"),
        (SkipResNet((1, 8, 8), layers=(1,), widths=(4,)), "digits", {"backbone": "here"}, "given twice"),
        ("skip", "digits", {"pretrain": False}, "of your own"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(decision, data, given, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        train(decision, data, **given)
    assert not list(tmp_path.iterdir())


def test_own_data_is_not_for_remote_processes():
    with pytest.raises(ValueError, match="bring it by a plugin"):
        plan(own_backbone(), small_images(), num_env_runners=2)


def test_a_run_goes_on_by_its_own_settings(tmp_path):
    run = make_run(plan("skip", "digits", **SHORT), tmp_path / "run")
    assert read_json(run.config_file)["learning"]["agent"] == "gate"
    again = plan_again(run, "digits", seed=0, num_learners=0, num_env_runners=0, **SHORT)
    assert Settings.read(run.config_file) == again.settings, "what is said again changes nothing"
    for changed, reason in (
        ({"seed": 1}, "begun with seed=0, not 1"), ({"agent": "ppo"}, "begun with agent='gate', not 'ppo'"),
        ({"steps": 1}, "begun with steps=.*, not 1"), ({"network": ("widths=[4,4,4]",)}, "begun with network="),
        ({"nosuch": 1}, "unknown settings nosuch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            resume(run.path, **changed)
    more = plan_again(run, steps=again.settings.learning.steps + 1, finetune=True).settings.learning
    assert more == replace(again.settings.learning, steps=more.steps, finetune=True)
    assert Settings.read(run.config_file) == again.settings, "a plan changes nothing"
    plan_again(run, finetune=True).settings.save(run.config_file)
    with pytest.raises(ValueError, match="begun with finetune=True, not False"):
        resume(run.path, finetune=False)
    with pytest.raises(ValueError, match="always fine-tuned"):
        plan("hidden-update", "adding", finetune=False)
    with pytest.raises(ValueError, match="no run folder"):
        resume(tmp_path)


def test_a_backbone_of_another_network_is_refused(tmp_path):
    SkipResNet((1, 8, 8), layers=(1,), widths=(4,)).save(tmp_path / "backbone.safetensors")
    for source, reason in ((tmp_path, "expected inputs"), (tmp_path / "nosuch", "expected a folder")):
        with pytest.raises(ValueError, match=reason):
            make_run(plan("skip", "digits"), tmp_path / "run", source)
    with pytest.raises(ValueError, match="poses 'skip', not 'exit'"):
        make_run(plan("exit", "digits"), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_networks_of_several_folders_are_the_models_of_a_run(tmp_path):
    """The plain network of each; a folder that has none gives its backbone."""
    digits, sources = load_dataset("digits"), [tmp_path / "large", tmp_path / "small"]
    for source, width, file in zip(sources, (8, 4), ("plain", "backbone"), strict=True):
        network = SkipResNet(digits.input_shape, layers=(1,), widths=(width,), stem_stride=4)
        network.trained_on = digits.provenance
        source.mkdir()
        network.save(source / f"{file}.safetensors")
    run = make_run(plan("model", "digits"), tmp_path / "run", sources)
    assert [member.config["widths"] for member in run.backbone.members] == [[4], [8]]
    assert run.backbone.trained_on == digits.provenance and not run.plain_file.exists()
    with pytest.raises(ValueError, match="expected one folder with a backbone of 'skip', got 2"):
        make_run(plan("skip", "digits"), tmp_path / "other", sources)
    settings = json.dumps([{"family": "skip_resnet", "layers": [1], "widths": [width]} for width in (4, 8)])
    with pytest.raises(ValueError, match="leave out network"):
        make_run(plan("model", "digits", network=(f"members={settings}",)), tmp_path / "other", sources)
    assert not (tmp_path / "other").exists()


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    run = train("skip", "digits", out=tmp_path / "run", backbone=backbone_of(tmp_path), **SHORT)
    steps = run.settings["steps"]
    assert run.finished
    # What was measured on the policy of before is gone with it; what tells no policy is kept while that stays as it is.
    measured = {"report": ["report.png", "regions.png"], "attack": ["attack.png"]}
    for name, pictures in measured.items():
        for each in (f"{name}.json", *pictures):
            (run.path / each).write_text("{}")
    assert resume(run.path).finished and (run.path / "report.json").exists()
    old = policy_fingerprint(dynrl.load(run.path))
    write_json(run.path / "report.json", {"policies": {"gate": [old]}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrl.training._learn", lambda folder, planned: folder.finished)
        assert not learn(run, plan_again(run, steps=3 * steps)), "what was learned is not what the settings say"
    resumed = resume(run.path, steps=3 * steps)
    assert policy_fingerprint(dynrl.load(run.path)) != old
    assert not [path.name for path in run.path.iterdir() if path.stem in (*measured, "regions")]
    assert resumed.finished and resumed.settings["steps"] == 3 * steps
    assert load_tensors(resumed.checkpoints / "gate.safetensors", "checkpoint")[1]["done"] >= 3 * steps


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_without_its_agents_checkpoint_keeps_its_policy(tuned, finished, tmp_path):
    """Where it could go on only from the beginning, Ctrl-C would leave less than there was."""

    def planned(**more):
        tuning = Finetuning(1, epochs=1, steps=64, batch_size=32)
        found = plan_again(run, small_images(), own_backbone(), **more)
        return replace(found, recipe=replace(found.recipe, finetuning=tuning))

    given = plan(own_backbone(), small_images(), finetune=tuned, **SHORT | {"steps": 64})
    run = make_run(given, tmp_path / "run", given.backbone)
    assert learn(run, planned())
    if not finished:
        policy, known = load_policy(run.policy_file)
        save_policy(run.policy_file, policy, known | {"finished": False})
    (run.checkpoints / "gate.safetensors").unlink()
    (run.checkpoints / "pretraining-plain.safetensors").touch()  # none of the agent's, as a kill may leave it
    for gone in (run.checkpoints / "nothing", run.checkpoints):
        shutil.rmtree(gone, ignore_errors=True)
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        run.forget()
        if finished:
            assert learn(run, planned())
        for more in ({"steps": 128}, {"finetune": True}, {})[: 3 - finished]:
            if not (finished and tuned and "finetune" in more):  # which is done
                with pytest.raises(ValueError, match="no checkpoint of its agent.*dynrl train skip --backbone"):
                    learn(run, planned(**more))
        assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    run.policy_file.unlink()
    assert learn(run, planned(steps=128)), "what holds no policy is learned anew"


def test_a_run_that_is_interrupted_before_its_agent_learned_goes_on(tmp_path, monkeypatch):
    """It has a policy by then, and a checkpoint of the agent, too."""
    start = Gates.start
    with monkeypatch.context() as patch:
        patch.setattr(Gates, "start", lambda agent: (signal.raise_signal(signal.SIGINT), start(agent)))
        run = train(own_backbone(), small_images(), out=tmp_path / "run", pretrain=False, **SHORT | {"steps": 64})
    assert run.policy is not None and not run.finished
    assert resume(run.path, small_images()).finished


@pytest.mark.parametrize(
    "name",
    ["times.json", "attacked.safetensors", "backbone-pretrained.safetensors", "checkpoints/backbone.safetensors"],
)
def test_a_run_goes_on_with_all_that_it_has_learned_by(name, tmp_path):
    """It would be charged other times, meet other inputs, or be tuned from what was tuned; nothing would tell."""

    def planned(**more):
        found = plan_again(run, small_images(), own_backbone(), **more)
        return replace(found, recipe=replace(found.recipe, finetuning=Finetuning(1, epochs=1, steps=64, batch_size=32)))

    asked = {"times.json": {"cost": "time"}, "attacked.safetensors": {"attacked": 0.3}}.get(name, {"finetune": True})
    given = plan(own_backbone(), small_images(), **SHORT | {"agent": "sb3-ppo", "steps": 64} | asked)
    run = make_run(given, tmp_path / "run", given.backbone)
    assert learn(run, planned())
    (file,) = run.path.rglob(name)
    file.unlink()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    run.forget()
    assert learn(run, planned()), "it is done"
    with pytest.raises(ValueError, match=f"{name} is not there"):
        learn(run, planned(steps=128))
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_policy_of_one_tuned_backbone_is_not_put_on_another(tmp_path):
    tuning = Finetuning(1, epochs=1, steps=64, batch_size=32)
    planned = plan(own_backbone(), small_images(), finetune=True, **SHORT | {"steps": 64})
    planned = replace(planned, recipe=replace(planned.recipe, finetuning=tuning, pretraining=replace(RECIPE, epochs=1)))
    first = make_run(planned, tmp_path / "first")
    learn(first, planned)
    frozen = plan(own_backbone(), small_images(), **SHORT | {"steps": 64})
    for source in (first.path, tmp_path / "second"):  # a copy of a copy is none of its own, either
        run = make_run(frozen, tmp_path / ("third" if source != first.path else "second"), source)
        learn(run, frozen)
        with pytest.raises(ValueError, match="tuned with another policy.*dynrl train skip --backbone .* --finetune"):
            plan_again(run, small_images(), own_backbone(), finetune=True)
    again = make_run(planned, tmp_path / "again", run.path)
    assert load_backbone(again.backbone_file)[0].fingerprint() == first.pretrained.fingerprint()


def backbone_of(folder):
    """A folder with an untrained backbone for digits."""
    (folder / "given").mkdir()
    SkipResNet((1, 24, 24), layers=(2,), widths=(4,), stem_stride=2).save(folder / "given" / "backbone.safetensors")
    return folder / "given"


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("lies", ["127.0.0.1:1", "auto"])
def test_a_run_that_did_not_begin_leaves_no_folder(lies, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    backbone = backbone_of(tmp_path)
    with pytest.raises(ValueError, match="expected a ray cluster at '127.0.0.1:1', found none"):
        train("skip", "digits", out=tmp_path / "run", backbone=backbone, steps=100, address=lies)
    with pytest.raises(ValueError, match="a batch of 5000 is larger than the 1131 training inputs"):
        own = SkipResNet((1, 24, 24), layers=(2,), widths=(4,), stem_stride=2)
        train(own, "digits", out=tmp_path / "run", pretrain=Recipe(epochs=1, batch_size=5000), **SHORT)
    assert not (tmp_path / "run").exists()
