"""What users add in files of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynrl
from dynrl.agents.base import AGENTS, Agent, agent_class
from dynrl.agents.rllib import start_ray
from dynrl.backbones import END, State
from dynrl.data import DATASETS, load_dataset
from dynrl.files import load_tensors, read_json
from dynrl.plans import plan
from dynrl.plugins import VARIABLE, load_plugins
from dynrl.policies import POLICIES, LearnedPolicy, StepSight
from dynrl.runs import RunFolder
from dynrl.scripts.cli import main
from dynrl.training import make_run
from tests.toys import Exiting

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
QUICKLY = """
from dataclasses import replace
from dynrl.evaluation import report
from dynrl.recipes import DEFAULTS
report.ROUNDS = 1  # of timing
row = DEFAULTS["repeat", "digits"]
DEFAULTS["repeat", "digits"] = replace(
    row, backbone={"width": 8, "most": 3}, pretraining=replace(row.pretraining, epochs=2),
    learning=replace(row.learning, steps=2000),
)
"""
CHECKS = """
import gymnasium, torch, torch.nn.functional as F
import dynrl
from dynrl.backbones import load_backbone
model = dynrl.load("run")
images = torch.randn(9, *model.input_shape)
model(images)
backbone, _ = load_backbone("run/backbone.safetensors")
route = torch.randint(0, 2, (9, 3))
with torch.no_grad():
    walk = backbone.run_route(images, route)
    torch.testing.assert_close(backbone(images, F.one_hot(route, 2).float()), walk.outputs, atol=1e-5, rtol=1e-5)
