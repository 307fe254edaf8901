"""RLlib trains on a routing environment by the module and the agent here, which all its algorithms share.

RLlib's training steps, learners, checkpoints, evaluation and Tune stay its own; the runners are in
`dynrl.agents.slab`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads these variables once, when it is imported. They turn off telemetry, warnings about missing accelerators, and
# workers that are started ahead: most trainings ask for none.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchMultiCategorical
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, TargetNetworkAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from dynrl.agents.base import Agent, env_arguments
from dynrl.agents.numbers import value_network
from dynrl.agents.slab import SlabRunner
from dynrl.backbones import Backbone, load_backbone
from dynrl.envs import decision
from dynrl.files import ASIDE, read_json, write_json
from dynrl.plugins import VARIABLE
from dynrl.policies import LearnedPolicy, PolicySpec
from dynrl.settings import Settings

for _name in ("ray", "ray.rllib", "ray.tune"):  # each logger has a level of its own
    logging.getLogger(_name).setLevel(logging.ERROR)

KEEP_CHECKPOINTS = 2
DIGESTS = "digests.json"  # the file of a checkpoint that has the digests of the rest


class RouterModule(TorchRLModule, ValueFunctionAPI, InferenceOnlyAPI):
    """This module holds a policy, `net`, which is later deployed, and a value network.

    `model_config["spec"]` is the policy's `PolicySpec`.
    """

    def setup(self) -> None:
        """Build the policy and the value network."""
        if not isinstance(self.action_space, (Discrete, MultiDiscrete)):
            raise ValueError(f"RouterModule takes Discrete or MultiDiscrete actions, got {self.action_space}")
        settings: Any = self.model_config  # RLlib adds keys of its own beside "spec"
        spec: PolicySpec = settings["spec"]
        self.net = spec.build()
        self.action_dist_cls = TorchCategorical
        if isinstance(self.action_space, MultiDiscrete):
            several: Any = TorchMultiCategorical
            self.action_dist_cls = several.get_partial_dist_cls(
                input_lens=[self.net.sight.choices] * self.net.sight.decisions
            )
        self.value = value_network(self.net)

    def get_non_inference_attributes(self) -> list[str]:
        """Name what runners do not need: the value network."""
        return ["value"]

    def get_initial_state(self) -> dict[str, Any]:
        """Return an empty state, since policies are stateless."""
        return {}

    def logits(self, scores: Tensor) -> Tensor:
        """Return the logits [n, decisions * choices] by which choices are drawn, given the policy's scores."""
        logits: Tensor = self.net.capped(scores)
        return logits

    def explore(self, log_probs: Tensor, steps: int) -> Tensor:
        """Return a choice [rows] for each row of `log_probs` [rows, choices], after `steps` environment steps."""
        # The largest of log-probability plus Gumbel noise is a draw from the distribution.
        return (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.net(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Return the return [n] expected from each observation."""
        return self.value(self.net.trunk(batch[Columns.OBS])).squeeze(-1)


class FormerModule(RouterModule, TargetNetworkAPI):
    """This module also holds the former self of its policy."""

    def make_target_networks(self) -> None:
        """Copy the policy."""
        self._old = make_target_network(self.net)

    def get_non_inference_attributes(self) -> list[str]:
        """Name what runners do not need: the former policy, too."""
        return [*super().get_non_inference_attributes(), "_old"]

    def get_target_network_pairs(self) -> list[Any]:
        """Return the pair of networks whose second follows the first."""
        return [(self.net, self._old)]


def routing_config(
    config: Any,
    env_id: str,
    env_config: dict[str, Any],
    module: RLModuleSpec,
    runner: type[SlabRunner] = SlabRunner,
    *,
    seed: int = 0,
    num_envs: int = 64,
    rollout: int = 72,
    num_env_runners: int = 0,
    num_learners: int = 0,
    num_gpus_per_learner: float = 0,
    num_gpus_per_env_runner: float = 0,
) -> Any:
    """Set a routing environment, a module and a runner in an RLlib algorithm's `config`, and return it.

    Args:
        config: the configuration to change.
        env_id: the id of a registered dynrl environment; remote workers find it by `dynrl:` before the id.
        env_config: the environment's arguments, without `autoreset_mode`.
        module: the specification of the module to train.
        runner: the class that samples.
        seed: the seed of RLlib's draws.
        num_envs: the number of sub-environments of each runner.
        rollout: the steps of each sub-environment in a training iteration.
        num_env_runners, num_learners: the number of remote processes that sample and that learn; with 0, this process
            does.
        num_gpus_per_env_runner, num_gpus_per_learner: the GPUs that ray reserves for each process; fractions share one.
    """
    return (
        config.environment(
            f"dynrl:{env_id}", env_config={**env_config, "autoreset_mode": AutoresetMode.SAME_STEP.value}
        )
        .env_runners(
            env_runner_cls=runner,
            num_env_runners=num_env_runners,
            num_gpus_per_env_runner=num_gpus_per_env_runner,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=rollout,
            sample_timeout_s=600,
        )
        .learners(num_learners=num_learners, num_gpus_per_learner=num_gpus_per_learner)
        .rl_module(rl_module_spec=module)
        .debugging(seed=seed, log_level="ERROR")
    )


def start_ray(num_cpus: int, address: str | None = None) -> bool:
    """Start a quiet local ray, or join the cluster at `address`, and return True; return False if ray runs already.

    Raises:
        ValueError: there is no cluster at `address`, or ray could not start.
    """
    if ray.is_initialized():
        return False
    with own_sigterm():
        if address is not None:
            _check_reachable(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            plugins = os.environ.get(VARIABLE)  # the cluster's workers inherit no variables from this process
            told = {"env_vars": {VARIABLE: plugins}} if plugins else None
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=told)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                raise ValueError(f"expected a ray cluster at {address!r}, found none: {error}") from None
            return True
        # Without the word "local", ray would join whatever RAY_ADDRESS or an earlier cluster's file names.
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init("local", num_cpus=num_cpus, **quiet)
        except Exception as error:  # of no narrower type where its processes are too slow
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"ray could not start on this machine ({reason}); try again when it is less busy"
            ) from error
        return True


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which ray replaces when it starts; ray's would abort the process.

    Ray's own processes do not hear a SIGTERM to all (of a batch system, for example) before they are told to end.
    """
    if threading.current_thread() is not threading.main_thread():  # ray replaces it in the main thread only
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which processes inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _check_reachable(address: str) -> None:
    """Refuse HOST:PORT where nothing listens; ray would wait for it for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"expected a ray cluster at {address!r}, found none: {error}") from None


def router_of(algorithm: Any) -> LearnedPolicy:
    """Return a copy of the policy inside an algorithm, with the learner's weights, which are the newest."""
    twin = algorithm.config.rl_module_spec.model_config["spec"].build()
    weights = algorithm.learner_group.get_weights()[DEFAULT_MODULE_ID]
    own = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    twin.load_state_dict({name: torch.tensor(value) for name, value in own.items()})
    return twin.eval()


class RLlibAgent(Agent):
    """This agent runs an algorithm of RLlib on the decision's environment; a subclass writes `configure`."""

    cannot = {"baseline": Agent.cannot["baseline"]}

    def configure(self, env_id: str, env_config: dict[str, Any], spec: PolicySpec, steps: int, **place: Any) -> Any:
        """Return the algorithm's configuration.

        Args:
            env_id, env_config, place: the arguments of `routing_config`.
            spec: the specification that builds the policy.
            steps: the number of environment steps in all, for schedules.
        """
        raise NotImplementedError

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse more processes than this machine can run, and an address without a cluster.

        A numbered GPU is refused for remote runners, to whom ray gives theirs.
        """
        super().refuse(settings, backbone)
        device, runners = torch.device(settings.place.device), settings.place.num_env_runners
        processes, most = runners + settings.place.num_learners, max(16, 4 * (os.cpu_count() or 1))
        if settings.place.address is None and processes > most:
            raise ValueError(
                f"expected at most {most} runners and learners on this machine, got {processes}; for more, join a ray "
                "cluster (--address)"
            )
        if settings.place.address is not None and start_ray(0, settings.place.address):
            ray.shutdown()
        if runners and device.index is not None:
            raise ValueError(f"remote runners take the GPU that ray gives them: --device {device.type}, not {device}")

    def start(self) -> None:
        """Start ray and build the algorithm."""
        (backbone, _), learning, place = load_backbone(self.backbone_file), self.settings.learning, self.settings.place
        try:
            started = start_ray(max(2, place.num_env_runners + place.num_learners + 1), place.address)
        except ValueError as error:
            if place.address is not None:
                raise
            raise ValueError(f"{error}, or take an agent that needs no ray, such as --agent sb3-ppo") from error
        if started:
            self._held.callback(ray.shutdown)  # timings follow, which ray's processes should not disturb
        self.backbone, self.ground = backbone, self.ground_on(backbone)
        config = self.configure(
            decision(self.settings.problem.decision).env_id,
            env_arguments(self.settings, self.backbone_file, self.times), self.ground.spec,
            self.total // self.ground.decisions,
            seed=self.settings.problem.seed, num_envs=learning.num_envs, rollout=self.ground.rollout,
            num_env_runners=place.num_env_runners, num_learners=place.num_learners,
            # Remote runners see only the GPUs that ray gives them.
            num_gpus_per_env_runner=place.device.startswith("cuda") / max(1, place.num_env_runners),
        )  # fmt: skip
        try:
            self._algorithm = config.build_algo()
        except IndexError as error:  # RLlib asks the first remote runner for its spaces, and there is none
            raise ValueError(
                f"no remote runner started, expected {place.num_env_runners}; all machines of a cluster need the same "
                "Python, dynrl, ray, data and run folder, and the same token if they ask for one (RAY_AUTH_MODE)"
            ) from error
        self._held.callback(self._algorithm.stop)
        self.steps, newest = 0, newest_checkpoint(self.checkpoints)
        if newest is not None:
            try:
                if read_json(newest / DIGESTS) != digests(newest):  # RLlib would believe whatever is there
                    raise ValueError("its checksums do not match")
                self._algorithm.restore_from_path(newest.resolve())
            except Exception as error:  # a damaged file may raise anything
                raise ValueError(
                    f"the checkpoint {newest} is damaged ({type(error).__name__}: "
                    f"{str(error)[:200]}); take it away, and go on from the one before, or from the beginning"
                ) from error
            self.steps = int(newest.name.removeprefix("checkpoint_"))

    def iterate(self) -> dict[str, float]:
        """Run one training iteration of RLlib; runners that die are started again, learners are not."""
        try:
            result = self._algorithm.train()
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"a learner died ({type(error).__name__}), on a node that died, for example; the last checkpoint "
                "stays: go on with --resume"
            ) from error
        self.steps = int(result["env_runners"]["num_env_steps_sampled_lifetime"]) * self.ground.decisions
        return scalars_of(result)

    def router(self) -> LearnedPolicy:
        """Return a copy of the policy inside the algorithm."""
        return router_of(self._algorithm)

    def save(self) -> None:
        """Write a checkpoint of RLlib's own."""
        save_checkpoint(self._algorithm, self.checkpoints, self.steps)

    def reload(self) -> None:
        """Make new environments in every runner, so that they load the changed file."""
        runners = self._algorithm.env_runner_group
        assert runners is not None
        # If this were given the method's name only, the local runner would not call it.
        runners.foreach_env_runner(lambda runner: runner.make_env() if runner.env is not None else None)


def scalars_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of one training result of RLlib, by the tags of `TrainingLog`."""
    learned = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    scalars: dict[str, Any] = dict(result["env_runners"].get("route", {}))
    for name, key in (
        ("loss/policy", "policy_loss"), ("loss/value", "vf_loss"), ("loss/value_explained", "vf_explained_var"),
        ("loss/q", "qf_loss"), ("entropy", "entropy"),
    ):  # fmt: skip
        scalars[name] = learned.get(key)
    return {tag: float(value) for tag, value in scalars.items() if value is not None}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return max(folder.glob("checkpoint_*"), default=None)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 digest of each file of a checkpoint, by its path inside `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save_checkpoint(algorithm: Any, folder: Path, steps: int) -> None:
    """Save a checkpoint and delete all but the last two.

    It is saved under another name first and then renamed, so that every checkpoint with a proper name is complete.
    """
    aside = folder / f".unfinished{ASIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        algorithm.save_to_path(aside.resolve())
        write_json(aside / DIGESTS, digests(aside))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # which makes room on a full disk
        raise
    target = folder / f"checkpoint_{steps:012d}"
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    for old in sorted(folder.glob("checkpoint_*"))[:-KEEP_CHECKPOINTS]:
        shutil.rmtree(old)
