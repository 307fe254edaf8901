"""Inputs that need not fit into memory: the same data set as in memory, batch by batch, from folders and own data."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import dynrl
from dynrl.data import DATASETS, image_folder, own_dataset, stored
from dynrl.data.stored import Stored, statistics, store
from dynrl.perturb import Ball
from dynrl.runs import RunFolder
from dynrl.scripts.cli import main


class Lazy(Dataset):
    """Images of stripes that are made when they are asked for, and may pass a transform."""

    def __init__(self, transform=None, count=120):
        self.transform, self.count = transform, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 60, (3, 8, 8), generator=generator, dtype=torch.uint8)
        image[i % 3] += 100
        return (image if self.transform is None else self.transform(image)), i % 3


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", 0)


@pytest.fixture
def photos(tmp_path):
    for i in range(60):
        (tmp_path / "photos" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        image, _ = Lazy()[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "abc"[i % 3] / f"{i}.png")
    return tmp_path / "photos"


def same(ours, theirs):
    """Both hold the same; `ours` from a file."""
    assert isinstance(ours.train.inputs, Stored) and isinstance(theirs.train.inputs, torch.Tensor)
    assert (
        (ours.fingerprint, ours.content) == (theirs.fingerprint, theirs.content)
        and ours.form == theirs.form
        and ours.names == theirs.names
    )
    assert ours.mean == pytest.approx(theirs.mean, abs=1e-6)
    assert ours.deviation == pytest.approx(theirs.deviation, abs=1e-6)
    for name in ("train", "unseen", "validation", "test"):
        mine, other = ours.split(name), theirs.split(name)
        torch.testing.assert_close(mine.inputs[:], other.inputs, atol=1e-5, rtol=1e-5)
        assert torch.equal(mine.targets, other.targets)
        changed, more = (split.beginning_with(torch.zeros(2, 3, 8, 8)).inputs for split in (mine, other))
        torch.testing.assert_close(changed, more, atol=1e-5, rtol=1e-5)


def test_a_folder_is_the_same_from_a_file(photos, monkeypatch):
    theirs = image_folder(str(photos))
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    same(image_folder(str(photos)), theirs)


@pytest.mark.parametrize("transform", [None, lambda image: image.float() / 7 - 3], ids=["uint8", "float"])
def test_pairs_are_the_same_from_a_file(transform, monkeypatch):
    data = Lazy(transform)
    theirs = own_dataset(data)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    ours = own_dataset(data)
    same(ours, theirs)
    assert ours.dtype == theirs.dtype and ours.name.startswith("own-") and own_dataset(data).name == ours.name
    assert own_dataset(Lazy(transform, 119)).name != ours.name
    known = replace(theirs.provenance, mean=(0.1, 0.2, 0.3), deviation=(1.0, 2.0, 4.0))
    same(ours.seen_by(known), theirs.seen_by(known))
    mine, other = Ball.of(ours), Ball.of(theirs)
    assert (mine.low, mine.high, mine.radius) == pytest.approx((other.low, other.high, other.radius), abs=1e-5)


class Rows(Dataset):
    """Some rows, of two classes in turn."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i], i % 2


DRAWN = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TYPES = {
    "int16": (DRAWN * 4000).to(torch.int16),
    "unix seconds": 1_700_000_000 + (DRAWN * 90_000).long(),
    "unix seconds as float64": 1.7e9 + DRAWN * 9,
    "float64": DRAWN,
    "bfloat16": DRAWN.bfloat16(),
    "bool": DRAWN > 0.5,
    "far float32": (1e6 + 1000 * DRAWN).float(),
    "whole numbers, then others": [*(DRAWN[:60] * 9).int(), *DRAWN[60:].float()],
}


@pytest.mark.parametrize("rows", TYPES.values(), ids=TYPES)
def test_raw_inputs_of_any_type_are_the_same_from_a_file(rows, monkeypatch):
    theirs = own_dataset(Rows(rows))
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    ours = own_dataset(Rows(rows))
    assert isinstance(ours.train.inputs, Stored)
    assert (ours.content, ours.dtype, ours.names) == (theirs.content, theirs.dtype, theirs.names)
    assert (ours.mean, ours.deviation) == pytest.approx((theirs.mean, theirs.deviation), rel=1e-6)
    for name in ("train", "unseen", "validation", "test"):
        read, held = ours.split(name).inputs[:], theirs.split(name).inputs
        assert len(read.unique()) == len(held.unique())
        torch.testing.assert_close(read, held, atol=2e-3, rtol=1e-5)
    raw = torch.stack(list(rows))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.provenance.preprocess(raw)[order[24:]], ours.train.inputs[:], atol=2e-3, rtol=1e-5)


def test_inputs_that_are_refused_in_memory_are_refused_from_a_file(monkeypatch):
    wrong = {
        "expected real inputs": DRAWN.to(torch.complex64),
        "NaN or infinity": DRAWN * 1e300,  # which float32 cannot hold
        "got torch.float32, torch.uint8": [*(DRAWN[:60] * 9).byte(), *DRAWN[60:].float()],
        "inputs of one shape": [*DRAWN[:60], *DRAWN[60:, :, :3]],
    }
    for limit in (stored.IN_MEMORY, 0):
        monkeypatch.setattr(stored, "IN_MEMORY", limit)
        for said, rows in wrong.items():
            with pytest.raises(ValueError, match=said):
                own_dataset(Rows(rows))


