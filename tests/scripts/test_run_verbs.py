"""`dynrl calibrate` and `dynrl export`, on one run."""

from __future__ import annotations

import shutil

import pytest
import torch

import dynrl
from dynrl.data import load_dataset
from dynrl.deploy import SHIPPED
from dynrl.files import read_json, write_json
from dynrl.policies import load_policy, save_policy
from dynrl.scripts.cli import main


def test_an_exported_run_is_the_plugged_one(run, tmp_path):
    main(["export", str(run), "--out", str(tmp_path / "model.pt2"), "--budget", "0.7"])
    model, inputs = dynrl.load(run), load_dataset("digits").test.inputs[:40]
    model.set_budget(0.7)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(exported(inputs), model(inputs), atol=1e-5, rtol=1e-5)


def test_a_price_that_changes_nothing_promises_no_range(tmp_path, monkeypatch, capsys):
    """Times are made up."""
    monkeypatch.setattr(
        "dynrl.evaluation.timing.medians_in_turn",
        lambda sides, *given, **how: dict(zip(sides, range(len(sides)), strict=True)),
    )
    folder = tmp_path / "run"
    shutil.copytree(SHIPPED / "skip-digits", folder)
    policy, known = load_policy(folder / "policy.safetensors")
    flat = [(price, 0.5) for price, _ in known["curve"]]
    for curve, said in (
        (known["curve"], "set_milliseconds("),
        (flat, "ms at every price, since the price changes nothing"),
    ):
        save_policy(folder / "policy.safetensors", policy, known | {"curve": curve})
        main(["calibrate", str(folder), "--batch-size", "16"])
        shown = capsys.readouterr().out
        assert said in shown and ("set_milliseconds(" in shown) == (curve is not flat)


def test_budgets_in_milliseconds(run, tmp_path, monkeypatch, capsys):
    """Times are made up: of two medians that contradict the prices, the larger one belongs to the lower price."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    others = ({"processor": "other"}, {"threads": 99}, {"torch": "1.0"})
    assert not dynrl.load(folder).latency
    with pytest.raises(ValueError, match="run: dynrl calibrate"):
        dynrl.load(folder).set_milliseconds(5)

    def medians(sides, rounds, tick, calls):
        for side in sides.values():
            side()
        times = [10.0 + 2 * i for i in range(len(sides))][::-1]
        times[0], times[1] = times[1], times[0]
        return dict(zip(sides, times, strict=True))

    monkeypatch.setattr("dynrl.evaluation.timing.medians_in_turn", medians)
    main(["calibrate", str(folder), "--batch-size", "16"])
    assert "model.set_milliseconds(" in capsys.readouterr().out
    model = dynrl.load(folder)
    prices, times = zip(*model.latency, strict=True)
    assert prices == tuple(price for price, _ in model.curve)
    assert times == tuple(10.0 + 2 * i for i in range(len(prices)))[::-1]
    model.set_milliseconds(11.0)
    assert prices[-2] < model.price < prices[-1]
    model.set_milliseconds(times[0])
    assert model.price == pytest.approx(prices[0])
    with pytest.raises(ValueError, match=r"reaches 10\.000 to .* milliseconds"):
        model.set_milliseconds(9.0)
    assert not model.to(torch.bfloat16).latency, "times of another type"
    kept = read_json(folder / "latency.json")
    for name, value in (("policy", "other"), *(("hardware", kept["hardware"] | other) for other in others)):
        write_json(folder / "latency.json", kept | {name: value})
        assert not dynrl.load(folder).latency, "times of another policy or machine"
        write_json(folder / "latency.json", kept)
    for wrong, reason in (
        ({}, "curve: missing setting"), ([], "expected an object with curve"), (kept | {"curve": [[1]]}, "curve: expected"),
    ):  # fmt: skip
        write_json(folder / "latency.json", wrong)
        with pytest.raises(ValueError, match=rf"latency\.json: {reason}"):
            dynrl.load(folder)
    write_json(folder / "latency.json", kept)
    with pytest.raises(SystemExit):
        main(["calibrate", str(folder), "--batch-size", "500"])
    assert "a batch of 500 is larger than the 180 validation inputs" in capsys.readouterr().err
