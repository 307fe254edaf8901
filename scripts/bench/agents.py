"""`dynrl bench agents` measures how soon agents learn a whole front.

Each agent learns from the same number of decisions, on one pretrained backbone, by the same settings. Now and then, a
checkpoint is written and a copy of the policy is kept. The copies are judged afterwards on validation data, outside the
measured time, by how much their routes beat random ones of the same MACs, on average over budgets.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from torch import Tensor

from dynrl.agents.base import Agent
from dynrl.agents.ppo import PPO
from dynrl.agents.sb3 import SB3PPO
from dynrl.backbones import Backbone, load_backbone
from dynrl.data import Split, load_dataset
from dynrl.deploy import RoutedModel
from dynrl.envs.rewards import distillation
from dynrl.evaluation import BUDGETS, calibrate
from dynrl.plans import plan
from dynrl.policies import LearnedPolicy, RandomPolicy
from dynrl.recipes import defaults
from dynrl.runs import RunFolder
from dynrl.settings import Problem, Settings
from dynrl.training import pretrain_into

RATES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)  # the rates of the random routes
DATA = "fashion-mnist"
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
ENOUGH = 0.95
PRICES = (0.002, 2.0)


class StockPPO(PPO):
    """This agent has our algorithm, module, settings and environment, with RLlib's own runner and connectors."""

    def configure(self, *args: Any, **place: Any) -> Any:
        """Configure PPO without our runner."""
        config: Any = super().configure(*args, **place)
        config.env_config = {**config.env_config, "autoreset_mode": AutoresetMode.NEXT_STEP.value}
        config.env_runners(env_runner_cls=SingleAgentEnvRunner)
        return config.training(learner_connector=None, add_default_connectors_to_learner_pipeline=True)


CONTENDERS: dict[str, type[Agent]] = {"ours": PPO, "sb3": SB3PPO, "rllib-stock": StockPPO}


class Judge:
    """A judge says by how much a policy's routes beat random ones of the same MACs, on average over `BUDGETS`."""

    def __init__(self, backbone: Backbone, split: Split) -> None:
        self._frozen, self._split = backbone.for_inference(), split
        self._dense = torch.cat([self._frozen(inputs).float() for inputs in split.inputs.split(256)])
        known = [self._worth(self._random_walk(RandomPolicy(self._frozen.thrift, rate))) for rate in RATES]
        self._random = torch.tensor(known).t()  # rows: MACs, accuracy term, metric

    def _random_walk(self, policy: RandomPolicy) -> Callable[[Tensor], Any]:
        return lambda inputs: self._frozen.run_route(inputs, policy.route(inputs))

    @torch.inference_mode()
    def _worth(self, walk: Callable[[Tensor], Any]) -> tuple[float, float, float]:
        """Return means over the split: the share of the dense MACs, the accuracy term, and the metric."""
        task, sums = self._split.task, torch.zeros(3, dtype=torch.float64)
        columns = (self._split.inputs, self._split.targets, self._dense)
        for inputs, targets, dense in zip(*(column.split(256) for column in columns), strict=True):
            walked = walk(inputs)
            outputs = walked.outputs.float()
            terms = (walked.macs / self._frozen.dense_macs, distillation(task, outputs, targets, dense.clone))
            sums += torch.stack([term.double().sum() for term in (*terms, task.score(outputs, targets))])
        macs, term, metric = (sums / len(self._dense)).tolist()
        return macs, term, metric

    def gap(self, policy: LearnedPolicy) -> tuple[float, float]:
        """Return the gap in the accuracy term and in the metric; a budget that the policy cannot reach counts as 0."""
        model = RoutedModel(self._frozen, policy)
        # A coarse curve is enough: policies are compared at the MACs that they spend, whatever the budget was.
        fractions = [macs for _, macs in calibrate(model, self._split.head(512), points=9, gap=0.1)]
        gaps = torch.zeros(2)
        for budget in BUDGETS:
            if budget >= min(fractions):
                model.set_budget(min(budget, max(fractions)))
                macs, *worth = self._worth(model.walk)
                gaps += torch.tensor(worth) - self._random_at(macs)
        term, metric = (gaps / len(BUDGETS)).tolist()
        return term, metric

    def _random_at(self, macs: float) -> Tensor:
        """Return accuracy term and metric [2] on the line between the two rates nearest to these MACs."""
        spent, worth = self._random[0], self._random[1:]
        i = int((spent[1:-1] < macs).sum())
        return worth[:, i] + (worth[:, i + 1] - worth[:, i]) * (macs - spent[i]) / (spent[i + 1] - spent[i])


