"""Several processes that sample, some of which die: `make test-scale`, outside the ordinary run (a minute or two)."""

from __future__ import annotations

import pytest
import ray
import torch

from dynrl.agents.training import Settings, Stop, open_agent
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.evaluation import score, score_routes
from dynrl.routed import RoutedModel

STEPS = 24_000


def kill(runner):
    """End an actor's process as the kernel would: it cannot say goodbye."""
    ray.kill(runner, no_restart=False)


@pytest.mark.parametrize("agent", ["ppo", "appo", "dqn"])
def test_a_runner_killed_in_training_does_not_stop_it(agent, small_backbone, tmp_path):
    settings = Settings(
        "skip", "digits", steps=STEPS, agent=agent, num_envs=16, num_env_runners=2, price_range=(20.0, 20.0),
        accuracy_term="log_likelihood",
    )  # fmt: skip
    with open_agent(settings, small_backbone, tmp_path, STEPS) as trained:
        trained.learn(STEPS // 4, Stop())
        group = trained._algorithm.env_runner_group
        before, kept = trained.steps, trained.router().state_dict()
        kill(group._worker_manager.actors()[1])
        trained.learn(STEPS // 2, Stop())
        assert trained.steps > before
        # Both dead at once.
        for runner in group._worker_manager.actors().values():
            kill(runner)
        trained.learn(STEPS, Stop())
        router, healthy = trained.router(), group.num_healthy_remote_workers()
    assert healthy == 2, "those that died are there again"
    assert any(not torch.equal(value, kept[name]) for name, value in router.state_dict().items())
    backbone, _ = load_backbone(small_backbone)
    model, test = RoutedModel(backbone, router), load_dataset("digits").test
    nothing = score_routes(model.backbone, torch.zeros(len(test), backbone.max_steps, dtype=torch.int64), test)
    assert score(model, test).macs_fraction == pytest.approx(float(nothing.macs.mean()), abs=0.05)
