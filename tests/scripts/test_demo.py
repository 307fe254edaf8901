"""The demo's five rows are those of its budget, and the best of each kind."""

from types import SimpleNamespace

import pytest

from dynrl.data import load_dataset
from dynrl.recipes import defaults
from dynrl.scripts import demo
from dynrl.scripts.cli import main


@pytest.mark.parametrize("stage", ["pretrain", "train", "evaluate"])
def test_it_goes_on_in_its_folder(stage, tmp_path, monkeypatch, capsys):
    """By the command that it names, whichever stage was interrupted; what was trained is not trained again."""
    out, did, stopping = tmp_path / "my demo", [], {stage}

    def work(name, folder):
        did.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        if name in stopping:
            raise KeyboardInterrupt
        return SimpleNamespace(finished=True, path=folder)

    monkeypatch.setattr("dynrl.training.pretrain", lambda *a, out, **k: work("pretrain", out))
    monkeypatch.setattr("dynrl.train", lambda *a, out, **k: work("train", out))
    monkeypatch.setattr("dynrl.training.resume", lambda run, **k: work("resume", run))
    monkeypatch.setattr(
        "dynrl.evaluate", lambda *a, out, **k: work("evaluate", out) and {"dense": {"batch_size": 1}, "points": []}
    )
    monkeypatch.setattr(demo, "rows", lambda report: [])
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(out)])
    assert left.value.code == 130
    assert capsys.readouterr().err.endswith(f"to go on, give the same command with --out '{out}'\n")
    stopping.clear(), did.clear()
    main(["demo", "--out", str(out)])
    assert did == ["pretrain", "train" if stage == "pretrain" else "resume", "evaluate"]


def test_it_does_not_begin_in_what_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path)])
    assert "holds no demo to go on with; choose another --out" in capsys.readouterr().err


def test_five_rows():
    def point(policy, budget, accuracy):
        return {"policy": policy, "budget": budget, "accuracy": accuracy}

    points = [
        point("learned", 0.5, 0.9), point("random", 0.5, 0.3), point("random", 0.8, 0.9),
        point("threshold margin", 0.5, 0.8), point("threshold entropy", 0.5, 0.7), point("static", 0.5, 0.97),
        point("smaller", 0.5, 0.6), point("plain 3 MMACs", None, 0.6),
    ]  # fmt: skip
    report = {"dense": {"accuracy": 0.95, "latency_ms": 3.0}, "points": points}
    found = [(name.split()[0], row["accuracy"]) for name, row in demo.rows(report)]
    assert found == [("dense", 0.95), ("learned,", 0.9), ("best", 0.8), ("plain", 0.6), ("random", 0.3)]


def test_the_plain_network_fits_the_budget():
    row = defaults(demo.DECISION, demo.DATA)
    data = load_dataset(demo.DATA)
    whole, half = (r.build(data, 0).dense_macs for r in (row, row.changed(demo.HALF)))
    assert 0.45 < half / whole <= demo.BUDGET
