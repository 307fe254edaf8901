"""Report accuracy (or squared error), MACs and measured time of run folders: `report.json`, `report.png` and a table.

Several runs (policy seeds, agents, fine-tuned or not) of one pretrained backbone make one report: a row for each kind
of run, with mean and spread over its seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dynrl.backbones import Backbone
    from dynrl.data import Dataset, Split
    from dynrl.deploy import RoutedModel

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANDOM_SEEDS = 3
MARKERS = {  # of lines in the picture
    "learned": "o-", "gate": "v-", "learned tuned": "D-", "gate tuned": "P-", "learned upfront": "o:",
    "learned upfront greedy": "o-.", "gate upfront": "v:", "learned by time": "h-", "random": "s--", "static": "^:",
    "uniform": "<:", "smaller": "X", "oracle": "*",
}  # fmt: skip


@dataclass
class Args:
    """Settings of `dynrl evaluate`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of one pretrained backbone and data set."""
    smaller: Path | None = None
    """A folder of `dynrl pretrain` with a smaller network (`--network ... --plain`): a row of its own."""
    out: Path | None = None
    """Folder for report.json and report.png; default: the run folder, if there is one only."""
    batch_size: int = 256
    """Inputs a batch, of what is timed."""
    device: str = "cpu"
    """Where networks run, `cuda` say."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of networks and inputs; policies stay in float32."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Check everything, then write the report."""
    from dynrl.scripts.common import check_device, read_config, use_threads

    if not args.runs:
        raise ValueError("expected at least one run folder")
    for run in args.runs:
        read_config(run)
    if args.out is None and len(args.runs) > 1:
        raise ValueError("several runs make one report: say where with --out")
    if args.batch_size < 1:
        raise ValueError(f"expected --batch-size of at least 1, got {args.batch_size}")
    check_device(args.device)
    use_threads(args.threads)
    report_runs(list(args.runs), args.out or args.runs[0], args.batch_size, args.smaller, args.device, args.dtype)


def report_runs(
    runs: list[Path],
    out: Path,
    batch_size: int = 256,
    smaller: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Evaluate runs of one backbone on the test split; write and print the report, and return it.

    Args:
        smaller: a folder whose `plain.safetensors` stands beside them.
        device, dtype: of networks and inputs.
    """
    import torch

    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.files import write_json
    from dynrl.scripts.common import commit

    place = (torch.device(device), getattr(torch, dtype))
    configs, pretrained, models, seeds = load_runs(runs)
    plain_file = runs[0] / "plain.safetensors"
    plain = load_backbone(plain_file)[0] if plain_file.is_file() else None
    dataset = load_dataset(configs[0]["data"])
    beside = None if smaller is None else plain_network(smaller, dataset)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "decision": configs[0]["decision"], "data": dataset.name, "metric": dataset.task.metric,
        "seeds": seeds, "date": f"{date.today()}", "commit": commit(), "device": device, "dtype": dtype,
        **measure(pretrained, plain, models, dataset, batch_size, beside, place),
    }  # fmt: skip
    write_json(out / "report.json", report)
    draw(report, dataset.test, out / "report.png")
    if out in runs:
        show_in_tensorboard(out / "report.png", out)
    print_table(report)
    return report


