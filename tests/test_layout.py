"""The architecture, read off the sources: which way imports run, what stays light, what is documented."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dynrl.envs import DECISIONS

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
    "dynrl": {
        "dynrl._version", "dynrl.envs", "dynrl.deploy", "dynrl.evaluation", "dynrl.plugins", "dynrl.training"
    },
    "dynrl.__main__": {"dynrl.scripts"},
    "dynrl.plugins": set(),
    "dynrl.inputs": set(),
    "dynrl.files": set(),
    "dynrl.schema": set(),
    "dynrl.tasks": set(),
    "dynrl.provenance": {"dynrl.inputs", "dynrl.vocabulary"},
    "dynrl.vocabulary": set(),
    "dynrl.cost": set(),
    "dynrl.machine": {"dynrl.schema"},
    "dynrl.progress": set(),
    "dynrl.routes": set(),
    "dynrl._version": set(),
    "dynrl.checkpoints": {"dynrl.files", "dynrl.schema"},
    "dynrl.settings": {"dynrl.files", "dynrl.schema"},
    "dynrl.ops": {"dynrl.ops"},
    "dynrl.data": {
        "dynrl.data", "dynrl.files", "dynrl.inputs", "dynrl.progress", "dynrl.provenance", "dynrl.schema",
        "dynrl.tasks", "dynrl.vocabulary",
    },
    "dynrl.backbones": {
        "dynrl.backbones", "dynrl.ops", "dynrl.cost", "dynrl.files", "dynrl.inputs", "dynrl.provenance", "dynrl.routes",
        "dynrl.schema", "dynrl.vocabulary",
    },
    "dynrl.policies": {"dynrl.policies", "dynrl.ops", "dynrl.files", "dynrl.routes", "dynrl.schema"},
    "dynrl.envs": {
        "dynrl.envs", "dynrl.backbones", "dynrl.policies", "dynrl.data", "dynrl.ops", "dynrl.routes", "dynrl.schema",
        "dynrl.tasks", "dynrl.files", "dynrl.machine",
    },
    "dynrl.deploy": {
        "dynrl.deploy", "dynrl.backbones", "dynrl.policies", "dynrl.ops", "dynrl.cost", "dynrl.files", "dynrl.inputs",
        "dynrl.machine", "dynrl.plugins", "dynrl.schema",
    },
    "dynrl.runs": {
        "dynrl.backbones", "dynrl.data", "dynrl.policies", "dynrl.deploy", "dynrl.files", "dynrl.plugins",
        "dynrl.provenance", "dynrl.schema", "dynrl.settings",
    },
    "dynrl.evaluation": {
        "dynrl.evaluation", "dynrl.runs", "dynrl.backbones", "dynrl.policies", "dynrl.deploy", "dynrl.data",
        "dynrl.ops", "dynrl.routes", "dynrl.tasks", "dynrl.files", "dynrl.inputs", "dynrl.machine", "dynrl.progress",
        "dynrl.perturb", "dynrl.schema",
    },
    "dynrl.pretraining": {
        "dynrl.backbones", "dynrl.checkpoints", "dynrl.data", "dynrl.inputs", "dynrl.machine", "dynrl.progress",
        "dynrl.schema", "dynrl.tasks",
    },
    "dynrl.perturb": {
        "dynrl.backbones", "dynrl.policies", "dynrl.data", "dynrl.ops", "dynrl.provenance", "dynrl.tasks",
    },
    "dynrl.finetuning": {
        "dynrl.backbones", "dynrl.checkpoints", "dynrl.policies", "dynrl.data", "dynrl.inputs", "dynrl.routes",
        "dynrl.pretraining", "dynrl.perturb",
    },
    "dynrl.recipes": {
        "dynrl.backbones", "dynrl.data", "dynrl.files", "dynrl.ops", "dynrl.pretraining", "dynrl.finetuning",
        "dynrl.schema", "dynrl.settings",
    },
    "dynrl.agents": {
        "dynrl.agents", "dynrl.envs", "dynrl.policies", "dynrl.backbones", "dynrl.inputs", "dynrl.progress", "dynrl.tasks",
        "dynrl.checkpoints", "dynrl.data", "dynrl.files", "dynrl.routes", "dynrl.finetuning", "dynrl.perturb", "dynrl.plugins",
        "dynrl.schema", "dynrl.settings",
    },
    "dynrl.plans": {
        "dynrl.agents", "dynrl.backbones", "dynrl.data", "dynrl.envs", "dynrl.files", "dynrl.machine",
        "dynrl.perturb", "dynrl.pretraining", "dynrl.recipes", "dynrl.runs", "dynrl.schema", "dynrl.settings",
        "dynrl.trial",
    },
    "dynrl.trial": {
        "dynrl.agents", "dynrl.backbones", "dynrl.cost", "dynrl.data", "dynrl.policies", "dynrl.routes", "dynrl.settings",
    },
    "dynrl.training": {
        "dynrl.agents", "dynrl.backbones", "dynrl.data", "dynrl.deploy", "dynrl.envs", "dynrl.evaluation",
        "dynrl.files", "dynrl.machine", "dynrl.plans", "dynrl.plugins", "dynrl.policies", "dynrl.pretraining",
        "dynrl.progress", "dynrl.runs", "dynrl.settings",
    },
    "dynrl.sweep": {
        "dynrl.agents", "dynrl.backbones", "dynrl.data", "dynrl.deploy", "dynrl.evaluation", "dynrl.files",
        "dynrl.plans", "dynrl.policies", "dynrl.runs", "dynrl.schema", "dynrl.settings",
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
        yield from imported(node)


def imported(node):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "import by full name"
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


def test_no_imports_run_in_a_circle():
    """At load time: what a function or a type checker imports closes no circle."""
    edges = {name: {i for i in loaded(path) if i in MODULES} for name, path in MODULES.items()}
    settled: set[str] = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in settled:
            for other in sorted(edges[name] - {name}):
                visit(other, [*way, name])
            settled.add(name)

    for name in edges:
        visit(name, [])


def loaded(path):
    """The modules that a file imports when it is loaded."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("name", [n for n in MODULES if not under(n, "dynrl.ops.kernels")])
