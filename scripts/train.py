"""Learn a routing policy, by reinforcement or by gradient, and write a run folder."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

AgentName = Literal["ppo", "appo", "dqn", "sb3-ppo", "sb3-dqn", "gate"]
RLLIB = ("ppo", "appo", "dqn")  # of those

if TYPE_CHECKING:
    from dynrl.agents.training import Settings
    from dynrl.data import Dataset
    from dynrl.policies import LearnedPolicy


@dataclass
class Args:
    """Settings of `dynrl train`."""

    decision: Annotated[str, tyro.conf.Positional]
    """What to decide; see `dynrl list`."""
    data: str | None = None
    """A data set by name, a folder with a folder of images for each class, or FOLDER@SIZE, to which their squares are
    brought; default: the decision's."""
    agent: AgentName = "ppo"
    """RLlib's PPO, APPO (for many runners) or DQN; Stable-Baselines3's PPO or DQN; or gates trained by gradient
    (straight-through), which they must stand beside."""
    finetune: bool = False
    """Then train backbone and policy in turn, by the data set's plan; with --resume, of a run that did not, too. Where
    no backbone survives random routes (recurrent ones on adding) that is always done."""
    backbone: Path | None = None
    """A folder from `dynrl pretrain` or another run; default: pretrain one first."""
    network: tuple[str, ...] = ()
    """Settings of a backbone that is pretrained here and differs from the data set's defaults, each NAME=VALUE."""
    out: Path | None = None
    """Run folder to make; default runs/DECISION-DATA-TIME."""
    resume: Path | None = None
    """Go on with this run folder, by its own settings."""
    seed: int = 0
    """Seed of the policy and of what it meets (and of a backbone that is pretrained here)."""
    steps: int | None = None
    """Decisions to learn from, fine-tuning's rounds not counted; default: the data set's (of gates half as many, which
    takes about as long)."""
    router_hidden: int | None = None
    """Units of the policy's hidden layer, 0 for a linear policy; default: the data set's."""
    num_envs: int | None = None
    """Inputs that walk side by side in one runner; of gates, a batch; default: the data set's."""
    num_env_runners: int = 0
    """Remote processes that sample; 0 samples in this one. Of RLlib's agents."""
    price_range: tuple[float, float] | None = None
    """Lowest and highest price of the dense network's compute, in units of the accuracy term; default: the data
    set's."""
    accuracy_term: Literal["distillation", "log_likelihood", "correct", "blockdrop"] = "distillation"
    """What the reward sets against the price; `blockdrop` is BlockDrop's reward (--upfront only)."""
    upfront: bool = False
    """Decide all at once from the input, before the network runs, instead of step by step from what it computes."""
    baseline: Literal["value", "group", "greedy"] = "value"
    """What PPO compares a reward with: a learned value; what eight routes of the same input earn on average, the
    likeliest among them; or what the likeliest alone earns (self-critical, as in BlockDrop; --upfront only)."""
    learning_rate: float | None = None
    """Of the optimiser, at the start; it falls to a tenth. Default: the agent's own."""
    entropy: float = 0.01
    """Bonus for undecided policies, at the start; it falls to a tenth. Of PPO and APPO."""
    cost: Literal["macs", "time"] = "macs"
    """What the price is of: multiply-accumulates, or the time that each choice takes on this machine, which is measured
    first (batches of 256; not of gates). Budgets stay shares of the MACs, or milliseconds after dynrl calibrate."""
    num_learners: int = 0
    """Remote processes that learn, each from its share of the environments; 0: this one does. Of RLlib's agents."""
    address: str | None = None
    """Of a ray cluster to run on, `auto` for the one on this machine; its machines must share the run's folder.
    Default: ray is started here. Of RLlib's agents."""
    device: str = "cpu"
    """Where the backbone runs and is trained, `cuda` say; the policy, which is small, learns on the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the backbone, while the policy learns on it."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Pretrain if needed, learn, fine-tune if wanted, calibrate budgets, evaluate."""
    from dynrl.scripts.common import use_threads

    run, config = open_run(args)
    use_threads(args.threads)
    print(f"run folder: {run}   (watch: tensorboard --logdir {run.parent})", flush=True)
    if learn(run, config, args.device, args.num_learners, args.address):
        from dynrl.scripts.evaluate import report_runs

        report_runs([run], run)
        print(f"\ncurves:   tensorboard --logdir {run.parent}\npicture:  {run}/report.png")
        budget = "" if config["price_range"][0] == config["price_range"][1] else "model.set_budget(0.5); "
        print(f"plug it:  model = dynrl.load({str(run)!r}); {budget}outputs = model(inputs)")