env = gymnasium.make("dynrl/Repeat-v0")
env.reset(seed=0)
assert env.step(0)[2]
"""


@pytest.fixture
def clean(monkeypatch, tmp_path):
    load_dataset("digits")  # scikit-learn must not be imported into the copy of the modules alone
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return tmp_path


def test_a_plugin_is_imported_once_and_handed_on(clean):
    (clean / "mine_once.py").write_text(
        "from pathlib import Path\nwith open(__file__ + '.log', 'a') as f: f.write('x')"
    )
    for _ in range(2):
        load_plugins([str(clean / "mine_once.py"), "json.tool"])
    assert (clean / "mine_once.py.log").read_text() == "x"
    assert os.environ[VARIABLE].split(os.pathsep) == [str(clean / "mine_once.py"), "json.tool"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("no_such_file.py", None, "FileNotFoundError"),
        ("no_such_module", None, "ModuleNotFoundError"),
        ("broken.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("leaving.py", "raise SystemExit('bye')", "SystemExit: bye"),
        ("long.py", "raise ValueError('one\\ntwo')", "ValueError: one two"),
        (
            "antigravity.py",
            "x = 1",
            "ImportError: it has the name of a module that is there",
        ),  # one that nobody imports
    ],
)
def test_a_bad_plugin_is_named(name, content, reason, clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    if content:
        (clean / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["--plugin", name, "list"])
    assert stopped.value.code == 2
    assert f"the plugin {name} cannot be imported: {reason}" in capsys.readouterr().err
    assert not os.environ[VARIABLE]


def test_a_run_finds_its_plugin_again_if_it_was_given_here_before(clean, monkeypatch):
    """Other plugins are named and not imported: a folder may come from anywhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(clean / "state"))
    plugin, run = clean / "mine_again.py", clean / "run"
    plugin.write_text(
        "from dynrl.data import DATASETS, load_dataset\nDATASETS['mine-again'] = lambda: load_dataset('digits')"
    )
    with pytest.raises(ValueError, match=r"unknown data set 'mine-again'.*dynrl --plugin FILE.py"):
        plan("skip", "mine-again")
    load_plugins([str(plugin)])
    make_run(plan("skip", "mine-again"), run)
    assert read_json(run / "plugins.json") == [str(plugin)]
    del sys.modules["mine_again"], DATASETS["mine-again"]
    assert "mine-again" not in DATASETS
    RunFolder(run)
    assert DATASETS.pop("mine-again") and sys.modules.pop("mine_again")
    (clean / "state" / "dynrl" / "plugins").unlink()
    with pytest.warns(
        UserWarning, match=rf"made with the plugin {plugin}, which was not given.*dynrl --plugin {plugin}"
    ):
        RunFolder(run)
    assert "mine-again" not in DATASETS
    load_plugins([str(plugin)])
    plugin.unlink()
    del sys.modules["mine_again"], DATASETS["mine-again"]
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        RunFolder(run)
    (run / "plugins.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of plugins"):
        RunFolder(run)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["nosuch"], "decision"), (["skip", "--data", "nosuch"], "data set"), (["skip", "--agent", "nosuch"], "agent"),
        (["skip", "--policy", "nosuch"], "kind of policy"), (["skip", "--reward", "nosuch"], "reward"),
        (["skip", "--network", "family=nosuch"], "family"),
    ],
)  # fmt: skip
def test_what_is_unknown_may_come_by_a_plugin(words, what, clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    with pytest.raises(SystemExit):
        main(["train", *words])
    said = capsys.readouterr().err
    assert f"unknown {what} 'nosuch'; expected one of" in said and "dynrl --plugin FILE.py VERB" in said


def test_a_plugin_of_another_modules_name_is_refused(clean):
    (clean / "json.py").write_text("")
    with pytest.raises(ValueError, match=r"has the name of a module that is there.*rename the file"):
        load_plugins([str(clean / "json.py")])


def test_a_plugin_may_ask_for_all_of_dynrl(tmp_path):
    """Workers read it while dynrl itself is being imported."""
    (tmp_path / "asking.py").write_text("from dynrl import RoutedModel, __version__, load, plug\nprint(plug.__name__)")
    for words in (["-c", "import dynrl"], ["-m", "dynrl.scripts.cli", "--plugin", "asking.py", "list"]):
        inherited = {} if "--plugin" in words else {VARIABLE: str(tmp_path / "asking.py")}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | inherited, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("plug\n")


@pytest.mark.usefixtures("no_ray")
def test_workers_of_a_cluster_are_told_of_plugins(clean, monkeypatch):
    """They are started by the cluster, not by the command, and inherit nothing from it."""
    given = []
    monkeypatch.setattr("ray.init", lambda address, **more: given.append(more.get("runtime_env")))
    start_ray(0, "auto")
    (clean / "told.py").write_text("")
    load_plugins([str(clean / "told.py")])
    start_ray(0, "auto")
    assert given == [None, {"env_vars": {VARIABLE: str(clean / "told.py")}}]


@pytest.fixture
def run(tmp_path):
    """Run Python in a folder of its own; what it prints."""

    def run(*words, **more):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | more, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def printed(name, most):
    """The file of that name as the page prints it, of fewer lines than `most`."""
    (code,) = re.findall(rf"`{name}`:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < most
    return code


def test_a_decision_works_as_printed(tmp_path, run):
    """Trained, evaluated and plugged; found by other processes through the environment."""
    (tmp_path / "repeat.py").write_text(printed("repeat.py", 80))
    (tmp_path / "quickly.py").write_text(QUICKLY)
    (tmp_path / "checks.py").write_text(CHECKS)
    plugins = ["-m", "dynrl.scripts.cli", "--plugin", "repeat.py", "--plugin", "quickly.py"]
    assert "learned" in run(*plugins, "train", "repeat", "--out", "run")
    run("checks.py", **{VARIABLE: str(tmp_path / "repeat.py")})


@pytest.fixture
def train(registries, small_backbone, tmp_path, monkeypatch):
    """Write plugins as the page prints them, and train by them in this process, which forgets them afterwards.

    On a backbone that is given, at a high price.
    """
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    shutil.copyfile(small_backbone, tmp_path / "given" / "backbone.safetensors")

    def train(most, *words):
        for name, lines in most.items():
            (tmp_path / f"{name}.py").write_text(printed(f"{name}.py", lines))
            given.extend(["--plugin", f"{name}.py"])
            imported.append(name)
        main([*given, "train", "skip", *words, "--threads", "1"])

    given, imported = [], []
    yield train
    for name in imported:
        sys.modules.pop(name, None)


AT_A_HIGH_PRICE = ("--backbone", "given", "--out", "run", "--price-range", "20", "20")


def test_an_agent_and_a_reward_work_as_printed(train, tmp_path, capsys):
    """Trained, reported, plugged, and gone on with; it obeys a high price."""
    words = (*AT_A_HIGH_PRICE, "--agent", "evolution", "--reward", "brier", "--steps", "12000", "--no-evaluate")
    train({"evolution": 55, "brier": 12}, *words)
    model = dynrl.load(tmp_path / "run")
    model(torch.randn(3, *model.input_shape))
    assert model.curve[0][1] < 0.5
    saved = load_tensors(tmp_path / "run" / "checkpoints" / "evolution.safetensors", "checkpoint")[1]
    capsys.readouterr()
    train({}, "--resume", "run")
    shown = capsys.readouterr().out
    assert "evolution" in shown and "macs_fraction" not in shown
    again = load_tensors(tmp_path / "run" / "checkpoints" / "evolution.safetensors", "checkpoint")[1]
    assert again["done"] == saved["done"] >= 12_000


@pytest.mark.usefixtures("ray_local")
def test_a_policy_works_as_printed(train, tmp_path, run, monkeypatch, capsys):
    """Trained, reported and plugged; it obeys a high price, and its file is nothing without its plugin."""
    train({"per_point": 30}, *AT_A_HIGH_PRICE, "--policy", "per-point", "--steps", "8000")
    assert "learned" in capsys.readouterr().out
    checks = "import dynrl, torch; m = dynrl.load('run'); m(torch.randn(3, *m.input_shape))\n"
    checks += "assert type(m.policy).__name__ == 'PerPoint' and m.curve[0][1] < 0.5, m.curve"
    run("-c", checks, **{VARIABLE: str(tmp_path / "per_point.py")})
    del POLICIES["per-point"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # where no plugin was given before
    with pytest.warns(UserWarning, match="was not given on this machine"), pytest.raises(ValueError, match="per-point"):
        dynrl.load(tmp_path / "run")


def test_without_its_plugin_an_agent_is_unknown(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "skip", "--agent", "evolution", "--out", str(tmp_path / "run")])
    assert "unknown agent 'evolution'; expected one of appo" in capsys.readouterr().err and not list(tmp_path.iterdir())


PAIRS = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2


class Mine(Exiting):
    """A backbone of a user's own, right in all that it states: `stated` changes it."""

    family, decision = "mine", "exit"
    stated = {}

    def _pose(self, points, **facts):
        self.config = {"classes": 2}
        super()._pose(points, **facts | self.stated)

    def ideal(self, inputs, route):
        return lambda: self.stages[0](inputs)


def planned(backbone, **given):
    return plan(backbone, PAIRS, **given)


@pytest.mark.usefixtures("registries")
def test_a_backbone_of_ones_own_is_walked_before_it_is_trained():
    state = torch.get_rng_state()
    backbone = Mine()
    torch.set_rng_state(state)
    planned(backbone)
    assert torch.equal(torch.get_rng_state(), state), "what is tried out must not change what is drawn afterwards"


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"costs": [[24, -2], [24, 0]]}, "in the costs of 'exit1' of at least -1.*got -2"),
        ({"costs": [[24, 0], [24.5, 0]]}, "in the costs of 'exit2' as a whole number, got 24.5"),
        ({"costs": [[24, 0], [24, float("nan")]]}, "in the costs of 'exit2' as a whole number, got nan"),
        ({"start_macs": -1}, "in start_macs and charged_macs of at least 0, got -1"),
        ({"costs": [[24, 0, 5], [24, 0]]}, r"costs: expected a row for each point.*\[2, 2\], got rows of \[3, 2\]"),
        ({"costs": [[24, 0]]}, r"costs: expected a row for each point"),
        ({"thrift": [[1, 0]]}, r"thrift: expected a row for each point"),
        ({"full_route": (0,)}, r"full_route: expected a choice for each column"),
        ({"full_route": (0, 2)}, r"full_route: expected a choice for each column"),
        ({"costs": [[24, 0], [-1, 0]]}, r"full_route: expected choices that there are"),
        ({"max_steps": 3}, "max_steps: expected 1 to 2"),
    ],
)  # fmt: skip
def test_what_a_backbone_states_is_checked(stated, said, monkeypatch):
    monkeypatch.setattr(Mine, "stated", stated)
    with pytest.raises(ValueError, match=said):
        Mine()


