"""Pretraining makes every route usable, and goes on where it was killed."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dynrl.backbones import Point, SkipModule, SkipResNet, choice_rates, load_backbone
from dynrl.backbones.base import Answer
from dynrl.data import DATASETS, Augmentation, Dataset, Split, load_dataset
from dynrl.envs import DECISIONS
from dynrl.evaluation import score_routes
from dynrl.inputs import training_format
from dynrl.policies import RandomPolicy
from dynrl.pretraining import Recipe, autocast, pretrain
from dynrl.recipes import DEFAULTS, defaults
from dynrl.routes import draw_routes
from dynrl.tasks import Regression, Restoration
from tests.cases import full_metric
from tests.toys import Looping, dropping

RECIPE = Recipe(epochs=3, batch_size=100)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the names of x86's instructions")
def test_bf16_is_for_processors_that_multiply_it():
    """Where it is emulated, training in it takes 2.5 times as long."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert autocast(torch.device("cpu"))._enabled == bool(flags & {"avx512_bf16", "amx_bf16"})


def fresh() -> SkipResNet:
    torch.manual_seed(0)
    return SkipResNet((1, 24, 24), layers=(2, 2), widths=(8, 16), stem_stride=2)


@dataclass(frozen=True)
class Killed(Augmentation):
    """Stands for a kill in the third epoch: 12 batches an epoch."""

    calls = [0]

    def __call__(self, images, generator):
        self.calls[0] += 1
        if self.calls[0] == 30:
            raise KeyboardInterrupt
        return super().__call__(images, generator)


def test_resumed_pretraining_ends_as_if_never_stopped(tmp_path):
    digits = load_dataset("digits")
    plain = replace(digits, augmentation=Augmentation(shift=1))
    whole = pretrain(dropping(fresh()), plain, RECIPE, seed=1)
    checkpoint = tmp_path / "backbone.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pretrain(
            dropping(fresh()), replace(digits, augmentation=Killed(shift=1)), RECIPE, seed=1, checkpoint=checkpoint
        )
    assert checkpoint.exists()
    for _ in range(2):  # at the end, too: a kill before the result is written loses nothing
        network = dropping(fresh())
        torch.rand(1)  # what a program has drawn before changes nothing
        resumed = pretrain(network, plain, RECIPE, seed=1, checkpoint=checkpoint)
        assert list(tmp_path.iterdir()) == [checkpoint]
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], tensor)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"backbone.safetensors is damaged .*; take it away"):
        pretrain(dropping(fresh()), plain, RECIPE, seed=1, checkpoint=checkpoint)