def show_in_tensorboard(picture: Path, run: Path) -> None:
    """Put a picture beside the run's curves."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run)) as writer:
        writer.add_image(picture.stem, imread(picture), dataformats="HWC")


def load_runs(
    runs: list[Path],
) -> tuple[list[dict[str, Any]], Backbone, dict[str, list[RoutedModel]], dict[str, list[int]]]:
    """Runs of one backbone: their settings, the backbone as pretrained, and by names of rows their models and seeds.

    Raises:
        ValueError: runs of several backbones or data sets, or that are not what `dynrl train` writes; runs that would
            pass for seeds of one another and were not trained alike, or one seed twice.
    """
    from dynrl.backbones import load_backbone
    from dynrl.deploy import load
    from dynrl.scripts.common import pretrained_file, read_config

    configs = [read_config(run) for run in runs]
    backbones = [load_backbone(pretrained_file(run))[0] for run in runs]
    if len({b.fingerprint() for b in backbones}) > 1 or len({c["data"] for c in configs}) > 1:
        raise ValueError("these runs have different backbones or data sets; only policies of one backbone compare")
    models: dict[str, list[RoutedModel]] = {}
    seeds: dict[str, list[int]] = {}
    firsts: dict[str, tuple[Path, dict[str, Any]]] = {}
    for run, config in zip(runs, configs, strict=True):
        name = _row_name(run, config)
        first, alike = firsts.setdefault(name, (run, config))
        differ = {key for key in config if config[key] != alike.get(key)} - {"seed", "num_env_runners", "network"}
        if differ:
            raise ValueError(f"{first} and {run} are both {name!r} and differ in {sorted(differ)}; report them apart")
        if config["seed"] in seeds.get(name, []):
            raise ValueError(f"{run} is {name!r} of seed {config['seed']} a second time; leave one of them out")
        models.setdefault(name, []).append(load(run))
        seeds.setdefault(name, []).append(config["seed"])
    return configs, backbones[0], models, seeds


def plain_network(folder: Path, dataset: Dataset) -> Backbone:
    """The plain network in a folder of `dynrl pretrain`, or a ValueError where it is for another data set."""
    from dynrl.backbones import load_backbone

    backbone, notes = load_backbone(folder / "plain.safetensors")
    if notes.get("data") != dataset.name:
        raise ValueError(f"{folder} was trained on {notes.get('data')!r}, these runs on {dataset.name!r}")
    return backbone


def _row_name(run: Path, config: dict[str, Any]) -> str:
    """What a report calls a run: by its agent, how that was trained, and whether its backbone was fine-tuned."""
    from dynrl.backbones import load_backbone
    from dynrl.policies import load_policy
    from dynrl.scripts.common import PRETRAINED

    if config["finetune"] and not (run / PRETRAINED).exists():
        raise ValueError(
            f"{run} was fine-tuned, but its {PRETRAINED} is not there: evaluate the run it was copied from"
        )
    name = "learned" if config["agent"] == "ppo" else config["agent"]
    for setting, value, said in (
        ("policy", "upfront", "upfront"), ("baseline", "greedy", "greedy"),
        ("baseline", "group", "group"), ("reward", "blockdrop", "blockdrop"),
        ("cost", "time", "by time"),
    ):  # fmt: skip
        name += f" {said}" if config[setting] == value else ""
    low, high = config["price_range"]
    name += f" at {low:g}" if low == high else ""
    # By the backbone's own notes: a run that was killed while it was fine-tuned still has its frozen policy.
    name += " tuned" if "rounds" in load_backbone(run / "backbone.safetensors")[1] else ""
    return name if load_policy(run / "policy.safetensors")[1].get("finished", True) else f"{name} unfinished"


def show_seeds(report: dict[str, Any]) -> str:
    """The seeds behind each row, in words."""
    return "; ".join(f"{name} {', '.join(map(str, seeds))}" for name, seeds in report["seeds"].items())


def measure(
    backbone: Backbone,
    plain: Backbone | None,
    models: dict[str, list[RoutedModel]],
    dataset: Dataset,
    batch_size: int,
    smaller: Backbone | None = None,
    place: tuple[torch.device, torch.dtype] | None = None,
) -> dict[str, Any]:
    """All figures of a report; see README, "Reading a report".

    Args:
        backbone: pretrained; what random, static and oracle routes run on.
        models: by the names of their rows; those of fine-tuned runs have backbones of their own.
        smaller: a plain network of fewer MACs.
        place: device and type of networks and inputs; None: the CPU, float32. Batch norm is folded before.
    """
    import torch

    from dynrl import evaluation as ev
    from dynrl.deploy import RoutedModel
    from dynrl.heuristics import HEURISTICS
    from dynrl.machine import hardware
    from dynrl.policies import RandomPolicy, StaticPolicy
    from dynrl.progress import progress

    place = place or (torch.device("cpu"), torch.float32)
    task, metric = dataset.task, dataset.task.metric
    test, every = dataset.test.to(*place), dataset.validation.to(*place)
    validation, frozen = every.head(1024), backbone.for_inference().to(*place)
    wait = torch.cuda.synchronize if place[0].type == "cuda" else lambda: None
    for model in (model for mine in models.values() for model in mine):
        model.to(*place)
    batch = test.inputs[:batch_size]
    points: list[dict[str, Any]] = []
    sides: dict[str, Callable[[], Any]] = {}  # what is timed; point i by the names i/routed and i/ideal

    def add(policy: str, budget: float | None, scores: list[ev.Score], price: float | None = None) -> None:
        metrics = torch.tensor([s.metric for s in scores], dtype=torch.float64)
        macs = sum(s.macs_fraction for s in scores) / len(scores)
        points.append(
            {
                "policy": policy, "price": price, "budget": budget, "runs": len(scores),
                metric: float(metrics.mean()),
                f"{metric}_std": float(metrics.std()) if len(scores) > 1 else 0.0,
                "macs_fraction": macs,
                "mac_speedup": 1 / macs,
                "router_fraction": sum(s.router_fraction for s in scores) / len(scores),
                "distinct_routes": max(s.distinct_routes for s in scores),
                "choice_rates": {
                    name: sum(s.choice_rates[name] for s in scores) / len(scores) for name in scores[0].choice_rates
                },
            }
        )  # fmt: skip

    def add_sides(network: Backbone, routed: Callable[[], Any], route: torch.Tensor) -> None:
        name = len(points) - 1
        sides[f"{name}/routed"], sides[f"{name}/ideal"] = routed, network.ideal(batch, route)

    def add_routes(policy: str, budget: float | None, drawn: list[torch.Tensor]) -> None:
        scores = []
        for routes in drawn:
            scored = ev.score_routes(frozen, routes, test)
            metrics, macs = float(scored.metric.mean()), float(scored.macs.mean())
            scores.append(ev.Score.of(frozen, metrics, macs, 0.0, scored.route))
        add(policy, budget, scores)
        route = drawn[0][: len(batch)]
        add_sides(frozen, lambda: frozen.run_route(batch, route), frozen.run_route(batch, route).route)

    def add_models(name: str, budget: float | None, mine: list[RoutedModel]) -> None:
        for model in mine:
            if budget is None:
                assert model.price_range is not None
                model.set_price(model.price_range[0])
            else:
                model.set_budget(budget)
        first, price = mine[0], mine[0].price
        add(name, budget, [ev.score(model, test) for model in mine], price)

        def routed() -> torch.Tensor:
            first.set_price(price)
            return first(batch)

        routed()
        assert first.last_route is not None
        add_sides(first.backbone, routed, first.last_route.actions)

    tries, found = ev.static_tries(backbone)
    rounds = 11
    heuristics = HEURISTICS.get(backbone.decision, {})
    total = (2 + len(models) + len(heuristics)) * len(BUDGETS) + len(models) + 2
    total += tries + found + (backbone.num_choices > 2) * backbone.num_choices + ev.ORACLE_DRAWS + rounds
    with progress(total=total, desc="evaluating", unit="pass") as bar:

        def full_route(networks: list[Backbone], split: Split) -> float:
            metrics = [float(ev.score_routes(n, n.dense_actions(len(split)), split).metric.mean()) for n in networks]
            return sum(metrics) / len(metrics)

        original = frozen.fingerprint()
        own = [model.backbone for mine in models.values() for model in mine]
        on_full_route = {
            "all_execute": [frozen],
            "plain": [] if plain is None else [plain.for_inference().to(*place)],
            "tuned": [network for network in own if network.fingerprint() != original],
        }
        full_routes = {name: full_route(mine, test) if mine else None for name, mine in on_full_route.items()}
        # By validation data, as all that is chosen.
        _, best_dense = min((task.error(full_route(mine, every)), name) for name, mine in on_full_route.items() if mine)
        for budget in (*BUDGETS, None):
            spent = None
            for name, mine in models.items():
                if _shown_at(mine, budget):
                    add_models(name, budget, mine)
                    spent = spent or points[-1]["macs_fraction"]
                bar.update()
            if spent:
                rate = ev.random_rate(frozen, validation.inputs[:256], spent)
                if rate is not None:
                    policies = [RandomPolicy(frozen.column_costs, rate, seed) for seed in range(RANDOM_SEEDS)]
                    add_routes("random", budget, [policy.route(test.inputs) for policy in policies])
            bar.update()
        usage = None
        for name, (shown, *_) in list(models.items())[:1]:
            if _shown_at([shown], 0.5):
                shown.set_budget(0.5)
            elif shown.price_range is not None:
                shown.set_price(shown.price_range[0])
            usage = {"policy": name, "price": shown.price, **asdict(ev.Usage.of(shown, test))}
        for name, fit in heuristics.items():
            policy_for = fit(frozen, every)
            for budget in BUDGETS:
                rule = policy_for(budget)
                if rule is not None:
                    ruled = RoutedModel(frozen, rule)
                    add(name, budget, [ev.score(ruled, test)])
                    ruled(batch)
                    assert ruled.last_route is not None
                    add_sides(frozen, partial(ruled, batch), ruled.last_route.actions)
                bar.update()
        static = ev.static_routes(frozen, validation, bar.update)
        uniform = ev.uniform_routes(frozen, validation, bar.update) if frozen.num_choices > 2 else []
        for budget in BUDGETS:
            best = ev.affordable(static + uniform, budget, task)
            if best is not None:
                add_routes("static", budget, [StaticPolicy(best).route(test.inputs)])
            bar.update()
        for route, _, _ in uniform:
            add_routes("uniform", None, [StaticPolicy(route).route(test.inputs)])
        if smaller is not None:
            small = smaller.for_inference().to(*place)
            share = small.dense_macs / frozen.dense_macs
            add("smaller", None, [ev.Score.of(small, full_route([small], test), share, 0.0, small.dense_actions(1))])
            add_sides(small, small.ideal(batch, small.dense_actions(len(batch))), small.dense_actions(len(batch)))
        known = ev.oracle_candidates(frozen, static)
        add_routes("oracle", None, [ev.oracle_routes(frozen, test, known, bar.update)])
        dense_sides = ev.dense_sides(frozen, batch)
        with torch.inference_mode():
            times = ev.medians_in_turn(sides | dense_sides, rounds, bar.update, wait)
    dense = min(times[name] for name in dense_sides)
    for i, point in enumerate(points):
        ms, ideal = times[f"{i}/routed"], times[f"{i}/ideal"]
        point |= {"latency_ms": ms, "speedup": dense / ms, "realised_ratio": ideal / ms}
    return {
        "dense": {
            metric: full_routes[best_dense],
            **{f"{name}_{metric}": value for name, value in full_routes.items()},
            "macs": backbone.dense_macs,
            "latency_ms": dense,
            "latency_ms_by_side": {name.removeprefix("dense "): times[name] for name in dense_sides},
            "batch_size": len(batch),
        },
        "points": points,
        "usage": usage,
        "hardware": hardware(),
    }


def _shown_at(models: list[RoutedModel], budget: float | None) -> bool:
    """Whether models that differ by their seeds have a row for `budget`: where all reach it, or rows of one front would
    be of different seeds. None: the lowest price, where they reach none of `BUDGETS`.
    """
    if budget is None:
        return not any(_shown_at(models, other) for other in BUDGETS)
    fractions = [[macs for _, macs in model.curve] for model in models]
    return all(min(mine) <= budget <= max(mine) for mine in fractions)


def print_table(report: dict[str, Any]) -> None:
    """The report as a table."""
    from dynrl.tasks import TASKS

    dense, metric, task = report["dense"], report["metric"], TASKS[report["metric"]]
    print(f"\n{report['decision']} on {report['data']}, test split, policy seeds: {show_seeds(report)}")
    print(f"times: a batch of {dense['batch_size']} on {report['hardware']['threads']} threads")
    wide = max(len(p["policy"]) for p in report["points"])
    print(f"{'policy':{wide}} {'budget':>6} {task.heading:>16} {'MACs':>6} {'ms':>8} {'speed-up':>9} {'of ideal':>9}")
    print(f"{'dense':{wide}} {'':6} {task.show(dense[metric]):>8} {'':7} {1:6.2f} {dense['latency_ms']:8.2f} {1:9.2f}")
    for p in report["points"]:
        budget = "" if p["budget"] is None else f"{p['budget']:.1f}"
        spread = f"±{task.show(p[f'{metric}_std'])}" if p[f"{metric}_std"] else ""
        print(
            f"{p['policy']:{wide}} {budget:>6} {task.show(p[metric]):>8} {spread:>7} {p['macs_fraction']:6.2f}"
            f" {p['latency_ms']:8.2f} {p['speedup']:9.2f} {p['realised_ratio']:9.2f}"
        )
    print("MACs: of the dense network's, router included. oracle: each input's best route, the cheapest of those.")
    if (usage := report["usage"]) is not None:
        spent = {group["class"]: group["macs_fraction"] for group in usage["groups"]}
        least, most = (choose(spent, key=lambda of: spent[of]) for choose in (min, max))
        between = f"; class {least} takes {spent[least]:.2f}, class {most} {spent[most]:.2f}" if len(spent) > 1 else ""
        print(f"{usage['policy']}: {usage['distinct_routes']} routes, the commonest {usage['commonest']:.0%}{between}")
    for name in report["seeds"]:
        missed = sorted(set(BUDGETS) - {p["budget"] for p in report["points"] if p["policy"] == name})
        if missed:
            print(f"budgets out of reach of {name}: {', '.join(map(str, missed))}")


def draw(report: dict[str, Any], test: Split, path: Path) -> None:
    """The metric against MACs and against measured time; where one policy spends, and on which inputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dynrl.scripts.common import save_picture
    from dynrl.tasks import TASKS

    figure = pyplot.figure(figsize=(11, 8.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    upper, lower = halves
    axes = upper.subplots(1, 2, sharey=True)
    dense, metric, task = report["dense"], report["metric"], TASKS[report["metric"]]
    full_height = task.factor * dense[metric]
    for axis, x, label, full in (
        (axes[0], "macs_fraction", "MACs, share of the dense network's", 1.0),
        (axes[1], "latency_ms", f"milliseconds a batch of {dense['batch_size']}", dense["latency_ms"]),
    ):
        for policy in dict.fromkeys(p["policy"] for p in report["points"]):
            mine = sorted((p for p in report["points"] if p["policy"] == policy), key=itemgetter(x))
            ys, spread = ([task.factor * p[key] for p in mine] for key in (metric, f"{metric}_std"))
            marker = MARKERS.get(policy, "x-.")
            axis.errorbar([p[x] for p in mine], ys, yerr=spread, fmt=marker, label=policy, capsize=2)
        axis.axhline(full_height, color="grey", linewidth=0.8)
        axis.plot([full], [full_height], "D", color="grey", label="dense")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale(task.axis)
    axes[0].set_ylabel(f"test {task.heading}")
    axes[0].legend(fontsize="small")
    upper.suptitle(f"{report['decision']} on {report['data']}, policy seeds: {show_seeds(report)}", fontsize="medium")
    if report["usage"] is not None:
        draw_usage(report["usage"], test, lower)
    save_picture(figure, path)


def draw_usage(usage: dict[str, Any], test: Split, figure: Any) -> None:
    """What is spent at each step on each class; of images, those most and least is spent on."""
    from dynrl.tasks import CLASSIFICATION

    images = test.inputs.ndim == 4 and test.inputs.shape[1] in (1, 3)
    halves: Any = figure.subfigures(1, 2) if images else (figure, None)
    left, right = halves
    axis = left.subplots()
    names = [f"{'all' if g['class'] is None else g['class']}  {g['macs_fraction']:.2f}" for g in usage["groups"]]
    picture = axis.imshow(usage["by_step"], aspect="auto", vmin=0, vmax=1)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="decision", ylabel="class, and what it takes of the dense MACs")
    routes = f"{usage['distinct_routes']} distinct routes, the commonest for {usage['commonest']:.0%}"
    axis.set_title(f"{usage['policy']}, first seed, price {usage['price']:.3g}: {routes}", fontsize="medium")
    left.colorbar(picture, label="spent, share of the dearest choice")
    if right is None:
        return
    for name, mine, half in zip(
        ("least", "most"), (usage["cheapest"], usage["dearest"]), right.subfigures(2, 1), strict=True
    ):
        half.suptitle(f"{name} is spent on", fontsize="medium")
        grid = half.subplots(2, -(-len(mine) // 2), squeeze=False).flatten()
        for axis in grid:
            axis.set_axis_off()
        for row, axis in zip(mine, grid, strict=False):
            image = test.inputs[row].float().cpu().permute(1, 2, 0)
            low, high = image.min(), image.max()
            axis.imshow(((image - low) / (high - low).clamp_min(1e-6)).numpy(), cmap="gray")
            if test.task == CLASSIFICATION:
                axis.set_title(str(int(test.targets[row])), fontsize="small")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("evaluate")
