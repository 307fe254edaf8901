"""The architecture, read off the sources: which way imports run, what stays light, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "dynrl": "dynrl",
    "envs": "dynrl.envs",
    "policies": "dynrl.policies",
    "agents": "dynrl.agents",
    "scripts": "dynrl.scripts",
}

# What a module may import of this package, by the longest prefix of its name. Names as strings are free.
ALLOWED = {
    "dynrl": {"dynrl._version", "dynrl.envs", "dynrl.deploy", "dynrl.plugins"},
    "dynrl.plugins": set(),
    "dynrl.ops": {"dynrl.ops"},
    "dynrl.files": set(),
    "dynrl.tasks": set(),
    "dynrl.cost": set(),
    "dynrl.machine": set(),
    "dynrl.progress": set(),
    "dynrl.routes": set(),
    "dynrl._version": set(),
    "dynrl.data": {"dynrl.data", "dynrl.files", "dynrl.tasks"},
    "dynrl.backbones": {"dynrl.backbones", "dynrl.ops", "dynrl.cost", "dynrl.files", "dynrl.routes"},
    "dynrl.policies": {"dynrl.policies", "dynrl.files", "dynrl.routes"},
    "dynrl.observation": {"dynrl.backbones"},
    "dynrl.choice": {"dynrl.backbones", "dynrl.observation", "dynrl.ops", "dynrl.policies"},
    "dynrl.settings": {"dynrl.files"},
    "dynrl.runs": {"dynrl.backbones", "dynrl.deploy", "dynrl.files", "dynrl.policies"},
    "dynrl.envs": {"dynrl.envs", "dynrl.backbones", "dynrl.observation", "dynrl.data", "dynrl.routes", "dynrl.tasks"},
    "dynrl.deploy": {
        "dynrl.deploy", "dynrl.backbones", "dynrl.policies", "dynrl.observation", "dynrl.choice", "dynrl.ops", "dynrl.cost",
        "dynrl.files", "dynrl.machine",
    },
    "dynrl.comparison": {
        "dynrl.backbones", "dynrl.policies", "dynrl.deploy", "dynrl.data", "dynrl.evaluation", "dynrl.heuristics",
        "dynrl.tasks",
    },
    "dynrl.evaluation": {"dynrl.backbones", "dynrl.policies", "dynrl.deploy", "dynrl.data", "dynrl.ops", "dynrl.routes", "dynrl.tasks"},
    "dynrl.heuristics": {"dynrl.backbones", "dynrl.policies", "dynrl.observation", "dynrl.data"},
    "dynrl.pretraining": {"dynrl.backbones", "dynrl.policies", "dynrl.data", "dynrl.files", "dynrl.progress"},
    "dynrl.finetuning": {
        "dynrl.backbones", "dynrl.policies", "dynrl.choice", "dynrl.data", "dynrl.files", "dynrl.routes",
        "dynrl.pretraining",
    },
    "dynrl.recipes": {"dynrl.backbones", "dynrl.data", "dynrl.pretraining", "dynrl.finetuning", "dynrl.settings"},
    "dynrl.agents": {
        "dynrl.agents", "dynrl.envs", "dynrl.policies", "dynrl.backbones", "dynrl.observation", "dynrl.choice",
        "dynrl.progress", "dynrl.tasks", "dynrl.data", "dynrl.files", "dynrl.routes", "dynrl.finetuning",
        "dynrl.plugins", "dynrl.settings",
    },
    "dynrl.training": {
        "dynrl.agents", "dynrl.backbones", "dynrl.data", "dynrl.deploy", "dynrl.envs", "dynrl.evaluation", "dynrl.files",
        "dynrl.machine", "dynrl.policies", "dynrl.pretraining", "dynrl.progress", "dynrl.recipes", "dynrl.runs",
        "dynrl.settings",
    },
    "dynrl.scripts": {"dynrl"},
}  # fmt: skip


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


MODULES = dict(modules())


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def under(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    rule = max((prefix for prefix in ALLOWED if under(name, prefix)), key=len)
    assert rule != "dynrl" or name == "dynrl", f"{name} needs a row in ALLOWED"
    own = {i for i in imports(MODULES[name]) if under(i, "dynrl")}
    bad = {i for i in own if not any(under(i, allowed) for allowed in ALLOWED[rule])}
    assert not bad


@pytest.mark.parametrize("name", [n for n in MODULES if under(n, "dynrl.policies") or under(n, "dynrl.backbones")])
def test_policies_and_backbones_know_torch_only(name):
    foreign = {i.split(".")[0] for i in imports(MODULES[name])} - set(sys.stdlib_module_names) - {"dynrl", "torch"}
    assert not foreign


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpickles_what_a_user_hands_over(name):
    source = MODULES[name].read_text()
    assert "pickle" not in source.replace("never unpickle", "")
    if "torch.load" in source:
        assert source.count("torch.load(") == source.count("weights_only=True")


def test_import_is_light():
    code = "import sys, dynrl; print(*(m for m in ('ray', 'sklearn', 'tensorboard', 'scipy', 'pandas', 'envs') if m in sys.modules))"
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert seen.stdout.split() == []
