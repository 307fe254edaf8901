"""Run folders: their files, and what kind of run each is."""

from __future__ import annotations

import shutil

import pytest
import torch

from dynrl.deploy import SHIPPED, load, shipped
from dynrl.files import write_json
from dynrl.plans import plan
from dynrl.policies import load_policy, save_policy
from dynrl.runs import RunFolder, RunKind, by_backbone, by_kind, check_one_backbone, flat, kind_of
from dynrl.training import make_run
from tests.scripts.calls import twin

SETTINGS = {
    "agent": "ppo", "policy": "sequential", "baseline": "value", "reward": "distillation", "price_range": [0.1, 1.0],
    "cost": "macs", "attacked": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "tuned", "finished", "label"),
    [
        ({}, False, True, "learned"), ({"agent": "gate"}, True, True, "gate tuned"),
        ({"policy": "upfront", "baseline": "greedy"}, False, True, "learned upfront greedy"),
        ({"policy": "upfront", "reward": "blockdrop"}, False, True, "learned upfront blockdrop"),
        ({"baseline": "group"}, False, True, "learned group"), ({"cost": "time"}, False, True, "learned by time"),
        ({"price_range": [0.058, 0.058]}, True, True, "learned at 0.058 tuned"),
        ({"attacked": 0.3}, True, True, "learned tuned on attacks"),
        ({"agent": "sb3-dqn"}, False, False, "sb3-dqn unfinished"),
    ],
)  # fmt: skip
def test_labels_are_made_from_a_kinds_fields(changed, tuned, finished, label):
    kind = kind_of(SETTINGS | changed, tuned, finished)
    assert kind.label == label
    assert RunKind(**kind.to_dict()) == kind


def test_nested_settings_are_read_by_their_names():
    assert flat({"problem": {"data": "digits", "seed": 3}, "steps": 9}) == {"data": "digits", "seed": 3, "steps": 9}


@pytest.mark.parametrize("name", shipped())
def test_a_run_folder_is_the_plugged_model(name):
    run, model = RunFolder(SHIPPED / name), load(name)
    assert run.finished and run.model.curve == model.curve
    inputs = model.backbone.random_inputs(5)
    for plugged in (run.model, model):
        plugged.set_price(plugged.price_range[0])
    assert torch.equal(run.model(inputs), model(inputs))
    assert run.plain is None and run.kind.tuned == (run.rounds > 0)
    if run.kind.tuned:  # the package holds no more
        with pytest.raises(ValueError, match="was fine-tuned, but its backbone-pretrained.safetensors is not there"):
            _ = run.pretrained
    else:
        assert run.pretrained is run.backbone


def test_files_are_read_once_and_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nosuch is no run folder: it has no config\.json"):
        _ = RunFolder(tmp_path / "nosuch").config
    write_json(tmp_path / "config.json", {"a": 1})
    with pytest.raises(ValueError, match="is not what dynrl train writes"):
        _ = RunFolder(tmp_path).config
    shutil.copytree(SHIPPED / "skip-digits", tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.backbone is run.backbone and run.model is run.model
    (tmp_path / "half").mkdir()
    for folder in (tmp_path / "half", run.path):
        RunFolder(folder).drop_half_made()
    assert not (tmp_path / "half").exists() and run.path.exists()


def test_the_backbone_says_whether_it_was_tuned_whatever_the_settings_ask_for(tmp_path):
    """Settings are changed first: where no disk has room for more, what was finished before stays a run."""
    run = RunFolder(twin(SHIPPED / "exit-digits", tmp_path / "run", finetune=True))
    for notes in ({}, {"rounds": 0}):
        run.backbone.save(run.backbone_file, **notes)
        run.forget()
        assert by_kind([run]) == {run.kind: [run]} and run.kind.label == "learned"
        assert run.pretrained_file == run.backbone_file
    run.backbone.save(run.backbone_file, rounds=1)
    run.forget()
    assert run.kind.tuned
    planned, before = plan("exit", "digits"), sorted(tmp_path.iterdir())
    for refused in (
        lambda: by_kind([run]), lambda: by_backbone([run]), lambda: make_run(planned, tmp_path / "new", run.path),
        lambda: check_one_backbone(tmp_path, run.path),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match="run was fine-tuned, but its backbone-pretrained.safetensors is not there"
        ):
            refused()
    assert sorted(tmp_path.iterdir()) == before


def test_runs_on_two_backbones_are_seeds_of_one_another_only_if_they_were_trained_alike(tmp_path):
    """What was found on each backbone may differ; what was asked for may not."""
    shutil.copytree(SHIPPED / "exit-digits", tmp_path / "run")
    folders = [tmp_path / "run"]
    folders.append(twin(folders[0], tmp_path / "unlike", seed=1, steps=7))
    folders.append(twin(folders[0], tmp_path / "alike", seed=1, price_range=[0.5, 5.0], epochs=3))
    assert RunFolder(folders[0]).settings["price_range"] != [0.5, 5.0]
    for folder in folders[1:]:
        other = RunFolder(folder)
        with torch.no_grad():
            list(other.backbone.parameters())[-1].add_(1e-3)
        other.backbone.save(other.backbone_file)
        policy, known = load_policy(other.policy_file)
        save_policy(other.policy_file, policy, known | {"backbone": other.backbone.fingerprint()})
    run, unlike, alike = map(RunFolder, folders)
    assert list(by_backbone([run, alike]).values()) == [[run], [alike]]
    with pytest.raises(ValueError, match=r"are both 'learned.*' and differ in \['steps'\]; report them apart"):
        by_backbone([run, unlike])


@pytest.mark.parametrize("kept", ["policy.safetensors", "checkpoints/ppo", "backbone.safetensors"])
def test_what_was_trained_is_never_removed(kept, tmp_path):
    """Not even where the settings are lost, by a copy that left them out, for example."""
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_bytes(b"trained for days")
    with pytest.raises(ValueError, match=rf"has no config\.json, but it holds {kept}; put that file back"):
        RunFolder(tmp_path).drop_half_made()
    assert (tmp_path / kept).is_file()


def test_a_policy_of_another_backbone_is_refused(tmp_path):
    shutil.copytree(SHIPPED / "skip-digits", tmp_path / "run")
    shutil.copyfile(SHIPPED / "exit-digits" / "backbone.safetensors", tmp_path / "run" / "backbone.safetensors")
    with pytest.raises(ValueError, match="decides 'skip'"):
        _ = RunFolder(tmp_path / "run").model
