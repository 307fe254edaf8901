"""Files are whole or refused; data sets are fixed and disjoint."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import struct
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dynrl.data import (
    DATASETS,
    Augmentation,
    Dataset,
    Split,
    as_dataset,
    check_dataset,
    cifar,
    folder,
    image_folder,
    images,
    load_dataset,
    standardised,
)  # fmt: skip
from dynrl.data.base import drawn
from dynrl.data.images import CANVAS, PIECE, PIECES, clutter, parse_idx
from dynrl.data.stored import store
from dynrl.files import load_tensors, read_json, save_tensors, write_aside, write_json
from dynrl.tasks import Regression, Task


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
SUMS = [0.501717, 0.284521, -0.207151]


def idx(shape, content):
    return b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + content


def test_idx_format():
    assert parse_idx(idx((2, 3), bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (b"", b"\0\0\x0d\1", idx((2, 3), bytes(5)), idx((2, 3), bytes(7)), idx((9,), b"")[:6]):
        with pytest.raises(ValueError, match=r"IDX|header"):
            parse_idx(bad)


@pytest.fixture(scope="module")
def fashion_files():
    """Small stand-ins for the files of fashion-mnist: their packed content, and its digests."""
    contents = {
        "train-images-idx3-ubyte": idx((5100, 28, 28), bytes(i % 256 for i in range(5100 * 784))),
        "train-labels-idx1-ubyte": idx((5100,), bytes(i % 10 for i in range(5100))),
        "t10k-images-idx3-ubyte": idx((10, 28, 28), bytes(i % 251 for i in range(10 * 784))),
        "t10k-labels-idx1-ubyte": idx((10,), bytes([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])),
    }
    packed = {name: gzip.compress(content, 1) for name, content in contents.items()}
    return packed, {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@pytest.fixture
def fashion_folder(fashion_files, tmp_path, monkeypatch):
    """The stand-ins of fashion-mnist in the cache."""
    packed, digests = fashion_files
    folder = tmp_path / "dynrl" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, content in packed.items():
        (folder / f"{name}.gz").write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(images, "_FASHION_MNIST_DEBIAN", tmp_path / "nosuch")
    monkeypatch.setattr(images, "_FASHION_MNIST", digests)
    return folder


def archive(files):
    """A tar.gz of `files`, name to content, in a folder of its own."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"inner/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def records(count, labels):
    """Each photo's class is its number's last digit; red is that, green twice, blue thrice it."""
    rows = []
    for i in range(count):
        red = i % 10
        rows.append(bytes([7] * (labels - 1) + [red]) + b"".join(bytes([red * c]) * 1024 for c in (1, 2, 3)))
    return b"".join(rows)


