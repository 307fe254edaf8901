"""Files are whole or refused; data sets are fixed and disjoint."""

from __future__ import annotations

import gzip
import hashlib

import pytest
import torch

from dynrl import data
from dynrl.data import Augmentation, load_dataset, parse_idx
from dynrl.files import load_tensors, read_json, save_tensors, write_aside, write_json


@pytest.fixture
def tensors_file(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, "policy", {"a": torch.arange(6.0), "b": torch.zeros(0)}, {"x": [1, 2]})
    return path


def test_tensors_come_back(tensors_file):
    tensors, metadata = load_tensors(tensors_file, "policy")
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert metadata == {"x": [1, 2]}


def test_damage_is_refused(tensors_file, tmp_path):
    whole = tensors_file.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for count in (0, 7, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:count])
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            load_tensors(bad, "policy")
    for position in range(8, len(whole), 5):
        bad.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            load_tensors(bad, "policy")
    with pytest.raises(ValueError, match="expected a backbone file"):
        load_tensors(tensors_file, "backbone")
    with pytest.raises(ValueError, match="no such file"):
        load_tensors(tmp_path / "nosuch", "policy")


def test_nan_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        save_tensors(tmp_path / "x", "policy", {"a": torch.tensor([1.0, torch.nan])}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), write_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"f\.json"):
        read_json(path)


def test_digits_are_split_for_good():
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1257, 180, 360)
    assert digits.input_shape == (1, 24, 24)
    images = [row.numpy().tobytes() for s in ("train", "validation", "test") for row in digits.split(s).inputs]
    assert len(set(images)) == len(images)
    assert len(images) == 1797
    assert digits.test.targets[:8].tolist() == TARGETS
    assert abs(float(digits.train.inputs.mean())) < 1e-4
    assert float(digits.train.inputs.std()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="unknown split"):
        digits.split("nosuch")


def test_unknown_data_set():
    with pytest.raises(ValueError, match="expected one of"):
        load_dataset("nosuch")


# The first test targets: a change of the split would make old results and new ones incomparable in silence.
TARGETS = [6, 6, 6, 2, 5, 6, 6, 2]


def idx(shape, content):
    return b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + content


def test_idx_format():
    assert parse_idx(idx((2, 3), bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (b"", b"\0\0\x0d\1", idx((2, 3), bytes(5)), idx((2, 3), bytes(7)), idx((9,), b"")[:6]):
        with pytest.raises(ValueError, match=r"IDX|header"):
            parse_idx(bad)


def test_fashion_mnist_is_read_from_the_cache_checked(tmp_path, monkeypatch):
    """On small stand-ins: the loader, the cache's place, the checksum."""
    contents = {
        "train-images-idx3-ubyte": idx((5010, 28, 28), bytes(5010 * 784)),
        "train-labels-idx1-ubyte": idx((5010,), bytes(i % 10 for i in range(5010))),
        "t10k-images-idx3-ubyte": idx((4, 28, 28), bytes(i % 251 for i in range(4 * 784))),
        "t10k-labels-idx1-ubyte": idx((4,), bytes([1, 2, 3, 4])),
    }
    contents["train-images-idx3-ubyte"] = contents["train-images-idx3-ubyte"][:16] + bytes(
        i % 256 for i in range(5010 * 784)
    )
    folder = tmp_path / "dynrl" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "_FASHION_MNIST_DEBIAN", tmp_path / "nosuch")
    monkeypatch.setattr(data, "_FASHION_MNIST", {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()})
    loaded = data._fashion_mnist()
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (10, 5000, 4)
    assert loaded.test.targets.tolist() == [1, 2, 3, 4]
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="SHA-256"):
        data._fashion_mnist()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="gzip"):
        data._fashion_mnist()


def test_augmentation_without_changes_is_the_identity():
    images = torch.rand(5, 1, 9, 9)
    same = Augmentation()(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=1e-5)


def test_augmentation_shifts_by_whole_pixels_and_flips():
    images = torch.zeros(200, 1, 9, 9)
    images[:, 0, 4, 3] = 1
    moved = Augmentation(flip=True, shift=2)(images, torch.Generator().manual_seed(0))
    spots = moved.flatten(1).argmax(1)
    torch.testing.assert_close(moved.flatten(1).max(1).values, torch.ones(200), atol=1e-4, rtol=0)
    assert set((spots // 9).tolist()) == {2, 3, 4, 5, 6}
    assert set((spots % 9).tolist()) == {1, 2, 3, 4, 5, 6, 7}
