"""The one door for files: what is wrong is refused by its name, and what is written is whole and private enough."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from dynrl.backbones import load_backbone
from dynrl.checkpoints import Checkpoint
from dynrl.deploy import SHIPPED, load
from dynrl.files import (
    check_folder,
    filled,
    limited,
    load_tensors,
    locked,
    make_aside,
    read_json,
    remove_leftovers,
    save_tensors,
    write_json,
    writing_into,
)  # fmt: skip
from dynrl.policies import load_policy
from tests.mutations import check


def test_changed_models_are_refused_by_their_file_or_right(tmp_path):
    """A short share of what `make test-scale` tries."""
    found = check(200, 0, tmp_path)
    assert found["refused"] > 100 and found["accepted"] > 10
    assert found["megabytes"] < 300


@pytest.fixture
def run(tmp_path):
    shutil.copytree(SHIPPED / "skip-digits", tmp_path / "run")
    return tmp_path / "run"


def rewrite(file, kind, changes):
    tensors, metadata = load_tensors(file, kind)
    metadata = {**metadata, **changes}
    save_tensors(file, kind, tensors, {name: value for name, value in metadata.items() if value is not ...})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": ...}, "kind: missing setting; expected kind, config, decision"), ({"new": 1}, "new: unknown setting"),
        ({"finished": 1}, "finished: expected bool, got 1"), ({"curve": None}, "curve: expected tuple.*got None"),
        ({"curve": [[1, 2, 3]]}, "curve: expected"), ({"curve": [[0, 1.0], [0.1, 0.5]]}, r"curve: .*got \(0, 1.0\)"),
        ({"curve": [[-1, 0.5]]}, "prices from 0.005 to 6"), ({"curve": [[0.1, 0.5], [0.01, 0.7]]}, "expected rising prices"),
        ({"curve": [[0.1, 0.5], [0.1, 0.7]]}, "expected rising prices"), ({"curve": [[9.0, 0.5]]}, "prices from 0.005 to 6"),
        ({"curve": [[0.1, 0]]}, "a cost above 0"), ({"curve": [[0.1, 10**400]]}, "curve: expected"),
        ({"decision": "exit"}, "decides 'exit'"), ({"backbone": "0"}, "another backbone"), ({"config": {}}, "sight"),
    ],
)  # fmt: skip
def test_a_policys_notes_are_checked(changes, reason, run):
    file = run / "policy.safetensors"
    rewrite(file, "policy", changes)
    with pytest.raises(ValueError, match=rf"^{file}: .*{reason}"):
        load(run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 10_000_000}, "more than .* numbers"), ({"hidden": 32}, "tensor 'hidden.weight': expected torch.float32"),
        ({"hidden": 64.0}, "hidden: expected int, got 64.0"), ({"hidden": True}, "hidden: expected int"), ({"start": [9]}, "expected a start"),
        ({"price_range": [1e-320, 2.0]}, "within 1e-12"), ({"price_range": [2.0, 1.0]}, "low <= high"), ({"new": 1}, "new: unknown"),
        ({"sight": {"features": 34, "points": 10, "most_choices": 2, "suggested": 0}}, "the policy is for StepSight"), ({"sight": None}, "expected an object"),
    ],
)  # fmt: skip
def test_a_policys_settings_are_checked(changes, reason, run):
    file = run / "policy.safetensors"
    config = load_tensors(file, "policy")[1]["config"]
    rewrite(file, "policy", {"config": config | changes})
    with pytest.raises(ValueError, match=rf"^{file}: .*{reason}"):
        load(run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [3, 4, 10**4]}, "more than .* weights"), ({"widths": [8, 16, 9999]}, "more than .* numbers"),
        ({"layers": None}, "layers: expected tuple.*, got None"), ({"widths": ["a", 1, 2]}, "widths: expected tuple"),
        ({"classes": 10.0}, "classes: expected int, got 10.0"), ({"widths": [0, 16, 32]}, "each number in widths of at least 1, got 0"),
        ({"input_shape": [1, 99_999, 99_999]}, "rows of at most"), ({"new": 1}, "new: unknown"), ({"block": 3}, "block: expected str"),
        ({"layers": [[3], 4, 4]}, "layers: expected"), ({"stem_stride": 0}, "stem_stride of at least 1"),
    ],
)  # fmt: skip
def test_a_backbones_settings_are_checked(changes, reason, run):
    file = run / "backbone.safetensors"
    config = load_tensors(file, "backbone")[1]["config"]
    rewrite(file, "backbone", {"config": config | changes, "notes": {}})
    with pytest.raises(ValueError, match=rf"^{file}: .*{reason}"):
        load_backbone(file)


def test_tensors_are_those_that_the_settings_make(run):
    file = run / "policy.safetensors"
    tensors, metadata = load_tensors(file, "policy")
    for changed, reason in (
        ({**tensors, "new": torch.zeros(1)}, "tensor 'new' is unknown"), ({k: v for k, v in tensors.items() if k != "head.bias"}, "is missing"),
        ({**tensors, "head.bias": torch.zeros(2).double()}, "numbers of one type"), ({**tensors, "head.bias": torch.zeros(2).long()}, "expected torch.float32"),
        ({name: tensor.half() for name, tensor in tensors.items()}, "weights in float32"), ({**tensors, "head.bias": torch.zeros(1, 2)}, r"got .* \(1, 2\)"),
    ):  # fmt: skip
        save_tensors(file, "policy", changed, metadata)
        with pytest.raises(ValueError, match=rf"^{file}: .*{reason}"):
            load_policy(file)


def test_a_backbone_of_another_type_is_itself(run):
    file = run / "backbone.safetensors"
    backbone, notes = load_backbone(file)
    backbone.bfloat16().save(file, **notes)
    again, _ = load_backbone(file)
    assert next(again.parameters()).dtype == torch.bfloat16 and again.fingerprint() == backbone.fingerprint()


def test_json_holds_finite_numbers_only(tmp_path):
    for text in ("[NaN]", "[Infinity]", "[1e999]", "[" * 100_000, "", "{'a': 1}", "[1" + "0" * 5000 + "]", "\ufeff[]"):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^{tmp_path / 'f.json'}"):
            read_json(tmp_path / "f.json")


def test_limits_hold_for_the_block_only():
    with pytest.raises(ValueError, match="more than 1 weights"), limited(1, 10**6):
        nn.Linear(2, 2)
    with pytest.raises(ValueError, match="or 100 numbers"), limited(10, 100):
        nn.Linear(10_000, 10_000)
    assert filled(lambda: nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)})(torch.ones(2)) == 3


# Writing -----------------------------------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "wanted"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_written_files_have_the_umasks_mode_or_that_of_the_old_file(mask, wanted, tmp_path):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "new.json", 1)
        save_tensors(tmp_path / "new.safetensors", "policy", {"a": torch.zeros(1)}, {})
        for path in (tmp_path / "new.json", tmp_path / "new.safetensors"):
            assert mode(path) == wanted
            path.chmod(0o640)
        write_json(tmp_path / "new.json", 2)
        save_tensors(tmp_path / "new.safetensors", "policy", {"a": torch.ones(1)}, {})
        assert [mode(path) for path in sorted(tmp_path.iterdir())] == [0o640, 0o640]
    finally:
        os.umask(before)


def test_what_a_kill_leaves_is_found_and_removed(tmp_path):
    code = "import os; from dynrl.files import write_aside\nwith write_aside('kept.json'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    (tmp_path / ".mine").touch()
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".mine"]


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="full"), make_aside(tmp_path / "new" / "run") as aside:
        (aside / "half").touch()
        raise OSError("the disk is full")
    assert not list(tmp_path.iterdir())
    with make_aside(tmp_path / "new" / "run") as aside:
        (aside / "whole").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="exists; choose another"), make_aside(tmp_path / "new" / "run"):
        pass


def test_of_two_that_make_a_folder_at_once_the_second_is_told(tmp_path):
    with (
        pytest.raises(ValueError, match="run exists; choose another --out"), make_aside(tmp_path / "run") as second,
        make_aside(tmp_path / "run") as first,
    ):  # fmt: skip
        for each in (first, second):
            (each / each.name).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", first.name], "whole, and nothing beside it"


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from dynrl.files import locked\nwith locked('.'): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another process"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path), pytest.raises(ValueError, match="in use"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_who_writes_into_a_folder_makes_it_locks_it_and_leaves_none_that_is_empty(tmp_path):
    with writing_into(None):
        pass
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), writing_into(out):
        with pytest.raises(ValueError, match="in use by another process"), locked(out):
            pass
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with writing_into(out):
        (out / "report.json").touch()
    with pytest.raises(RuntimeError), writing_into(out):
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["report.json"]
    with locked(out), pytest.raises(ValueError, match="in use by another process"), writing_into(out):
        pass
    with pytest.raises(ValueError, match="got the file"), writing_into(out / "report.json"):
        pass


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_files(tmp_path):
    """One that the commands tell in one line; safetensors has an error of its own. A file's limit stands for the disk."""
    write_json(tmp_path / "kept.json", 1)
    save_tensors(tmp_path / "kept.safetensors", "policy", {"a": torch.zeros(1)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_json(tmp_path / "kept.json", "x" * 10**6)
        with pytest.raises(OSError, match="kept.safetensors cannot be written"):
            save_tensors(tmp_path / "kept.safetensors", "policy", {"a": torch.zeros(10**6)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_json(tmp_path / "kept.json") == 1
    assert len(load_tensors(tmp_path / "kept.safetensors", "policy")[0]["a"]) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_path_below_a_file_cannot_become_a_folder(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "newer")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match=f"got the file {tmp_path / 'file'}"):
            check_folder(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Checkpoints -------------------------------------------------------------------------------------------------------


def parts(optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    made = optimizer(module.parameters(), 0.1)
    return {
        "module": module, "optimizer": made, "schedule": torch.optim.lr_scheduler.OneCycleLR(made, 0.1, 20),
        "generator": torch.Generator().manual_seed(3),
    }  # fmt: skip


def train(made, steps):
    for _ in range(steps):
        made["module"](torch.randn(5, 3, generator=made["generator"])).square().sum().backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad()
        made["schedule"].step()
    return made["module"].weight.detach().clone()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_checkpoint_goes_on_bit_by_bit(optimizer, tmp_path):
    whole, first, second = parts(optimizer), parts(optimizer), parts(optimizer)
    train(first, 7)
    Checkpoint(tmp_path / "c", first).save(7)
    assert Checkpoint(tmp_path / "nosuch", second).restore(9) == 0
    assert Checkpoint(tmp_path / "c", second).restore(9) == 7
    assert torch.equal(train(second, 6), train(whole, 13))


def test_no_flipped_byte_of_a_checkpoint_is_believed(tmp_path):
    made = parts()
    train(made, 2)
    file = tmp_path / "c"
    Checkpoint(file, made).save(2)
    content = file.read_bytes()
    for position in range(0, len(content), 23):
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(ValueError, match=f"{file} is damaged .*take it away"):
            Checkpoint(file, parts()).restore(9)


def changed(metadata, way, value):
    metadata = json.loads(json.dumps(metadata))
    holder = metadata
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    return metadata


@pytest.mark.parametrize(
    ("way", "value", "reason"),
    [
        (["done"], 10, "done of at least 0"), (["done"], -1, "done of at least 0"), (["done"], "2", "done: expected int"),
        (["states", "module"], 3, "module: expected what is like"), (["states"], {}, "expected the states of"),
        (["states", "generator"], {"tensor": "module.weight"}, "generator: expected"), (["states", "schedule", "items", 0, 1], "x", "schedule"),
        (["states", "optimizer", "items", 1, 1], {"list": []}, "optimizer.param_groups"), (["states", "optimizer"], {"tensor": "nosuch"}, "nosuch"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_odd_values_changes_nothing(way, value, reason, tmp_path):
    made, fresh = parts(), parts()
    train(made, 2)
    Checkpoint(tmp_path / "c", made).save(2)
    tensors, metadata = load_tensors(tmp_path / "c", "checkpoint")
    save_tensors(tmp_path / "c", "checkpoint", tensors, changed(metadata, way, value))
    before = fresh["module"].weight.clone()
    with pytest.raises(ValueError, match=f"{tmp_path / 'c'} is damaged .*{reason}"):
        Checkpoint(tmp_path / "c", fresh).restore(9)
    assert torch.equal(before, fresh["module"].weight)