@pytest.fixture(scope="module")
def cifar_files():
    """Small stand-ins for the archives of CIFAR, by their number of classes."""
    made = {}
    for classes, labels, train, test in (
        (10, 1, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"), (100, 2, ["train.bin"], "test.bin")
    ):  # fmt: skip
        files = {name: records(5010 // len(train), labels) for name in train}
        made[classes] = archive(files | {test: records(12, labels), "readme": b""})
    return made


@pytest.fixture
def cifar_folder(cifar_files, tmp_path, monkeypatch):
    """The stand-ins of CIFAR in the cache."""
    folder = tmp_path / "dynrl"
    folder.mkdir(exist_ok=True)
    for classes, content in cifar_files.items():
        (folder / f"cifar-{classes}-binary.tar.gz").write_bytes(content)
        monkeypatch.setitem(cifar._DIGESTS, classes, hashlib.md5(content).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_the_cache_checked(classes, cifar_folder):
    """The class is the last label byte; channels lie one after the other."""
    loaded = DATASETS[f"cifar-{classes}"]()
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (10, 5000, 12)
    assert (loaded.classes, loaded.input_shape) == (classes, (3, 32, 32))
    raw = loaded.raw(loaded.test.inputs)
    assert loaded.test.targets.tolist() == [i % 10 for i in range(12)]
    for channel, factor in enumerate((1, 2, 3)):
        wanted = loaded.test.targets.view(-1, 1, 1).expand(-1, 32, 32) * factor / 255
        torch.testing.assert_close(raw[:, channel], wanted, atol=1e-5, rtol=1e-4)
    (cifar_folder / f"cifar-{classes}-binary.tar.gz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="MD5"):
        DATASETS[f"cifar-{classes}"]()


def test_fashion_mnist_is_read_from_the_cache_checked(fashion_folder):
    """On small stand-ins: the loader, the cache's place, the checksum."""
    loaded = DATASETS["fashion-mnist"]()
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (100, 5000, 10)
    assert loaded.test.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    (fashion_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="SHA256"):
        DATASETS["fashion-mnist"]()
    (fashion_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="gzip"):
        DATASETS["fashion-mnist"]()


@pytest.mark.usefixtures("fashion_folder", "cifar_folder")
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_fits_its_task(name):
    """Three splits of one shape and task; a network of `classes` outputs can be trained on a batch of it."""
    made = DATASETS[name]()
    assert made.name == name
    for part in ("train", "validation", "test"):
        split = made.split(part)
        assert split.inputs.shape == (len(split.targets), *made.input_shape)
        assert split.inputs.dtype == (torch.int64 if made.dtype == "int64" else torch.float32)
        assert split.inputs.isfinite().all()
        assert split.task == made.task
        assert split.head(3).task == made.task
        classes = () if split.targets.is_floating_point() else (made.classes,)
        outputs = torch.zeros(len(split), *classes, *split.targets.shape[1:])
        assert made.task.loss(outputs, split.targets, 0.1).isfinite()
        assert made.task.score(outputs, split.targets).shape == (len(split),)
    batch = made.train.inputs[:8]
    assert made.augmentation(batch, torch.Generator().manual_seed(0)).shape == batch.shape
    if made.mean:
        assert abs(float(made.train.inputs.mean())) < 1e-3
        assert float(made.train.inputs.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("fashion_folder", "cifar_folder")
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_is_the_same_each_time(name, monkeypatch):
    """Those that are drawn, by their first draws; a tenth of the rows is enough to tell."""

    def fewer(name, classes, sizes, *more, **settings):
        return drawn(name, classes, tuple(count // 10 for count in sizes), *more, **settings)

    monkeypatch.setattr(sys.modules[DATASETS[name].__module__], "drawn", fewer, raising=False)
    made, again = DATASETS[name](), DATASETS[name]()
    for part in ("train", "validation", "test"):
        assert torch.equal(made.split(part).inputs, again.split(part).inputs)
        assert torch.equal(made.split(part).targets, again.split(part).targets)


def test_the_adding_task():
    data = DATASETS["adding"]()
    rows = torch.cat([data.split(part).inputs for part in ("train", "validation", "test")])
    targets = torch.cat([data.split(part).targets for part in ("train", "validation", "test")])
    numbers, marks = rows.unbind(2)
    where = marks.nonzero()[:, 1].view(len(rows), 2)  # two marks in every row, or this fails
    assert set(marks.unique().tolist()) == {0.0, 1.0}
    assert set(where[:, 0].tolist()) == set(range(5))
    assert set(where[:, 1].tolist()) == set(range(25, 50))
    torch.testing.assert_close(numbers.gather(1, where).sum(1, keepdim=True), targets)
    assert numbers.abs().max() <= 0.5
    assert len({row.tobytes() for row in rows.numpy()}) == len(rows)
    assert data.task.variance == pytest.approx(1 / 6, rel=0.05)
    assert data.test.targets[:3, 0].tolist() == pytest.approx(SUMS)


def test_sequential_images_are_the_images_each_pixel_with_its_place():
    whole, read = DATASETS["digits"](), DATASETS["sequential-digits"]()
    for part in ("train", "validation", "test"):
        grey, row, column = read.raw(read.split(part).inputs).split((1, 8, 8), 2)
        small = torch.zeros(len(grey), 1, 8, 8)
        small[torch.arange(len(grey)).unsqueeze(1), 0, row.argmax(2), column.argmax(2)] = grey.squeeze(2)
        large = whole.raw(whole.split(part).inputs)
        torch.testing.assert_close(torch.nn.functional.interpolate(small, size=24, mode="bilinear"), large)
        assert torch.equal(read.split(part).targets, whole.split(part).targets)


@pytest.mark.usefixtures("fashion_folder")
def test_sequential_clothes_are_the_clothes_by_rows():
    whole, read = DATASETS["fashion-mnist"](), DATASETS["sequential-fashion-mnist"]()
    for part in ("train", "validation", "test"):
        assert torch.equal(read.split(part).inputs, whole.split(part).inputs[:, 0])
        assert torch.equal(read.split(part).targets, whole.split(part).targets)
    assert read.train.inputs[0, 3, 5] == whole.train.inputs[0, 0, 3, 5]


def test_clutter_hides_nothing_dimmer_and_comes_from_others():
    """Each image is of one brightness of its own, so that every pixel tells where it is from."""
    size, count = 28, 5
    levels = torch.arange(1, count + 1) / 10
    plain = levels.view(-1, 1, 1, 1).expand(-1, 1, size, size)
    corners = set()
    for seed in range(40):
        canvas = clutter(plain, seed)
        assert canvas.shape == (count, 1, CANVAS, CANVAS)
        assert set(canvas.unique().tolist()) == {0.0, *levels.tolist()}
        brightest = canvas[-1, 0] == levels[-1]
        assert int(brightest.sum()) == size**2, "nothing covers it, and no piece is its own"
        corners.add(tuple(brightest.nonzero()[0].tolist()))
        foreign = (canvas[-1, 0] > 0) & ~brightest
        assert 0 < int(foreign.sum()) <= PIECES * PIECE**2
    assert torch.equal(canvas, clutter(plain, seed))
    assert len(corners) > 30


@pytest.mark.parametrize("shape", [(5, 1, 9, 9), (5, 50, 2), (5, 4)])
def test_augmentation_without_changes_leaves_anything_as_it_is(shape):
    inputs = torch.rand(shape)
    assert torch.equal(Augmentation()(inputs, torch.Generator().manual_seed(0)), inputs)


def test_augmentation_shifts_by_whole_pixels_and_flips():
    images = torch.zeros(200, 1, 9, 9)
    images[:, 0, 4, 3] = 1
    moved = Augmentation(flip=True, shift=2)(images, torch.Generator().manual_seed(0))
    spots = moved.flatten(1).argmax(1)
    torch.testing.assert_close(moved.flatten(1).max(1).values, torch.ones(200), atol=1e-4, rtol=0)
    assert set((spots // 9).tolist()) == {2, 3, 4, 5, 6}
    assert set((spots % 9).tolist()) == {1, 2, 3, 4, 5, 6, 7}


def numbered(targets):
    """A split whose inputs, texts and difficulty are the numbers of its rows."""
    rows = torch.arange(float(len(targets)))
    texts = tuple(f"{int(row)}" for row in rows)
    return Split(rows.view(-1, 1), targets, Task(), {"row": rows}, texts)


BY_CLASS = torch.arange(10).repeat_interleave(100)
ORDERED = {
    "by class": BY_CLASS,
    "from the last class": BY_CLASS.flip(0),
    "in pieces": BY_CLASS.view(10, 5, 20).transpose(0, 1).flatten(),
    "one rare class": (torch.arange(1000) >= 950).long(),
    "numbers": torch.linspace(-1, 1, 1000).view(-1, 1),
    "pixels": (torch.arange(1000) // 100).view(-1, 1, 1).expand(-1, 2, 2),
}


@pytest.mark.parametrize("targets", ORDERED.values(), ids=ORDERED)
def test_the_order_of_rows_does_not_matter(targets):
    """Else backbones would never see the last class, and policies nothing else."""
    given = numbered(targets)
    data = Dataset("mine", 10, given, given, given, Augmentation())
    mean = targets.double().mean()
    for part in (data.for_backbone.train, data.unseen, data.validation.head(200), data.test.head(200)):
        rows = part.inputs[:, 0].long()
        assert torch.equal(part.targets, targets[rows]) and torch.equal(part.difficulty["row"], rows.float())
        assert part.texts == tuple(f"{row}" for row in rows)
        assert abs(part.targets.double().mean() - mean) < 0.35 * targets.double().std()
    assert sorted([*data.for_backbone.train.texts, *data.unseen.texts], key=int) == list(given.texts)
    again = Dataset("mine", 10, given, given, given, Augmentation())
    assert torch.equal(again.train.inputs, data.train.inputs), "the same order in every process"
    assert torch.equal(replace(data, name="other").train.inputs, data.train.inputs), "shuffled once"


def test_rows_in_random_order_stay_as_they_are():
    """Whatever the shares of the classes are; and a few rows, which may be in order by chance."""
    generator = torch.Generator().manual_seed(0)
    rare = torch.rand(1000, generator=generator) < 0.01
    for targets in (
        torch.randint(2, (60,), generator=generator), BY_CLASS[torch.randperm(1000, generator=generator)], rare.long(),
        torch.randn(100, generator=generator), torch.arange(12) // 6, torch.zeros(100).long(), torch.zeros(100),
        torch.arange(1000) % 10, (torch.arange(1000) == 500).float(), torch.zeros(1).long(),
    ):  # fmt: skip
        given = numbered(targets)
        made = Dataset("mine", 10, given, given, given, Augmentation())
        assert made.train is given and made.validation is given and made.test is given


def test_a_made_data_set_of_ordered_rows_is_shuffled_wherever_its_inputs_are():
    pixels = (BY_CLASS.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255).contiguous()
    stored = store(pixels.mul(255).round().to(torch.uint8).numpy(), (1, 2, 2), torch.uint8)
    for inputs in (pixels, stored):
        made = standardised("mine", 10, Augmentation(), [(inputs, BY_CLASS)] * 3)
        shown = made.raw(made.unseen.inputs[:]).mul(255).round()[:, 0, 0, 0]
        assert torch.equal(shown.long(), made.unseen.targets) and len(shown.unique()) == 10


def test_images_are_the_same_data_set_as_bytes_and_in_0_to_1_and_nothing_else_is_taken_for_images():
    """Else a network would learn on one scale, and `preprocess` would bring images to another."""
    labels, raw = torch.arange(40) % 2, torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    made, again = (
        standardised("mine", 2, Augmentation(), [(images, labels)] * 3) for images in (raw, raw.double() / 255)
    )
    assert made.content == again.content and torch.equal(made.train.inputs, again.train.inputs)
    assert torch.equal(made.provenance.preprocess(raw), made.train.inputs)
    parts = [(raw, labels), (raw, labels), (raw, labels)]
    for wrong, message in (
        (raw.float(), "images in 0 to 1 .*in mine, got numbers from 0 to 255; divide"), (raw.long(), "from 0 to 255"),
        (torch.randn(40, 3, 4, 4), "numbers from -"), (torch.full((40, 3, 4, 4), torch.nan), "from nan to nan"),
        (raw.numpy(), "as tensors, got ndarray"),
    ):  # fmt: skip
        for part in range(3):
            with pytest.raises(ValueError, match=message):
                standardised("mine", 2, Augmentation(), [*parts[:part], (wrong, labels), *parts[part + 1 :]])


@pytest.mark.parametrize(("height", "width"), [(9, 15), (15, 9), (8, 32)])
def test_augmentation_of_images_that_are_not_square(height, width):
    """Shifts are whole pixels both ways, and what is turned keeps its lengths and angles."""
    images = torch.zeros(400, 1, height, width)
    images[:, 0, height // 2, width // 2] = 1
    moved = Augmentation(shift=2)(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.flatten(1).max(1).values, torch.ones(400), atol=1e-4, rtol=0)
    spots = moved.flatten(1).argmax(1)
    for found, middle in ((spots // width, height // 2), (spots % width, width // 2)):
        assert set((found - middle).tolist()) == {-2, -1, 0, 1, 2}
    places = Augmentation(flip=True, rotate=40, shift=1)._places(images, torch.Generator().manual_seed(0))
    pixels = places * torch.tensor([width, height]) / 2
    right, down = pixels[:, 3, 4] - pixels[:, 3, 3], pixels[:, 4, 3] - pixels[:, 3, 3]
    for step in (right, down):
        torch.testing.assert_close(step.norm(dim=1), torch.ones(400), atol=1e-4, rtol=0)
    torch.testing.assert_close((right * down).sum(1), torch.zeros(400), atol=1e-4, rtol=0)


def paint(path, value, size=(6, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def photos(tmp_path):
    """Ten grey images of each of two classes; cats are dark, dogs bright."""
    for i in range(10):
        paint(tmp_path / "photos" / "cat" / f"{i}.png", i)
        paint(tmp_path / "photos" / "dog" / "more" / f"{i}.png", 200 + i)
    (tmp_path / "photos" / ".hidden").mkdir()
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_of_images_is_a_data_set(photos, monkeypatch):
    data = load_dataset(str(photos))
    assert (data.input_shape, data.classes) == ((1, 4, 6), 2)
    seen = []
    for part in ("train", "validation", "test"):
        split = data.split(part)
        values = data.raw(split.inputs)[:, 0, 0, 0] * 255
        assert torch.equal(values > 100, split.targets == 1)
        assert split.targets.unique().tolist() == [0, 1]
        seen += values.round().int().tolist()
    assert sorted(seen) == [*range(10), *range(200, 210)]
    assert torch.equal(image_folder(str(photos)).test.inputs, data.test.inputs)
    monkeypatch.chdir(photos.parent)
    assert check_dataset("photos@3") == f"{photos}@3"
    assert load_dataset("photos@3").input_shape == (1, 3, 3)


def test_copies_that_programs_keep_are_no_data(photos):
    """At any depth; what looks like an image and is left out is counted and said."""
    before = image_folder(str(photos))
    for kept in (".ipynb_checkpoints", "@eaDir", "deep/@eaDir", "deep/.cache/more"):
        (photos / "cat" / kept).mkdir(parents=True)
        for file in (photos / "cat").glob("*.png"):
            shutil.copy(file, photos / "cat" / kept)
    shutil.copy(photos / "cat" / "3.png", photos / "cat" / "._3.png")
    shutil.copytree(photos / "cat", photos / "@eaDir")
    (photos / "dog" / "phone.HEIC").write_bytes(b"not for Pillow")
    (photos / "dog" / "folder.png").mkdir()
    hidden = sum(file.is_file() and file.suffix == ".png" for file in (photos / "cat").rglob("*")) - 10
    with pytest.warns(UserWarning, match=f"{hidden + 1} files below .* look like images and are left out"):
        after = image_folder(str(photos))
    for part in ("train", "validation", "test"):
        assert torch.equal(after.split(part).inputs, before.split(part).inputs)


def test_a_folder_below_a_hidden_one_is_read(photos, tmp_path):
    shutil.copytree(photos, tmp_path / ".cache" / "@photos")
    assert len(image_folder(str(tmp_path / ".cache" / "@photos")).train) == len(image_folder(str(photos)).train)


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 1), (8, 3)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_photos_are_turned_as_any_viewer_shows_them(suffix, orientation, turn, size, tmp_path):
    """Bright above, dark below, 16 wide and 32 high, however the camera lay."""
    shown = np.zeros((32, 16, 3), np.uint8)
    shown[:16] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            image = Image.fromarray(np.ascontiguousarray(np.rot90(shown, turn)))
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(tmp_path / name / f"{i}.{suffix}", exif=exif)
    data = image_folder(str(tmp_path) + ("" if size is None else f"@{size}"))
    assert data.input_shape == ((3, 32, 16) if size is None else (3, 16, 16))
    raw = data.raw(data.train.inputs)
    middle = data.input_shape[1] // 2
    assert raw[:, :, : middle - 1].mean() > 0.95 and raw[:, :, middle + 1 :].mean() < 0.05


@pytest.mark.parametrize("tag", [0x0100, 0x0103, 0x8769])
def test_an_ill_typed_tag_hinders_no_viewer_and_no_reader(tag, tmp_path):
    """Bright above, dark below, as orientation 6 shows it; the other tag should be a number and is a text."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 8, 0) + struct.pack("<HHI4s", tag, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    for name in "ab":
        for i in range(3):
            written(tmp_path / name / f"{i}.jpg", Image.fromarray(pixels), exif=exif)
    data = image_folder(str(tmp_path))
    raw = data.raw(data.train.inputs)
    assert data.input_shape == (3, 32, 16) and raw[:, :, :15].mean() < 0.05 and raw[:, :, 17:].mean() > 0.95


@pytest.mark.parametrize(
    "content", [b"P6 a 4 255\n" + bytes(72), b"P6 6 4 0\n" + bytes(72), b"P6 -6 4 255\n" + bytes(72)]
)
def test_a_damaged_header_is_told_with_its_file(content, photos):
    """Pillow raises whatever comes of it."""
    (photos / "cat" / "3.ppm").write_bytes(content)
    with pytest.raises(ValueError, match=r"3\.ppm cannot be read as an image \(.+\); repair or remove it"):
        image_folder(str(photos))


def written(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


TRANSPARENT = {  # images of one colour, of which the left half is transparent; and what is shown of their right half
    "RGBA": lambda: (Image.merge("RGBA", [*Image.new("RGB", (4, 4), (9, 0, 60)).split(), HALF]), {}, (9, 0, 60)),
    "LA": lambda: (Image.merge("LA", [Image.new("L", (4, 4), 0), HALF]), {}, (0,)),
    "L": lambda: (HALF.point(lambda v: 77 if v else 3), {"transparency": 3}, (77,)),
    "P": lambda: (HALF.point(bool).convert("P"), {"transparency": 0}, (1, 1, 1)),
}
HALF = Image.fromarray(np.array([[0, 0, 255, 255]] * 4, np.uint8))


@pytest.mark.parametrize("mode", TRANSPARENT)
@pytest.mark.parametrize("size", [None, 4])
def test_what_is_transparent_is_white(mode, size, tmp_path):
    """Else glyphs and masks that stand in the transparency alone would all be the same black square."""
    image, options, colour = TRANSPARENT[mode]()
    for name in "ab":
        for i in range(3):
            written(tmp_path / name / f"{i}.png", image, **options)
    data = image_folder(str(tmp_path) + ("" if size is None else f"@{size}"))
    raw = (data.raw(data.test.inputs)[0] * 255).round().int()
    assert data.input_shape == (len(colour), 4, 4)
    for shown, right in zip(raw, colour, strict=True):
        assert torch.equal(shown, torch.tensor([[255, 255, right, right]] * 4, dtype=torch.int32))


def test_what_is_not_transparent_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for i, each in enumerate(pixels):
        written(tmp_path / "rgb" / "ab"[i % 2] / f"{i}.png", Image.fromarray(each))
        written(tmp_path / "rgba" / "ab"[i % 2] / f"{i}.png", Image.fromarray(each).convert("RGBA"))
    plain, opaque = (image_folder(str(tmp_path / name)) for name in ("rgb", "rgba"))
    assert all(torch.equal(plain.split(p).inputs, opaque.split(p).inputs) for p in ("train", "validation", "test"))


def parts_of(root):
    """The part of each image of `photos`, by its grey value."""
    data = image_folder(str(root))
    drawn = {part: data.raw(data.split(part).inputs) for part in ("train", "validation", "test")}
    return {value: part for part, raw in drawn.items() for value in (raw[:, 0, 0, 0] * 255).round().int().tolist()}


def test_images_keep_their_part_when_others_come_and_go(tmp_path):
    """Else what was tested on becomes what is trained on, as soon as one image is added."""
    shown = {value: f"{'cat' if value < 100 else 'dog'}/{value}.png" for value in range(200)}
    for value, file in shown.items():
        paint(tmp_path / file, value)
    before = parts_of(tmp_path)
    assert before.keys() == shown.keys()

    def share(part, file):  # where the file stands in the draw for a part, from 0 to 1
        return int(hashlib.sha256(f"{part}/{file}".encode()).hexdigest(), 16) / 16**64

    for value, file in shown.items():
        drawn = [part for part in ("test", "validation") if share(part, file) < 0.1]
        assert before[value] == [*drawn, "train"][0]
    for low in (0, 100):
        of = [before[value] for value in range(low, low + 100)]
        assert 4 <= of.count("test") <= 17 and 4 <= of.count("validation") <= 17
    for value in (3, 50, 120):
        (tmp_path / shown.pop(value)).unlink()
    for value in (200, 210, 220, 230, 240, 250):
        paint(tmp_path / "dog" / f"a{value}.png", value)
    after = parts_of(tmp_path)
    assert {value: after[value] for value in shown} == {value: before[value] for value in shown}
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert parts_of(tmp_path) == after


def values_of(data, split):
    return set((data.raw(split.inputs)[:, 0, 0, 0] * 255).round().int().tolist())


@pytest.mark.parametrize("first", [range(200), [*range(4), *range(100, 104)]], ids=["many", "few"])
def test_images_that_are_added_give_policies_nothing_that_a_backbone_learned(first, tmp_path):
    for value in first:
        paint(tmp_path / ("cat" if value < 100 else "dog") / f"{value}.png", value)
    before = image_folder(str(tmp_path))
    learned, kept = values_of(before, before.for_backbone.train), values_of(before, before.unseen)
    assert learned | kept == values_of(before, before.train) and not learned & kept
    assert len(kept) == len(before.unseen) and before.unseen.targets.tolist() == [
        int(value >= 100) for value in (before.raw(before.unseen.inputs)[:, 0, 0, 0] * 255).round().int().tolist()
    ]
    if len(first) > 100:
        assert 0.04 < len(kept) / len(before.train) < 0.2
    for value in range(200, 250):
        paint(tmp_path / "dog" / f"a{value}.png", value)
    after = image_folder(str(tmp_path))
    assert not values_of(after, after.unseen) & learned


def test_a_class_of_one_image_is_left_to_the_backbone(tmp_path):
    for part in ("train", "validation", "test"):
        for i, name in enumerate(("cat", "dog", "owl")):
            paint(tmp_path / part / name / "1.png", i)
    data = image_folder(str(tmp_path))
    assert (len(data.for_backbone.train), len(data.unseen)) == (2, 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [3, 10])
def test_no_part_is_without_a_class(share, count, tmp_path, monkeypatch):
    """However the draw falls out, three images of a class are enough."""
    monkeypatch.setattr(folder, "SHARES", dict.fromkeys(folder.SHARES, share))
    for value in (*range(count), *range(200, 200 + count)):
        paint(tmp_path / ("cat" if value < 100 else "dog") / f"{value}.png", value)
    parts = parts_of(tmp_path)
    for low, high in ((0, 99), (200, 255)):
        mine = sorted(part for value, part in parts.items() if low <= value <= high)
        assert len(mine) == count and set(mine) == {"train", "validation", "test"}
        if share != 0.1:
            assert mine.count("train") == (count - 2 if share == 0.0 else 1)


def test_parts_that_are_there_are_taken(photos, tmp_path):
    for part, value in (("train", 10), ("test", 90)):
        for name in ("cat", "dog"):
            for i in range(4):
                paint(tmp_path / "own" / part / name / f"{i}.png", (value + i, 0, 255), (8, 8), "RGB")
    data = image_folder(str(tmp_path / "own"))
    assert data.input_shape == (3, 8, 8)
    assert [len(data.split(part)) for part in ("train", "validation", "test")] == [6, 2, 8]
    raw = data.raw(data.test.inputs)
    assert sorted((raw[:, 0, 0, 0] * 255).round().int().tolist()) == sorted([90, 91, 92, 93] * 2)
    assert (raw[:, 1] < 1e-5).all()
    assert (raw[:, 2] > 1 - 1e-5).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "fox").mkdir(), r"fox holds no image"),
        (lambda p: paint(p / "cat" / "large.png", 0, (9, 9)), r"9x9; add @SIZE to the folder's name"),
        (lambda p: (p / "cat" / "3.png").write_bytes(b"none"), r"3\.png cannot be read as an image"),
        (lambda p: (p / "cat" / "3.png").write_bytes((p / "cat" / "3.png").read_bytes()[:50]), r"3\.png cannot be read"),
        (lambda p: paint(p / "dog" / "deep.png", 0, mode="I;16"), r"deep\.png has pixels of mode I;16"),
        (lambda p: shutil.rmtree(p / "dog"), r"a folder for each of two classes"),
        (lambda p: [f.unlink() for f in sorted((p / "cat").glob("*.png"))[2:]], r"too few different images to draw"),
        (lambda p: paint(p / "train" / "cat" / "0.png", 0), r"has a folder train, and beside it cat, dog, so it is not"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused(spoil, message, photos):
    spoil(photos)
    with pytest.raises(ValueError, match=message):
        image_folder(str(photos))


UNCLEAR = {  # folders of images, and which of them are named
    "capitals": (("Train/a", "Train/b", "Test/a", "Test/b"), "no folder train, but Test, Train"),
    "mnist": (("training/a", "training/b", "testing/a", "testing/b"), "no folder train, but testing, training"),
    "no train": (("validation/a", "validation/b", "test/a", "test/b"), "no folder train, but test, validation"),
    "classes beside a test": (("a", "b", "test/a", "test/b"), "no folder train, but test, so"),
    "val": (("train/a", "train/b", "val/a", "val/b"), "a folder train, and beside it val, so"),
    "valid": (("train/a", "train/b", "valid/a", "valid/b", "test/a", "test/b"), "beside it valid, so"),
    "a class": (("car", "plane", "train"), "beside it car, plane, so"),
    "a class of classes": (("car", "plane", "train/steam", "train/diesel"), "beside it car, plane, so"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_may_be_a_class_or_a_part_is_refused_by_name(name, tmp_path):
    places, message = UNCLEAR[name]
    for place in places:
        for i in range(3):
            paint(tmp_path / place / f"{i}.png", i)
    with pytest.raises(ValueError, match=message + ".* name parts train, validation, test, with the classes in each"):
        load_dataset(str(tmp_path))


def test_classes_may_have_names_like_parts(tmp_path):
    """Where their images lie in them; and what holds no image may stand beside parts."""
    for name in ("valid", "invalid"):
        for i in range(3):
            paint(tmp_path / "tickets" / name / f"{i}.png", i)
            paint(tmp_path / "own" / "train" / name / f"{i}.png", i)
    (tmp_path / "own" / "notes").mkdir()
    (tmp_path / "own" / "notes" / "made.txt").write_text("in spring")
    assert load_dataset(str(tmp_path / "tickets")).names == ("invalid", "valid")
    assert load_dataset(str(tmp_path / "own")).names == ("invalid", "valid")


def test_what_stands_beside_classes_and_parts_is_counted(photos, tmp_path):
    """Strays beside classes, strays beside parts, and links to folders, which might lead in a circle."""
    before = image_folder(str(photos))
    paint(photos / "stray.png", 9)
    with pytest.warns(UserWarning, match=r"1 files below .* are left out, such as .*stray\.png"):
        image_folder(str(photos))
    (photos / "stray.png").unlink()
    paint(tmp_path / "elsewhere" / "more.png", 9)
    (photos / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"1 links to folders below .* are not followed, such as .*cat/link"):
        assert torch.equal(image_folder(str(photos)).train.inputs, before.train.inputs)
    (photos / "cat" / "link").unlink()
    photos.rename(tmp_path / "train")
    paint(tmp_path / "own" / "stray.png", 9)
    (tmp_path / "train").rename(tmp_path / "own" / "train")
    with pytest.warns(UserWarning, match=r"1 files beside the parts of .* are left out, such as .*stray\.png"):
        image_folder(str(tmp_path / "own"))


def test_other_classes_in_another_part_are_refused(tmp_path):
    for part, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            paint(tmp_path / part / name / "0.png", 0)
    with pytest.raises(ValueError, match=r"test has the classes \['a', 'c'\], .*train has \['a', 'b'\]"):
        image_folder(str(tmp_path))


def test_sizes_that_no_image_has_are_refused(photos):
    for size in ("0", "9999"):
        with pytest.raises(ValueError, match="1 to 4096 pixels"):
            check_dataset(f"{photos}@{size}")


GOOD = Split(torch.rand(40, 1, 4, 4), torch.arange(40) % 3)
NUMBERS = replace(GOOD, targets=torch.rand(40, 3), task=Regression(1.0))
FAULTS = {  # what is wrong with one of three splits, and what is said of it
    "a class too much": (replace(GOOD, targets=GOOD.targets + 1), "classes from 0 to 2, got 1 to 3"),
    "a class below 0": (replace(GOOD, targets=GOOD.targets - 1), "classes from 0 to 2, got -1 to 1"),
    "classes as numbers": (replace(GOOD, targets=GOOD.targets.float()), r"classes as integers \[n\], got torch.float32"),
    "classes in a column": (replace(GOOD, targets=GOOD.targets.view(-1, 1)), r"got torch.int64 \[40, 1\]"),
    "too many targets": (replace(GOOD, inputs=GOOD.inputs[:30]), "one row of each .* got {'inputs': 30, 'targets': 40"),
    "too few targets": (replace(GOOD, targets=GOOD.targets[:30]), "got {'inputs': 40, 'targets': 30"),
    "no rows": (GOOD.head(0), "at least one, got {'inputs': 0"),
    "nan": (replace(GOOD, inputs=GOOD.inputs / 0), "the inputs of .* hold NaN or infinity; clean"),
    "other images": (replace(GOOD, inputs=GOOD.inputs[:, :, 1:]), r"one form of inputs .* got .*\(1, 3, 4\)"),
    "other types": (replace(GOOD, inputs=GOOD.inputs.long()), "one form of inputs .* of int64"),
    "arrays": (replace(GOOD, inputs=GOOD.inputs.numpy()), "expected tensors .* got ndarray and Tensor"),
    "another task": (NUMBERS, r"one task in all splits of mine, .*Regression\(variance=1.0\)"),
    "numbers in a row": (replace(NUMBERS, targets=torch.rand(40)), r"floating-point targets \[n, 3\]"),
    "targets of nan": (replace(NUMBERS, targets=torch.full((40, 3), torch.nan)), "the targets of .* hold NaN"),
}  # fmt: skip


def whole(split):
    """A copy, which shares no memory."""
    return replace(split, inputs=split.inputs.clone())


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_split_is_told_when_the_data_set_is_made(fault, message, at):
    """Not when a network first meets it, which for the test is after all training."""
    splits = [whole(GOOD) for _ in range(3)]
    splits[at] = fault
    with pytest.raises(ValueError, match=message):
        Dataset("mine", 3, *splits, Augmentation())


def test_types_that_lose_nothing_are_brought_to_those_that_networks_take():
    inputs, targets = GOOD.inputs.double(), GOOD.targets.to(torch.uint8)
    data = Dataset("mine", 3, *(Split(inputs.clone(), targets) for _ in range(3)), Augmentation())
    assert data.train.inputs.dtype == torch.float32 and torch.equal(data.test.targets, GOOD.targets)
    named = {"x": inputs, "ids": torch.arange(40)}
    data = Dataset("mine", 3, *(Split(named, targets) for _ in range(3)), Augmentation())
    assert [x.dtype for x in data.train.inputs.tensors.values()] == [torch.float32, torch.int64]
    numbers = replace(NUMBERS, targets=NUMBERS.targets.double())
    assert Dataset("mine", 3, *[numbers] * 3, Augmentation()).test.targets.dtype == torch.float32


def test_large_inputs_are_looked_at_once(monkeypatch):
    data = Dataset("mine", 3, *(whole(GOOD) for _ in range(3)), Augmentation())
    monkeypatch.setattr("dynrl.data.base.checked", None)
    assert replace(data, name="other").train is data.train


def test_splits_that_share_rows_are_no_data_set():
    """As far as the memory tells: every second row is not the others."""
    x, y = torch.rand(90, 1, 4, 4), torch.arange(90) % 3
    apart = Dataset("apart", 3, *(Split(x[i::3], y[i::3]) for i in range(3)), Augmentation())
    assert as_dataset(apart) is apart
    for parts, rows in (((0, 40), (40, 70), (60, 90)), 10), (((0, 30), (30, 60), (0, 30)), 30):
        splits = [Split(x[low:high], y[low:high]) for low, high in parts]
        with pytest.raises(ValueError, match=f"expected disjoint splits in mine, but .* and test have {rows} rows"):
            as_dataset(Dataset("mine", 3, *splits, Augmentation()))
    del DATASETS["apart"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, r"DATASETS\['wrong'\]: expected a function without arguments, got a int"),
        (lambda name: name, r"the data set 'wrong' cannot be made \(TypeError: "),
        (lambda: os.stat("no such file"), r"the data set 'wrong' cannot be made \(FileNotFoundError: "),
    ],
)
def test_a_loader_that_fails_is_named(row, said, monkeypatch):
    monkeypatch.setitem(DATASETS, "wrong", row)
    with pytest.raises(ValueError, match=said):
        load_dataset("wrong")


def test_a_loader_that_returns_no_data_set_is_refused(monkeypatch):
    monkeypatch.setitem(DATASETS, "wrong", lambda: 3)
    with pytest.raises(ValueError, match="loader of 'wrong' to return a dynrl.data.Dataset, got int"):
        load_dataset("wrong")
