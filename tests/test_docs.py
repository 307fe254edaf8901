"""The README and the pages: their links lead somewhere, their code runs, their commands are commands."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import dynrl
from dynrl.plugins import VARIABLE
from dynrl.scripts import cli
from dynrl.settings import Learning, Place, Problem, names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(page.name, *found) for page in PAGES for found in BLOCK.findall(page.read_text())]
PYTHON = [
    pytest.param(mark, code, id=f"{page}-{i}") for i, (page, kind, mark, code) in enumerate(BLOCKS) if kind == "python"
]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
PLUGINS = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", EXTENDING, re.DOTALL))  # what a page names, above it
COMMANDS = [
    pytest.param(line, id=f"{page}:{line[:60]}")
    for page, kind, _, code in BLOCKS if kind == "sh"
    for line in code.splitlines() if line.startswith("dynrl ")
]  # fmt: skip


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = BLOCK.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), (
            f"{page.name}: {target}; its headings are {sorted(anchors(there))}"
        )


def test_pages_are_of_a_size_to_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert (ROOT / "docs" / "pictures" / "idea.png").stat().st_size < 100_000


@pytest.mark.parametrize(("mark", "code"), PYTHON)
def test_python_blocks_compile(mark, code):
    ast.parse(code)
    assert mark in ("", "run")


CALL = re.compile(r"`(dynrl\.\w+\([^`]*\))`")  # as a sentence names it
CALLS = [
    pytest.param(node, id=f"{page}:{ast.unparse(node)[:60]}")
    for page, code in [
        *((page, code) for page, kind, _, code in BLOCKS if kind == "python"),
        *((path.name, path.read_text()) for path in EXAMPLES),
        *((page.name, code) for page in PAGES for code in CALL.findall(BLOCK.sub("", page.read_text()))),
    ]
    for node in ast.walk(ast.parse(code))
    if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("dynrl.") in dynrl.__all__
]  # fmt: skip


@pytest.mark.parametrize("node", CALLS)
def test_calls_have_the_arguments_that_they_are_written_with(node):
    function = getattr(dynrl, ast.unparse(node.func).removeprefix("dynrl."))
    given = [each.arg for each in node.keywords]
    inspect.signature(function).bind(*node.args, **dict.fromkeys(given))
    assert set(given) <= {*inspect.signature(function).parameters, *names(Problem, Learning, Place)}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    """By the verb's own parser, which stops before anything is run."""

    class Parsed(Exception):
        pass

    def parse(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    real = tyro.cli
    monkeypatch.setattr(tyro, "cli", parse)
    with pytest.raises(Parsed):
        cli.main(shlex.split(line, comments=True)[1:])


def run(folder: Path, *words: str, **more: str) -> str:
    """Run python in `folder`, on one core, and return what it prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1", VARIABLE: ""} | more
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_blocks_that_say_so_run(tmp_path):
    """One after the other in one process, each in names of its own."""
    blocks = [(page, code) for page, _, mark, code in BLOCKS if mark == "run"]
    assert {page for page, _ in blocks} >= {"README.md", "models.md", "decisions.md", "python.md"}
    for i, (_, code) in enumerate(blocks):
        (tmp_path / f"block_{i}.py").write_text(code)
    run(tmp_path, "-c", "\n".join(f"import block_{i}" for i in range(len(blocks))))


@pytest.mark.usefixtures("ray_local", "registries")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    """In this process, since a start takes as long as an example; each leaves a run that any program may load."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert len(path.read_text().splitlines()) < 40
    assert (tmp_path / "runs" / path.stem.replace("_", "-") / "policy.safetensors").is_file()


CHECKS = """
import torch
from dynrl.agents.base import agent_class
from dynrl.backbones import SkipResNet
from dynrl.data import load_dataset
from dynrl.envs import DECISIONS
from dynrl.envs.rewards import REWARDS, check_reward
from dynrl.evaluation import RULES
from dynrl.policies import PolicySpec
from dynrl.deploy import plug
from dynrl.training import train

assert "repeat" in DECISIONS and "first-blocks" in RULES
data = load_dataset("stripes")
assert data.input_shape == (1, 16, 16) and len(data.train.targets.unique()) == 4
backbone = SkipResNet(data.input_shape, data.classes, layers=(2, 2, 2), widths=(8, 16, 32)).eval()
policy = PolicySpec.of("per-point", backbone, (0.1, 1.0), 0).build()
model = plug(backbone, policy)
inputs = data.test.inputs[:8]
model(inputs)
assert (model.last_route.actions == 1).all()  # untrained, it favours the full route
rule = RULES["first-blocks"](backbone)["first blocks"](backbone, data.validation)
assert rule(0.01) is None
plug(backbone, rule(0.7))(inputs)
reward = check_reward("brier", data.task, False)
logits = torch.tensor([[50.0, 0, 0, 0]]).expand(2, 4)
earned, paid = reward.terms(data.task, logits, torch.arange(2), None, torch.ones(2), torch.full((2,), 0.5))
torch.testing.assert_close(torch.stack([earned, paid]), torch.tensor([[0.0, -2], [-0.5, -0.5]]))
assert agent_class("evolution").__name__ == "Evolution"
short = {"agent": "evolution", "steps": 2000, "num_envs": 16, "price_range": (0.1, 1.0)}
assert train(backbone, "stripes", out="run", pretrain=False, **short).finished
"""


def test_extensions_are_plugins_as_printed(tmp_path):
    assert set(PLUGINS) == {"repeat.py", "per_point.py", "evolution.py", "brier.py", "first_blocks.py", "stripes.py"}
    for name, code in PLUGINS.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "checks.py").write_text(CHECKS)
    plugins = [word for name in PLUGINS for word in ("--plugin", name)]
    listed = run(tmp_path, "-m", "dynrl.scripts.cli", *plugins, "list")
    assert "dynrl/Repeat-v0" in listed and "stripes" in listed
    run(tmp_path, "checks.py", **{VARIABLE: os.pathsep.join(str(tmp_path / name) for name in PLUGINS)})


def test_the_picture_is_drawn_from_a_report(tmp_path):
    run(tmp_path, str(ROOT / "docs/pictures/idea.py"), str(ROOT / "results/skip-fashion-mnist/report.json"), "idea.png")
    assert (tmp_path / "idea.png").read_bytes()[:4] == b"\x89PNG"