@pytest.mark.parametrize("count", [1257, 900, 400])
def test_pretraining_ends_on_more_or_fewer_images_than_it_began_on(count, tmp_path, monkeypatch):
    """By a schedule that is as far as the epochs are, and ends as low as any."""
    digits = replace(load_dataset("digits"), augmentation=Augmentation())
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda at, *a, **k: rates.append(at.param_groups[0]["lr"]) or step(at, *a, **k)
    )

    def trained(images, checkpoint=None, augmentation=digits.augmentation):
        rates.clear()
        data = replace(digits, train=digits.train.head(images), augmentation=augmentation)
        backbone = SkipResNet((1, 24, 24), layers=(1,), widths=(4,), stem_stride=4)
        pretrain(backbone, data, RECIPE, checkpoint=checkpoint, random_routes=False)
        return rates[-(images // 100) :]

    expected = trained(count)
    monkeypatch.setattr(Killed, "calls", [13])  # in the third epoch, of 8 batches
    with pytest.raises(KeyboardInterrupt):
        trained(800, tmp_path / "c.safetensors", Killed(shift=1))
    last = trained(count, tmp_path / "c.safetensors")
    assert len(rates) == count // 100 and last[1:] == pytest.approx(expected[1:])  # the first was set before the kill


def test_random_routes_work_after_pretraining(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    test = load_dataset("digits").test
    half = score_routes(backbone, RandomPolicy(backbone.thrift, 0.5, 0).route(test.inputs), test).metric.mean()
    assert full_metric(backbone, test) > 0.8
    assert half > 0.5


class Jointly(SkipResNet):
    """Trained on two passes, the second with two outputs an image, weighed unequally: three losses in all."""

    def training_outputs(self, inputs, rate, generator=None):
        rows = torch.arange(len(inputs))
        yield [Answer(self(inputs), rows)]
        both = self(inputs)
        yield [Answer(both, rows, 0.5), Answer(both.flip(0), rows.flip(0), 1.5)]


def test_a_family_says_what_it_is_trained_on():
    """Three losses of the same output, at a third of the learning rate: the plain network."""
    digits = replace(load_dataset("digits"), augmentation=Augmentation())
    ends = []
    for family, random_routes, rate in ((SkipResNet, False, 0.03), (Jointly, True, 0.01)):
        torch.manual_seed(0)
        backbone = family((1, 24, 24), layers=(2,), widths=(4,), stem_stride=2)
        before = backbone.fc.weight.detach().clone()
        recipe = Recipe(epochs=1, batch_size=400, learning_rate=rate, weight_decay=0.0)
        ends.append(pretrain(backbone, digits, recipe, random_routes=random_routes, seed=2).fc.weight.detach() - before)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 0.02
    assert float(ends[0].norm()) > 0.01


class Watched(SkipResNet):
    """Keeps the rates that it is trained at."""

    met: list

    def training_outputs(self, inputs, rate, generator=None):
        self.met.append(rate)
        yield from super().training_outputs(inputs, rate, generator)


def test_routes_are_opened_up_step_by_step():
    digits = replace(load_dataset("digits"), augmentation=Augmentation())
    recipe = Recipe(epochs=5, batch_size=400, rates=(0.8, 0.4), full_share=0.25, plain_epochs=2)
    backbone = Watched((1, 24, 24), layers=(2,), widths=(4,), stem_stride=2)
    backbone.met = []
    pretrain(backbone, digits, recipe, random_routes=False)
    assert backbone.met == [None] * 2 * 3
    backbone.met = []
    pretrain(backbone, digits, recipe)
    epochs = [torch.cat(backbone.met[at : at + 3]) for at in range(0, 15, 3)]
    for least, rates in zip((0.8, 0.8, 0.8, 0.4, 0.4), epochs, strict=True):
        assert least <= float(rates.min()) < least + 0.02 and float(rates.max()) == 1
        assert float((rates == 1).float().mean()) == pytest.approx(0.25, abs=0.05)
    assert replace(recipe, plain_epochs=None).length(False) == 5
    before = backbone.fingerprint()
    assert pretrain(backbone, digits, replace(recipe, plain_epochs=0), random_routes=False).fingerprint() == before


def test_training_outputs_are_those_of_random_routes():
    backbone, inputs = fresh(), torch.randn(6, 1, 24, 24)
    rate = torch.tensor([0.0, 0.3, 0.5, 0.5, 0.7, 1.0])
    ((answer, *_),) = backbone.training_outputs(inputs, rate, torch.Generator().manual_seed(4))
    route = draw_routes(backbone.thrift, rate, torch.Generator().manual_seed(4))
    torch.testing.assert_close(answer.output, backbone(inputs, route))
    ((full,),) = backbone.training_outputs(inputs, None)
    torch.testing.assert_close(full.output, backbone(inputs))


def test_early_answers_leave_features_that_a_module_writes_to():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, x):
            return self.head(self.second(self.first(x * 1.0).relu_()).relu_())

    backbone = SkipModule(Net(), (64,), ["first", "second"])
    inputs, route = torch.randn(6, 64), torch.tensor([[0, 1]]).expand(6, -1)
    walk, answers = backbone.run_training(inputs, lambda state: state.along(route))
    assert len(answers) == 3
    torch.testing.assert_close(walk.outputs, backbone(inputs, route))
    sum(answer.output.sum() for answer in answers).backward()


def test_early_answers_are_given_in_the_last_stage():
    """Behind the others, the first blocks of later stages run, whatever is skipped."""
    backbone = SkipResNet((1, 28, 28), layers=(3, 4, 4), widths=(8, 16, 32))
    assert backbone._early == [False] * 6 + [True] * 3


def test_numbers_are_learned_from_inputs_that_are_no_images():
    inputs = torch.randn(256, 4)
    split = Split(inputs, inputs[:, :2].clone(), Regression(1.0))
    data = Dataset("numbers", 2, split, split, split, Augmentation())
    backbone = Looping()
    before = full_metric(backbone, split)
    pretrain(backbone, data, replace(RECIPE, epochs=10, batch_size=32), random_routes=False)
    assert full_metric(backbone, split) < before / 3


def test_each_epoch_has_inputs_of_its_own_where_they_can_be_drawn(tmp_path):
    """A run that was killed goes on with those that it would have had."""
    inputs, drawn = torch.randn(64, 4), []

    def split(shift):
        return Split(inputs + shift, inputs[:, :2].clone(), Regression(1.0))

    def anew(seed):
        drawn.append(seed)
        return split(float(seed % 1000))

    data = Dataset("drawn", 2, split(0.0), split(0.0), split(0.0), Augmentation(), anew=anew)
    recipe, file = replace(RECIPE, batch_size=32, learning_rate=1e-4), tmp_path / "backbone.safetensors"
    assert replace(data, anew=None).in_epoch(3, 2).train is data.train
    torch.manual_seed(0)
    start = Looping()
    whole = pretrain(copy.deepcopy(start), data, recipe, seed=3)
    assert len(set(drawn)) == 3
    stopped, kept = [], drawn.copy()

    def killed(seed):
        if seed == kept[2] and not stopped:
            stopped.append(seed)
            raise KeyboardInterrupt
        return anew(seed)

    with pytest.raises(KeyboardInterrupt):
        pretrain(copy.deepcopy(start), replace(data, anew=killed), recipe, seed=3, checkpoint=file)
    drawn.clear()
    resumed = pretrain(copy.deepcopy(start), replace(data, anew=killed), recipe, seed=3, checkpoint=file)
    assert drawn == kept[2:]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    pretrain(copy.deepcopy(start), data, recipe, seed=4)
    assert not set(drawn[1:]) & set(kept)


def test_a_diverging_loss_is_refused():
    recipe = replace(RECIPE)
    object.__setattr__(recipe, "learning_rate", 1e12)  # no recipe may ask for so much
    with pytest.raises(ValueError, match="lower the learning rate"):
        pretrain(fresh(), load_dataset("digits"), recipe)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no device 'xyz' here"):
        pretrain(fresh(), load_dataset("digits"), RECIPE, device="xyz")


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="larger than the 1257"):
        pretrain(fresh(), load_dataset("digits"), replace(RECIPE, batch_size=2000))


@pytest.mark.parametrize(("decision", "data"), sorted(DEFAULTS))
def test_defaults_build_what_they_say(decision, data):
    row = defaults(decision, data)
    # Others may not be at hand: only shapes matter.
    dataset = load_dataset(data if data in ("clips", "needle") else DECISIONS[decision].data)
    if data == "noisy-photos":
        split = Split(torch.zeros(4, 1, 24, 24), torch.zeros(4, 1, 24, 24), Restoration())
        dataset = Dataset(data, 1, split, split, split, Augmentation())
    first, second, other = (row.build(dataset, seed) for seed in (0, 0, 1))
    assert first.decision == decision
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


def test_a_decision_without_defaults_is_named():
    for data in ("digits", "adding"):  # images, whose defaults may come from others, and what is none
        with pytest.raises(ValueError, match="no defaults for 'nosuch'"):
            defaults("nosuch", data)


@pytest.mark.parametrize(
    ("side", "count", "stem"), [(32, 55_000, {"stem_stride": 2}), (96, 1000, {"stem": "imagenet"})]
)
def test_images_of_ones_own_have_defaults(side, count, stem, monkeypatch):
    split = Split(torch.zeros(1, 3, side, side).expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64))
    mine = Dataset("mine", 7, split, split, split, Augmentation())
    monkeypatch.setitem(DATASETS, "mine", lambda: mine)
    load_dataset.cache_clear()
    base = DEFAULTS["skip", "fashion-mnist"]
    row = defaults("skip", "mine")
    assert row.backbone == {name: base.backbone[name] for name in ("layers", "widths")} | stem
    longer = min(55_000 / count, 100 / base.pretraining.epochs)  # as many batches, but not more than 100 epochs
    assert row.pretraining.epochs == pytest.approx(base.pretraining.epochs * longer, rel=0.01)
    assert row.finetuning.epochs == pytest.approx(base.finetuning.epochs * longer)
    backbone = row.build(mine, 0)
    assert (backbone.input_shape, backbone.config["classes"]) == ((3, side, side), 7)
    assert defaults("expert", "mine").backbone == DEFAULTS["expert", "fashion-mnist"].backbone
    with pytest.raises(ValueError, match=r"no defaults for 'hidden-update' on 'mine'; there are for \['adding'"):
        defaults("hidden-update", "mine")
    load_dataset.cache_clear()


