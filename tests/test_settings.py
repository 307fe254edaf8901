"""Settings: saved as they are, and read back by their names and types."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from dynrl.deploy import SHIPPED, shipped
from dynrl.files import read_json, write_json
from dynrl.scripts.options import texts
from dynrl.settings import Learning, Place, Problem, Settings, names, parse

SETTINGS = Settings(
    Problem("skip", "digits", ("widths=[4,8]", "layers=[1,1]"), 7),
    Learning("gate", "upfront", 8, 100, 16, (0.1, 3.0), "log_likelihood", learning_rate=1e-3, finetune=True),
    Place("cuda", 1, 2, "auto"),
)


def test_what_is_saved_is_read_back(tmp_path):
    SETTINGS.save(tmp_path / "config.json")
    assert Settings.read(tmp_path / "config.json", SETTINGS.place) == SETTINGS
    assert Settings.read(tmp_path / "config.json") == replace(SETTINGS, place=Place())
    assert set(read_json(tmp_path / "config.json")) == {"problem", "learning"}  # where it ran is nobody's business


@pytest.mark.parametrize("name", shipped())
def test_the_settings_of_shipped_models_are_whole(name):
    settings = Settings.read(SHIPPED / name / "config.json")
    assert name == f"{settings.problem.decision}-{settings.problem.data}"


@pytest.mark.parametrize(
    ("group", "name", "value", "reason"),
    [
        ("learning", "nosuch", 1, r"learning\.nosuch: unknown setting; expected agent, policy, .*got .*'nosuch'"),
        ("problem", "seed", None, r"problem\.seed: expected int, got None"),
        ("problem", "seed", True, r"problem\.seed: expected int, got True"),
        ("learning", "steps", 1.5, r"learning\.steps: expected int, got 1\.5"),
        ("learning", "price_range", [1.0], r"learning\.price_range: expected tuple.*got \[1\.0\]"),
        ("learning", "price_range", ["a", 2.0], r"learning\.price_range: expected tuple"),
        ("learning", "cost", "money", r"learning\.cost: expected .*'macs', 'time'.*got 'money'"),
        ("learning", "entropy", "much", r"learning\.entropy: expected float \| None, got 'much'"),
        ("problem", "network", [3], r"problem\.network: expected tuple.*got \[3\]"),
        ("learning", "steps", 0, "expected steps of at least 1 and below 2.31, got 0"),
        ("learning", "hidden", -1, "expected hidden of at least 0"),
        ("learning", "num_envs", 0, "expected num_envs of at least 1"),
        ("problem", "seed", 2**31, "expected seed of at least 0 and below"),
        ("learning", "price_range", [1.0, 0.5], "0 < low <= high"),
        ("learning", "price_range", [0.0, 0.5], "0 < low <= high"),
        ("learning", "price_range", [0.1, float("nan")], "0 < low <= high"),
        ("learning", "learning_rate", 0, "learning_rate above 0 and below 1, got 0"),
        ("learning", "entropy", 2.0, "entropy of at least 0 and below 1, got 2"),
    ],
)  # fmt: skip
def test_what_is_not_so_is_named_with_its_place(group, name, value, reason, tmp_path):
    SETTINGS.save(path := tmp_path / "config.json")
    written = read_json(path)
    written[group][name] = value
    if value == value and not (isinstance(value, list) and value[-1] != value[-1]):  # NaN is not JSON
        write_json(path, written)
        with pytest.raises(ValueError, match=rf"config\.json: .*{reason}"):
            Settings.read(path)
    with pytest.raises(ValueError, match=reason):
        parse({"problem": Problem, "learning": Learning}[group], written[group], f"{group}.")


def test_what_is_missing_is_named(tmp_path):
    SETTINGS.save(path := tmp_path / "config.json")
    written = read_json(path)
    for broken, reason in (
        ({"problem": written["problem"]}, "learning: missing setting; expected problem, learning"),
        ({**written, "learning": []}, "learning: expected an object"),
        ({**written, "learning": {k: v for k, v in written["learning"].items() if k != "agent"}}, "learning.agent: missing"),
        (3, "expected an object with problem, learning, got 3"),
    ):  # fmt: skip
        write_json(path, broken)
        with pytest.raises(ValueError, match=f"config.json: {reason}"):
            Settings.read(path)


def test_every_setting_is_described():
    for kind in (Problem, Learning, Place):
        assert list(texts(kind)) == [each.name for each in fields(kind)]
        assert all(text.endswith(".") for text in texts(kind).values())
    assert len(set(names(Problem, Learning, Place))) == len(names(Problem, Learning, Place))  # commands lay them flat