def test_functions_fit_on_a_screen(name):
    long = []
    for node in functions(MODULES[name]):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > 60:
            long.append(f"{node.name}: {lines} lines")
    assert not long


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_verb_is_short(path):
    assert len(path.read_text().splitlines()) <= 100


def test_nobody_asks_which_policy_or_decision_it_is():
    """A policy says what it can by its sight and attributes, a family by class facts: no switch on types or names."""
    policies = {
        name for module in MODULES if under(module, "dynrl.policies") for name in vars(importlib.import_module(module))
        if name.endswith(("Policy", "Router", "Sight"))
    }  # fmt: skip
    asked = []
    for name, path in MODULES.items():
        own = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                types = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & policies - own
                asked += [f"{name}:{node.lineno} asks for {kind}" for kind in types]
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                asked += [f"{name}:{node.lineno} asks for {word!r}" for word in words & set(DECISIONS)]
    assert not asked


@pytest.mark.parametrize("name", [n for n in MODULES if under(n, "dynrl.policies") or under(n, "dynrl.backbones")])
def test_policies_and_backbones_know_torch_only(name):
    # What greenlets switch between, and the generator that a user's forward may draw from.
    more = {"dynrl.backbones.forward": {"greenlet"}, "dynrl.backbones.chance": {"numpy"}}
    known = {"dynrl", "torch"} | more.get(name, set())
    foreign = {i.split(".")[0] for i in imports(MODULES[name])} - set(sys.stdlib_module_names) - known
    assert not foreign


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpickles_what_a_user_hands_over(name):
    source = MODULES[name].read_text()
    assert "pickle" not in source.replace("never unpickle", "")
    assert "torch.load(" not in source and "torch.save(" not in source


def test_import_is_light():
    code = "import sys, dynrl; print(*(m for m in ('ray', 'sklearn', 'tensorboard', 'scipy', 'pandas', 'envs') if m in sys.modules))"
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert seen.stdout.split() == []