def _wide(self, state):
    return state.features.repeat(1, 2)


def _mixed(self, state):
    return state.features - state.features.mean(0)


def _forgetful(self, state, action):
    return [part for part in Exiting._run(self, state, action) if part.point != END]


def _silent(self, walk, k, rows, x):
    return State(walk, k if k < 2 else END, rows, torch.tanh(self.stages[k](x)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stated": {"costs": [[4, 0], [4, 0]]}}, r"charges 32 MACs and computes 72 .*state in `costs`"),
        ({"stated": {"start_macs": 0}}, r"charges 48 MACs and computes 72 .*and `start_macs`"),
        ({"observe": _wide}, r"observe at the point 'exit1' at most 4 numbers a row .*got \[3, 8\]"),
        ({"observe": lambda self, state: state.features.double()}, "of torch.float32, got .*float64"),
        ({"observe": lambda self, state: state.features / 0}, "expected finite numbers"),
        ({"observe": _mixed}, "to depend on that row only"),
        ({"_run": _forgetful}, r"each row in one state until it has ended"),
        ({"_arrive": _silent}, r"an output \[2\] of each row .*got none"),
        ({"ideal": dynrl.backbones.Backbone.ideal}, "has no ideal; write it"),
        ({"ideal": lambda self, inputs, route: None}, "ideal to return a function"),
        ({"family": "unsaid", "config": property(lambda self: {}, lambda self, given: None)}, "how many outputs it has"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("registries")
def test_a_backbone_is_held_to_what_it_states(changes, said, monkeypatch):
    """Else nothing fails, and observations and all shares of compute are wrong; or it fails when all is trained."""
    for name, value in changes.items():
        monkeypatch.setattr(Mine, name, value, raising=False)
    with pytest.raises(ValueError, match=said):
        planned(Mine())


@pytest.mark.usefixtures("registries")
def test_a_bill_above_what_is_seen_is_doubted_only(monkeypatch):
    """A network of one's own may look up what another computed."""
    monkeypatch.setattr(Mine, "stated", {"costs": [[1000, 0], [1000, 0]]})
    with pytest.warns(UserWarning, match="charges 2,024 MACs and computes 72 for a row, as far as"):
        planned(Mine())


@pytest.mark.usefixtures("registries")
def test_weights_made_for_a_whole_batch_are_in_no_rows_bill(monkeypatch):
    class Factored(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight @ torch.eye(4), self.bias)

    backbone = Mine()
    backbone.stages[1] = Factored(4, 4)
    planned(backbone)


class Scored(LearnedPolicy):
    """A policy of a user's own, right in all."""

    sight_class = StepSight

    def __init__(self, sight, price_range, hidden=0, start=None):
        super().__init__(sight, price_range, hidden, start or [0])
        self.head = torch.nn.Linear(sight.price + 1, sight.choices)

    def _scores(self, observation):
        return self.head(self.trunk(observation))


class Normed(Scored):
    """It learns, but cannot be plugged."""

    def __init__(self, sight, price_range, hidden=0, start=None):
        super().__init__(sight, price_range, hidden, start)
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(sight.price + 1), self.head)


class Exact(Scored):
    """It learns, but cannot be loaded."""

    def __init__(self, sight, price_range, hidden=0, start=None):
        super().__init__(sight, price_range, hidden, start)
        self.head.double()

    def _scores(self, observation):
        return self.head(self.trunk(observation).double()).float()


def scored(function):
    return type("Odd", (Scored,), {"_scores": function})


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Normed, "compute of Normed cannot be counted: no MAC formula for BatchNorm1d"),
        (Exact, "weights of torch.float32, got torch.float64 in Exact"),
        (scored(lambda self, seen: self.head(self.trunk(seen))[:, :1]), r"finite scores \[6, 2\] .*got \[6, 1\]"),
        (scored(lambda self, seen: self.head(self.trunk(seen)).repeat(1, 2)), r"scores \[6, 2\] .*got \[6, 4\]"),
        (scored(lambda self, seen: self.head(self.trunk(seen)) * torch.nan), "got .*, with NaN or infinity"),
        (scored(lambda self, seen: self.head(self.trunk(seen)).int()), "of torch.float32 .*got .*int32"),
        (scored(LearnedPolicy._scores), "Odd has no `_scores`"),
        (type("Blind", (Scored,), {"sight_class": None}), "Blind: expected a `sight_class`, StepSight or RouteSight"),
        (torch.nn.Linear, "expected a class of LearnedPolicy"),
        (3, "expected a class of LearnedPolicy, got 3"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("registries")
def test_a_policy_is_tried_before_anything_is_trained(policy, said):
    POLICIES["odd"] = policy
    with pytest.raises(ValueError, match=said):
        planned(Mine(), policy="odd")


@pytest.mark.usefixtures("registries")
def test_a_policy_of_ones_own_is_let_through():
    POLICIES["mine"] = Scored
    assert planned(Mine(), policy="mine").settings.learning.policy == "mine"


def test_one_score_does_not_stand_for_all_choices():
    policy = scored(lambda self, seen: seen[:, :1])(StepSight(4, 2, 2), (0.1, 1.0))
    with pytest.raises(ValueError, match=r"a score for each choice of each decision, \[n, 2\], got \[5, 1\]"):
        policy(torch.ones(5, policy.sight.width))


class Lazy(Agent):
    """It has no hooks."""


class Frozen(Lazy):
    """It has the hooks that every training needs."""

    start = iterate = router = save = lambda self: None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("tests.test_plugins", "expected 'module:Class'"),
        (Lazy, "expected 'module:Class'"),
        ("tests.test_plugins:Nope", "tests.test_plugins has no Nope"),
        ("no_such_module:Lazy", "there is no module 'no_such_module'"),
        ("tests.test_plugins:PAIRS", "expected a class of Agent"),
        ("tests.test_plugins:Scored", "expected a class of Agent"),
        ("tests.test_plugins:Lazy", "has no start, iterate, router, save"),
    ],
)
@pytest.mark.usefixtures("registries")
def test_a_row_for_an_agent_is_checked(row, said):
    AGENTS["odd"] = row
    with pytest.raises(ValueError, match=said):
        agent_class("odd")


def test_what_an_agents_hooks_must_do_is_said(tmp_path):
    given = plan("skip").settings, tmp_path / "backbone.safetensors", tmp_path, 10
    with pytest.raises(ValueError, match="Frozen.start to set `steps`"), Frozen(*given):
        pass
    agent = Frozen(*given)
    agent.steps = 0
    with pytest.raises(ValueError, match=r"Frozen.iterate to return numbers .* a dict, got a NoneType"), agent:
        agent.learn(10)


@pytest.mark.usefixtures("registries")
def test_what_fine_tuning_needs_of_an_agent_is_asked_before():
    AGENTS["frozen"] = "tests.test_plugins:Frozen"
    planned(Mine(), agent="frozen")
    with pytest.raises(ValueError, match="Frozen has no `reload`, which fine-tuning needs"):
        planned(Mine(), agent="frozen", finetune=True)