def open_run(args: Args) -> tuple[Path, dict[str, Any]]:
    """Make the run folder, or find the one to go on with: its path and settings. What can be refused is, before."""
    from dynrl.agents.training import check_shares
    from dynrl.data import check_dataset, load_dataset
    from dynrl.envs import decision
    from dynrl.envs.core import check_accuracy_term
    from dynrl.files import write_json
    from dynrl.observation import View
    from dynrl.recipes import defaults
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import new_folder

    decision(args.decision)
    if args.resume is not None:
        run = args.resume
        config = EARLIER | RunFolder(run).config
        _check_place(args, config["agent"], config["num_env_runners"])
        if set(config) != set(_DEFAULT):
            raise ValueError(f"{run}/config.json holds other settings than this version of dynrl train writes")
        config["finetune"] = bool(config["finetune"]) or args.finetune
        check_args(Args(config["decision"], agent=config["agent"], finetune=config["finetune"]))
        changed = [name for name, value in _settings(args).items() if value not in (config[name], _DEFAULT[name])]
        if changed or args.out or args.backbone:
            raise ValueError(f"--resume goes on by {run}'s own settings; leave out {changed or '--out and --backbone'}")
        if config["agent"] == "ppo":
            check_shares(config["num_envs"], args.num_learners, config["baseline"])
        write_json(run / "config.json", config)
    else:
        config = _settings(args)
        _check_place(args, args.agent, args.num_env_runners)
        config["data"] = data = check_dataset(args.data or decision(args.decision).data)
        row = defaults(args.decision, data).changed(args.network)
        config["finetune"] = args.finetune or row.joint
        check_args(replace(args, finetune=config["finetune"]))
        config["steps"] = args.steps or (row.steps // 2 if args.agent == "gate" else row.steps)
        for name in ("router_hidden", "num_envs", "price_range"):
            if config[name] is None:
                config[name] = getattr(row, name)
        # All that can be refused is refused before the folder is made.
        if args.agent == "ppo":
            check_shares(config["num_envs"], args.num_learners, args.baseline)
        dataset = load_dataset(data)
        backbone = row.build(dataset, args.seed)
        check_accuracy_term(args.accuracy_term, dataset.task, args.upfront)
        if args.upfront:
            View.of(backbone)
        source = _backbone_folder(args.backbone, args.decision, dataset) if args.backbone else None
        run = new_folder(args.out, args.decision, data)
        if source is not None:
            for name in ("backbone.safetensors", "plain.safetensors", "backbone-pretrained.safetensors"):
                if (source / name).is_file():
                    shutil.copyfile(source / name, run / name)
        # Last: a folder with settings has its backbone, so resuming never trains another.
        write_json(run / "config.json", config)
    return run, config


def _settings(args: Args) -> dict[str, Any]:
    left_out = ("out", "resume", "backbone", "threads", "num_learners", "address", "device")
    settings = {name: value for name, value in asdict(args).items() if name not in left_out}
    prices = None if args.price_range is None else list(args.price_range)
    return {**settings, "price_range": prices, "network": list(args.network)}


_DEFAULT = _settings(Args("")) | {"decision": None}


EARLIER: dict[str, Any] = {  # of runs from before these could be set
    "finetune": False, "network": [], "router_hidden": 64, "upfront": False, "baseline": "value",
    "cost": "macs", "dtype": "float32", "learning_rate": None, "entropy": 0.01,
}  # fmt: skip


def _check_place(args: Args, agent: str, num_env_runners: int) -> None:
    """What says where a run runs, and may change when it is resumed."""
    from dynrl.scripts.common import check_device

    device = check_device(args.device)
    if agent not in RLLIB and (args.num_learners or args.address):
        raise ValueError(f"--num-learners and --address are for the agents of RLlib: {', '.join(RLLIB)}")
    if agent == "gate" and device.type != "cpu":
        raise ValueError("gates are trained on the CPU; leave out --device")
    if args.num_learners < 0:
        raise ValueError(f"expected --num-learners of at least 0, got {args.num_learners}")
    if num_env_runners and device.index is not None:
        raise ValueError(f"remote runners take the GPU that ray gives them: --device {device.type}, not {device}")
    if args.address is not None:
        from dynrl.agents.rllib import start_ray

        start_ray(0, args.address)


def check_args(args: Args) -> None:
    """Refuse, with a ValueError, what does not go together or is out of range."""
    from dynrl.envs.core import check_price_range

    if args.price_range is not None:
        check_price_range(args.price_range)
    if args.backbone is not None and args.network:
        raise ValueError("--network is for a backbone that is pretrained here; leave it out, or --backbone")
    if args.agent == "gate" and args.accuracy_term in ("correct", "blockdrop"):
        raise ValueError(
            f"the accuracy term {args.accuracy_term!r} has no gradient for gates; choose another, or --agent ppo"
        )
    if args.baseline == "greedy" and not (args.upfront and args.agent == "ppo"):
        raise ValueError("--baseline greedy is for --agent ppo with --upfront: one reward for a whole route")
    if args.agent in ("dqn", "sb3-dqn") and args.upfront:
        raise ValueError(f"--agent {args.agent} takes one choice a step; choose another for --upfront")
    if args.agent in ("dqn", "sb3-dqn") and args.finetune:
        raise ValueError(
            f"--agent {args.agent} replays what it met on the backbone as it was; choose another for --finetune"
        )
    if args.baseline == "group" and args.agent != "ppo":
        raise ValueError("--baseline group is for --agent ppo")
    if args.agent not in RLLIB and args.num_env_runners:
        raise ValueError(f"--num-env-runners is for the agents of RLlib: {', '.join(RLLIB)}")
    if args.learning_rate is not None and not 0 < args.learning_rate < 1:
        raise ValueError(f"expected --learning-rate above 0 and below 1, got {args.learning_rate}")
    if not 0 <= args.entropy < 1:
        raise ValueError(f"expected --entropy of at least 0 and below 1, got {args.entropy}")
    if args.entropy != 0.01 and args.agent not in ("ppo", "appo", "sb3-ppo"):
        raise ValueError("--entropy is for the agents ppo, appo and sb3-ppo")
    if args.agent == "gate" and args.dtype != "float32":
        raise ValueError("gates are trained in float32; leave out --dtype")
    if args.agent == "gate" and args.cost == "time":
        raise ValueError("--cost time is not for gates: a gated walk counts MACs")
    for name, least in (
        ("steps", 1), ("router_hidden", 0), ("num_envs", 1), ("num_env_runners", 0), ("threads", 1),
        ("seed", 0),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least {least} and below 2^31, got {value}")


def _backbone_folder(given: Path, decision: str, dataset: Dataset) -> Path:
    from dynrl.backbones import load_backbone

    if not given.is_dir():
        raise ValueError(f"expected --backbone to be a folder that holds backbone.safetensors, got {given}")
    backbone, _ = load_backbone(given / "backbone.safetensors")
    if backbone.decision != decision:
        raise ValueError(f"{given} poses {backbone.decision!r}, not {decision!r}")
    mine, wanted = (backbone.input_shape, backbone.config["classes"]), (dataset.input_shape, dataset.classes)
    if mine != wanted:
        raise ValueError(f"{given} is for inputs and outputs {mine}, {dataset.name} has {wanted}")
    return given


def learn(
    run: Path, config: dict[str, Any], device: str = "cpu", num_learners: int = 0, address: str | None = None
) -> bool:
    """Make the run's backbone and policy; False after Ctrl-C, which leaves a policy of what was learned so far."""
    from dynrl.agents.training import train_policy
    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.deploy import RoutedModel
    from dynrl.evaluation import calibrate, collapse
    from dynrl.policies import save_policy
    from dynrl.progress import progress
    from dynrl.scripts.pretrain import pretrain_into

    file = newest = run / "backbone.safetensors"
    if not file.exists():
        pretrain_into(run, config["decision"], config["data"], config["seed"], config["network"], device=device)
    times = _times(run, file, config["data"], device, config["dtype"]) if config["cost"] == "time" else None
    settings = settings_of(config, times=times, device=device, num_learners=num_learners, address=address)
    if config["finetune"]:
        newest = run / "checkpoints" / "backbone.safetensors"
        router, finished = _train_jointly(run, settings, newest)
    else:
        router, finished = train_policy(settings, file, run)
    backbone, notes = load_backbone(newest)
    model, validation = RoutedModel(backbone, router), load_dataset(config["data"]).validation
    # A thousand images place the mean MACs within about 0.005 of the whole split's.
    with progress(desc="calibrating budgets", unit="price") as bar:
        curve = calibrate(model, validation.head(1024), tick=bar.update)
    if newest != file:  # not before: until here the run's policy, if it has one, fits its backbone
        backbone.save(file, **notes)
    save_policy(
        run / "policy.safetensors", router,
        {
            "decision": config["decision"], "data": config["data"], "backbone": backbone.fingerprint(), "curve": curve,
            "finished": finished,
        },
    )  # fmt: skip
    low, high = min(macs for _, macs in curve), max(macs for _, macs in curve)
    print(f"policy: {run}/policy.safetensors, budgets from {low:.2f} to {high:.2f} of the dense MACs", flush=True)
    if advice := collapse(model, validation.head(1024)):
        print(advice, file=sys.stderr)
    if not finished:
        print(f"stopped early; go on with: dynrl train {config['decision']} --resume {run}", file=sys.stderr)
    return finished


def settings_of(config: dict[str, Any], **more: Any) -> Settings:
    """What a run's config.json says of training, and what it does not: where, and by what times."""
    from dynrl.agents.training import Settings

    return Settings(
        **{name: value for name, value in config.items() if name not in ("finetune", "network", "cost")}, **more
    )


def _times(run: Path, file: Path, data: str, device: str, dtype: str) -> dict[str, Any]:
    """What each choice takes on this machine, measured once a run: times.json."""
    import torch

    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.envs.core import check_dtype
    from dynrl.evaluation import step_times
    from dynrl.files import read_json, write_json
    from dynrl.machine import hardware
    from dynrl.progress import progress

    kept, rounds = run / "times.json", 11
    if not kept.exists():
        inputs = load_dataset(data).validation.inputs[:256].to(device, check_dtype(dtype))
        backbone = load_backbone(file)[0].for_inference().to(device, check_dtype(dtype))
        wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
        with progress(total=rounds + 1, desc="timing choices", unit="round") as bar:
            measured = step_times(backbone, inputs, rounds, bar.update, wait)
        write_json(kept, {**measured, "batch_size": len(inputs), "device": device, "hardware": hardware()})
    written = read_json(kept)
    return {"start": written["start"], "choices": written["choices"]}


def _train_jointly(run: Path, settings: Settings, working: Path) -> tuple[LearnedPolicy, bool]:
    """`train_jointly` on `working`, which begins as a copy of the run's backbone; that one is kept."""
    from dynrl.agents.training import train_jointly
    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.files import write_aside
    from dynrl.pretraining import metric_at_rate
    from dynrl.recipes import defaults
    from dynrl.runs import RunFolder

    file, dataset = run / "backbone.safetensors", load_dataset(settings.data)
    kept = RunFolder(run).kept_file
    if not kept.exists():
        with write_aside(kept) as aside:
            shutil.copyfile(file, aside)
    if not working.exists():
        backbone, notes = load_backbone(file)
        backbone.save(working, **notes | {"rounds": 0})
    # The teacher is what reports call dense: the better of the two, by validation data.
    known = [
        load_backbone(path)[0] for path in (RunFolder(run).pretrained_file, run / "plain.safetensors") if path.is_file()
    ]
    reference = min(known, key=lambda b: dataset.task.error(metric_at_rate(b, dataset.validation, None)))
    return train_jointly(settings, defaults(settings.decision, settings.data).finetuning, working, reference, run)


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("train")