def test_equal_numbers_have_no_deviation_in_a_file():
    held = store((torch.full((2, 3, 3), 0.3) for _ in range(400)), (2, 3, 3), torch.float32)
    assert statistics(held)[1] == (1.0, 1.0)


def test_each_channel_has_its_own_statistics(photos):
    data = image_folder(str(photos))
    raw = data.train.inputs * torch.tensor(data.deviation).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    for channel in range(3):
        assert data.mean[channel] == pytest.approx(float(raw[:, channel].mean()), abs=1e-5)
        assert float(data.train.inputs[:, channel].mean()) == pytest.approx(0, abs=1e-5)
        assert float(data.train.inputs[:, channel].std()) == pytest.approx(1, abs=1e-5)
    known = data.provenance
    assert type(known).read(known.to_dict() | {"mean": list(known.mean)}, "x") == known
    torch.testing.assert_close(known.preprocess((raw * 255).round().to(torch.uint8)), data.train.inputs)
    with pytest.raises(ValueError, match="a mean and a deviation for each of"):
        replace(known, mean=(0.1, 0.2))
    with pytest.raises(ValueError, match="a deviation above 0"):
        replace(known, deviation=(1.0, 0.0, 1.0))
    assert statistics(torch.full((4, 2, 3, 3), 5.0)) == ((5.0, 5.0), (1.0, 1.0)), (
        "what never changes is not divided by 0"
    )


def test_data_are_the_same_for_any_number_of_threads():
    """Else a network that was trained with another number would take them for other data."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(DATASETS["trace-small"]())
        assert torch.get_num_threads() == threads
    one, two = found
    assert (one.mean, one.deviation, one.fingerprint) == (two.mean, two.deviation, two.fingerprint)


def test_rows_are_read_as_a_tensor_is_indexed():
    raw = torch.arange(7 * 6, dtype=torch.float32).view(7, 2, 3)
    held = store((row.numpy() for row in raw), (2, 3), torch.float32)
    for key in (2, slice(1, 5), slice(None, -2), torch.tensor([5, 0, 5]), [1, 2], raw[:, 0, 0] > 9, slice(3, 3)):
        assert torch.equal(held[key], raw[key])
        if not isinstance(key, int):
            assert torch.equal(held.part(key if isinstance(key, slice) else np.asarray(key))[:], raw[key])
    assert [tuple(piece.shape) for piece in held.split(3)] == [(3, 2, 3), (3, 2, 3), (1, 2, 3)]
    assert held.shape == raw.shape and held.dim() == 3 and copy.deepcopy(held) is held
    assert held.to("cpu", torch.bfloat16)[:2].dtype == torch.bfloat16


def test_what_cannot_be_read_is_refused_by_name(on_disk, photos):
    (photos / "a" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"0.png cannot be read as an image"):
        image_folder(str(photos))
    with pytest.raises(ValueError, match="inputs of one shape and type"):
        own_dataset(Lazy(lambda image: image if image[0, 0, 0] < 150 else image.float()))
    with pytest.raises(ValueError, match="NaN or infinity"):
        own_dataset(Lazy(lambda image: image.float() / (image.float() - 7)))
    with pytest.raises(ValueError, match=r"got Image \(.*\); give the Dataset a transform"):
        own_dataset(Lazy(lambda image: Image.new("L", (8, 8))))


def test_a_run_is_trained_and_evaluated_from_a_folder_that_lies_in_a_file(on_disk, photos, tmp_path):
    wide = ["--network", "widths=[4,8]", "layers=[2,1]", "--epochs", "1", "--agent", "gate", "--steps", "600"]
    run = tmp_path / "run"
    main(["train", "skip", "--data", str(photos), *wide, "--num-envs", "8", "--out", str(run)])
    folder = RunFolder(run)
    assert isinstance(folder.dataset().test.inputs, Stored) and (run / "report.png").is_file()
    assert folder.backbone.trained_on.mean == folder.dataset().mean and len(folder.dataset().mean) == 3
    images = torch.stack([Lazy()[i][0] for i in range(4)])
    assert folder.model(folder.model.preprocess(images)).shape == (4, 3)
    main(["calibrate", str(run), "--batch-size", "4"])
    dynrl.attack(run, rows=4, steps=1, budget=None, price=folder.model.price)


def test_data_in_memory_lazy_and_with_transforms_are_trained_on_alike(on_disk, tmp_path):
    rows = [Lazy()[i] for i in range(120)]
    for name, data in (
        ("held", TensorDataset(torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))),
        ("lazy", Lazy()),
        ("transformed", Lazy(lambda image: image.flip(2))),
    ):
        run = dynrl.train(
            "exit", data, out=tmp_path / name, agent="gate", steps=600, num_envs=8, epochs=1, plain=False,
            network=("widths=[4,8]", "layers=[1,1]", "exits=[0]"),
        )  # fmt: skip
        assert run.finished