def test_settings_of_the_network_are_changed_by_name():
    row = defaults("hidden-update", "adding")
    assert row.changed(["sees=state+input", "hidden=8"]).backbone == {
        "hidden": 8, "sees": "state+input", "knots": 16
    }  # fmt: skip
    assert defaults("skip", "digits").changed(["layers=[2, 2]"]).backbone["layers"] == (2, 2)
    assert row.changed([]) == row
    for bad, message in (
        ("hidden", "NAME=VALUE"),
        ("nosuch=1", r"a name in \['hidden', 'knots', 'sees', 'shares'\]"),
        ("hidden=x", "type of 110"),
    ):
        with pytest.raises(ValueError, match=message):
            row.changed([bad])


def test_rates_of_chains_of_loops_and_of_more_choices():
    route = torch.tensor([[1, 2, 0], [0, 1, 1], [1, -1, -1]])
    chain = choice_rates([Point("a", 2), Point("b", 3), Point("c", 2)], route)
    assert chain == pytest.approx({"a": 2 / 3, "b/1": 0.5, "b/2": 0.5, "c": 0.5})
    assert choice_rates([Point("again", 3, visits=3)], route) == pytest.approx({"again/1": 4 / 7, "again/2": 1 / 7})
    assert choice_rates([Point("a", 2), Point("b", 2)], route[2:, :2]) == {"a": 1, "b": 0}


def test_the_unit_of_costs_does_not_matter_to_random_routes():
    """Thrift may be of any size: fractions are told apart as MACs are."""
    costs, rate = torch.tensor([[0.0, 3, 8], [5, 5, -1]]), torch.linspace(0, 1, 200)
    drawn = [draw_routes(unit * costs, rate, torch.Generator().manual_seed(0)) for unit in (1.0, 2.0**-20, 2.0**20)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_networks_that_corrupt_memory_in_channels_last_train_in_contiguous_maps():
    """A torch of oneDNN without AVX-512 does so in the shortcut of a stage that few channels enter."""
    assert training_format(SkipResNet((1, 8, 8), layers=(1, 1), widths=(4, 8))) is torch.contiguous_format
    assert training_format(SkipResNet((1, 8, 8), layers=(1, 1), widths=(8, 16))) is torch.channels_last
