"""`dynrl train` and `dynrl pretrain`: what they refuse, what they write, and that a killed training goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

import dynrl
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import SHIPPED
from dynrl.files import load_tensors, read_json
from dynrl.plans import plan
from dynrl.recipes import DEFAULTS
from dynrl.runs import RunFolder
from dynrl.scripts.cli import main
from dynrl.training import pretrain_into
from tests.scripts.calls import COMMAND, call, refusal


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("train", "nosuch"), "unknown decision 'nosuch'"), (("train",), "required"),
        (("train", "skip", "--data", "nosuch"), "unknown data set 'nosuch'"),
        (("train", "skip", "--nosuch", "3"), "nosuch"), (("train", "skip", "--agent", "nosuch"), "unknown agent 'nosuch'"),
        (("train", "skip", "--steps", "0"), "steps of at least 1"), (("train", "skip", "--steps", "many"), "many"),
        (("train", "skip", "--seed", "-1"), "seed of at least 0"), (("train", "skip", "--threads", "0"), "--threads of at least 1"),
        (("train", "skip", "--price-range", "1", "0.5"), "price range"), (("train", "skip", "--price-range", "0", "0.5"), "price range"),
        (("train", "skip", "--backbone", "nosuch"), "nosuch"), (("train", "skip", "--backbone", "junk.safetensors"), "junk"),
        (("train", "skip", "--seed", str(2**32)), "below 2^31"), (("pretrain", "skip", "--out", "/dev/null/x"), "/dev/null/x"),
        (("pretrain", "skip", "--threads", "0"), "--threads of at least 1"),
        (("train", "skip", "--resume", "nosuch"), "no run folder"),
        (("train", "exit", "--resume", str(SHIPPED / "skip-digits")), "decides 'skip', not 'exit'"),
        (("train", "skip", "--out", "."), "exists"),
        (("train", "skip", "--agent", "gate", "--reward", "correct"), "gradient"),
        (("train", "skip", "--agent", "gate", "--num-env-runners", "1"), "those of RLlib"),
        (("train", "skip", "--reward", "blockdrop"), "upfront"), (("train", "skip", "--baseline", "greedy"), "whole routes"),
        (("train", "skip", "--device", "nosuch"), "no device 'nosuch'"), (("train", "skip", "--dtype", "int8"), "int8"),
        (("pretrain", "skip", "--device", "nosuch"), "no device 'nosuch'"),
        (("train", "skip", "--agent", "gate", "--dtype", "bfloat16"), "float32"),
        (("train", "skip", "--num-learners", "-1"), "num_learners of at least 0"),
        (("train", "skip", "--num-learners", "3"), "3 learners"), (("train", "skip", "--device", "meta"), "cpu or cuda"),
        (("train", "skip", "--agent", "gate", "--address", "auto"), "those of RLlib"),
        (("train", "hidden-update", "--policy", "upfront"), "needs images"),
        (("train", "skip", "--agent", "gate", "--cost", "time"), "MACs"), (("train", "skip", "--reward", "nosuch"), "unknown reward 'nosuch'"),
        (("train", "skip", "--policy", "nosuch"), "unknown kind of policy 'nosuch'"), (("train", "skip", "--cost", "money"), "money"),
        (("pretrain", "nosuch"), "unknown decision 'nosuch'"), (("pretrain", "skip", "--data", "nosuch"), "unknown data set 'nosuch'"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(words, tmp_path, capsys)


def test_a_bad_command_from_a_shell(tmp_path):
    done = call("train", "skip", "--data", "nosuch", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "unknown data set 'nosuch'" in done.stderr


def test_the_plain_network_comes_before_the_backbone(tmp_path, monkeypatch):
    """A run killed between the two must not be taken for pretrained when it is resumed."""
    made, epochs = [], []

    def pretrain(backbone, dataset, recipe, *, random_routes, **more):
        made.append(random_routes)
        epochs.append(recipe.length(random_routes))
        backbone.fc.bias.data += 1
        return backbone

    monkeypatch.setattr("dynrl.pretraining.pretrain", pretrain)
    planned = plan("skip", "digits")
    pretrain_into(tmp_path, planned)
    assert made == [False, True]
    # The backbone begins from the plain network's weights.
    plain, routed = (load_backbone(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "backbone"))
    torch.testing.assert_close(plain.fc.bias, planned.backbone.fc.bias + 1)
    torch.testing.assert_close(routed.fc.bias, plain.fc.bias + 1)
    assert {p.name for p in tmp_path.iterdir()} == {"plain.safetensors", "backbone.safetensors", "data.json"}
    assert routed.trained_on == load_dataset("digits").provenance
    main(["pretrain", "skip", "--network", "layers=[1,2,1]", "--plain", "--out", str(tmp_path / "smaller")])
    assert made == [False, True, False]
    assert epochs[2] == epochs[0] + epochs[1]  # a rival is trained as long
    tuning = planned.recipe.finetuning
    words = ["pretrain", "skip", "--plain", "--finetune", "--out", str(tmp_path / "longer")]
    main(words)
    assert epochs.pop() == epochs[2] + tuning.rounds * tuning.epochs and made.pop() is False
    assert {p.name for p in (tmp_path / "smaller").iterdir()} == {
        "plain.safetensors", "config.json", "data.json",
    }  # fmt: skip
    smaller, notes = load_backbone(tmp_path / "smaller" / "plain.safetensors")
    assert (smaller.max_steps, notes["random_routes"]) == (2, False)


def test_a_killed_pretraining_goes_on_by_the_same_command(tmp_path, monkeypatch, capsys):
    made, killed = [], [True]

    def pretrain(backbone, *rest, random_routes, checkpoint, **more):
        made.append(checkpoint.name)
        if random_routes and killed:
            killed.pop()
            raise KeyboardInterrupt
        return backbone

    def refused(*words):
        with pytest.raises(SystemExit) as left:
            main(words)
        return left.value.code, capsys.readouterr().err

    monkeypatch.setattr("dynrl.pretraining.pretrain", pretrain)
    out = tmp_path / "made"
    words = ["pretrain", "skip", "--network", "layers=[1,2,1]", "--out", str(out)]
    assert refused(*words)[0] == 130
    kept = (out / "config.json").read_text()
    assert "another seed" in refused(*words, "--seed", "3")[1]
    assert "another decision, network" in refused("pretrain", "exit", "--out", str(out))[1]
    main([*words, "--threads", "2"])  # where it runs may change
    assert made == [f"pretraining-{name}.safetensors" for name in ("plain", "backbone", "backbone")]
    assert {p.name for p in out.iterdir()} == {
        "plain.safetensors", "backbone.safetensors", "config.json", "data.json",
    }  # fmt: skip
    assert (out / "config.json").read_text() == kept
    (tmp_path / "else").mkdir()
    assert "no folder of dynrl pretrain" in refused("pretrain", "skip", "--out", str(tmp_path / "else"))[1]
    shutil.copyfile(SHIPPED / "skip-digits" / "config.json", tmp_path / "else" / "config.json")
    assert "no folder of dynrl pretrain" in refused("pretrain", "skip", "--out", str(tmp_path / "else"))[1]
    # It holds no policy.
    for other in (("train", "skip", "--resume"), ("evaluate",), ("calibrate",)):
        code, said = refused(*other, str(out))
        assert code == 2 and f"{out} is from dynrl pretrain" in said and f"--backbone {out}" in said
    assert {p.name for p in (tmp_path / "else").iterdir()} == {"config.json"}
    (out / "policy.safetensors").touch()  # one put there by hand: `dynrl calibrate` needs no more
    assert RunFolder(out).data == "digits"


def test_a_run_folder_holds_what_is_promised(run):
    names = {p.name for p in run.iterdir()}
    expected = {
        "config.json",
        "checkpoints",
        "backbone.safetensors",
        "plain.safetensors",
        "policy.safetensors",
        "report.json",
    }
    assert names >= expected | {"report.png"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".")]
    model = dynrl.load(run)
    assert model(torch.randn(2, *model.input_shape)).shape == (2, 10)


def test_a_finished_run_is_finetuned(run, others):
    tuned = others / "tuned"
    before, after = (load_backbone(folder / "backbone.safetensors") for folder in (run, tuned))
    assert (tuned / "backbone-pretrained.safetensors").read_bytes() == (run / "backbone.safetensors").read_bytes()
    assert before[0].fingerprint() != after[0].fingerprint()
    assert after[1] == before[1] | {"rounds": 2}
    assert dynrl.load(tuned)(torch.randn(2, 1, 24, 24)).shape == (2, 10)
    with pytest.raises(ValueError, match="trained for another backbone"):
        dynrl.plug(before[0], tuned / "policy.safetensors")
    assert RunFolder(tuned).settings == RunFolder(run).settings | {"finetune": True}


def test_settings_left_out_are_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("dynrl.training.learn", lambda run, planned: False)
    for data, more in (("adding", []), ("adding", ["--num-envs", "8", "--price-range", "0.1", "2"]), ("digits", [])):
        name = f"{data}-{len(more)}"
        decision = "hidden-update" if data == "adding" else "skip"
        with pytest.raises(SystemExit):  # as after Ctrl-C
            main(["train", decision, "--data", data, "--out", str(tmp_path / name), "--threads", "2", *more])
    row, found = DEFAULTS["hidden-update", "adding"].learning, RunFolder(tmp_path / "adding-0").settings
    assert (found["num_envs"], found["price_range"], found["steps"]) == (row.num_envs, list(row.price_range), row.steps)
    assert found["finetune"]  # no backbone survives random routes there
    found = RunFolder(tmp_path / "adding-5").settings
    assert (found["num_envs"], found["price_range"], found["hidden"]) == (8, [0.1, 2.0], 0)
    found = RunFolder(tmp_path / "digits-0").settings
    assert (found["num_envs"], found["price_range"], found["finetune"]) == (64, None, False)


def test_gates_are_resumed_by_the_command(others):
    done = load_tensors(others / "gate" / "checkpoints" / "gate.safetensors", "checkpoint")[1]["done"]
    assert RunFolder(others / "gate").settings["agent"] == "gate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrl.scripts.evaluate.report_runs", lambda *runs: None)
        main(["train", "skip", "--resume", str(others / "gate")])
    assert load_tensors(others / "gate" / "checkpoints" / "gate.safetensors", "checkpoint")[1]["done"] == done


def start(*words, cwd):
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path, pattern, process, seconds=120):
    end = time.time() + seconds
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stdout.read()[-2000:]
        assert time.time() < end, f"no {pattern} in {path}"
        time.sleep(0.05)


def files(folder):
    """What lies in a run folder, numbers left out: event files carry times, checkpoints steps."""
    return {re.sub(r"\d+", "N", p.name.split(".tfevents")[0]) for p in folder.iterdir()}


@pytest.mark.usefixtures("ray_local")
def test_killed_and_resumed(run, backbone_folder, tmp_path, capsys):
    out = tmp_path / "killed"
    words = ("--backbone", backbone_folder, "--steps", 60_000, "--num-envs", 8, "--out", out)
    process = start("train", "skip", *words, cwd=tmp_path)
    wait_for(out / "checkpoints", "checkpoint_*", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done_before = max(int(p.name.split("_")[1]) for p in (out / "checkpoints").glob("checkpoint_*"))
    assert 0 < done_before < 60_000
    assert not (out / "policy.safetensors").exists()
    # Fewer steps in all, so that the test is short: what matters is where it starts and how it ends.
    config = read_json(out / "config.json")
    target = done_before + 1000
    config["learning"]["steps"] = target
    (out / "config.json").write_text(json.dumps(config))
    main(["train", "skip", "--resume", str(out)])
    done_after = max(int(p.name.split("_")[1]) for p in (out / "checkpoints").glob("checkpoint_*"))
    assert target <= done_after < target + 8 * 8 * 3
    assert files(out) == files(run)
    dynrl.load(out)
    for words, reason in ((("--resume", out, "--seed", 5), "begun with seed="), (("--out", out), "exists")):
        with pytest.raises(SystemExit) as refused:
            main(["train", "skip", *map(str, words)])
        assert refused.value.code == 2 and reason in capsys.readouterr().err


def test_a_run_whose_backbone_is_gone_is_not_resumed_on_another(tmp_path, capsys):
    for name in ("config.json", "policy.safetensors"):
        shutil.copyfile(SHIPPED / "skip-digits" / name, tmp_path / name)
    with pytest.raises(SystemExit) as left:
        main(["train", "skip", "--resume", str(tmp_path)])
    assert left.value.code == 2 and "has a policy but no backbone.safetensors" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_ctrl_c_before_there_is_a_policy_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynrl.pretraining.pretrain", stop)
    with pytest.raises(SystemExit) as left:
        main(["train", "skip", "--data", "digits", "--out", str(tmp_path / "run")])
    assert left.value.code == 130
    said = f"all up to the last checkpoint is kept; go on with: dynrl train skip --resume {tmp_path / 'run'}"
    assert f"interrupted; {said}" in capsys.readouterr().err