def bench_agents(names: Iterable[str], seeds: int, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Measure `names` (default: all) on the backbone of the one run in `runs`, or on one pretrained for it."""
    names = tuple(names) or tuple(CONTENDERS)
    if unknown := set(names) - set(CONTENDERS):
        raise ValueError(f"unknown agents {sorted(unknown)}; expected some of {list(CONTENDERS)}")
    if len(runs) > 1:
        raise ValueError(f"expected one run folder of skip on {DATA}, got {len(runs)}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if not runs:
            pretrain_into(folder, plan("skip", DATA))
        return measure_agents(names, seeds, runs[0] if runs else folder, folder)


def measure_agents(names: Iterable[str], seeds: int, source: Path, folder: Path) -> list[dict[str, Any]]:
    """Return rows {"agent", "seed", "curve", "seconds", "steps", "seconds_to_enough", "steps_per_s", ...}.

    Args:
        names: names in `CONTENDERS`. Ours comes first, since `seconds_to_enough` refers to 95 % of its last gap.
        seeds: the number of policy seeds.
        source: a folder with a pretrained backbone for skip on fashion-mnist.
        folder: the folder for the files of agents.
    """
    learning, file = replace(defaults("skip", DATA).learning, price_range=PRICES), RunFolder(source).backbone_file
    judge, rows = Judge(load_backbone(file)[0], load_dataset(DATA).validation.head(2048)), []
    for seed in range(seeds):
        enough = None
        for name in sorted(names, key=list(CONTENDERS).index):
            settings, steps = Settings(Problem("skip", DATA, seed=seed), learning), learning.steps
            with CONTENDERS[name](settings, file, folder / f"{name}-{seed}", steps) as agent:
                agent.checkpoint_every = 10**9
                kept = learn(agent, steps)
            curve = [(seconds, steps, *judge.gap(policy)) for seconds, steps, policy in kept]
            enough = ENOUGH * curve[-1][2] if name == "ours" else enough
            reached = [seconds for seconds, _, gap, _ in curve if enough is not None and gap >= enough]
            seconds, steps, gap, metric = curve[-1]
            rows.append(
                {
                    "agent": name, "seed": seed, "seconds": seconds, "steps": steps, "steps_per_s": steps / seconds,
                    "gap": gap, "gap_in_metric": metric, "seconds_to_enough": reached[0] if reached else None,
                    "curve": curve,
                }
            )  # fmt: skip
            shown = f"{reached[0]:.0f} s" if reached else "not reached"
            print(
                f"{name} seed {seed}: {steps} decisions in {seconds:.0f} s; gap to random routes {gap:.4f} nats, "
                f"{100 * metric:.2f} points; {ENOUGH:.0%} of ours after {shown}", flush=True,
            )  # fmt: skip
    return rows


def learn(agent: Agent, steps: int) -> list[tuple[float, int, LearnedPolicy]]:
    """Learn for `steps` decisions, and return (seconds, decisions, policy) at each of `SHARES` of them."""
    seconds, kept = 0.0, []
    for share in SHARES:
        start = time.perf_counter()
        agent.learn(int(share * steps))
        seconds += time.perf_counter() - start
        kept.append((seconds, agent.steps, agent.router()))
    return kept
