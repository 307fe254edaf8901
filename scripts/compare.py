"""Train a matrix of policies (decisions x agents x seeds), and tell which is better, by how much, and how surely.

Every cell is a run folder, OUT/DECISION-DATA/AGENT-SEED (ppo-at-PRICE-SEED), on one backbone; what is there already,
killed or finished, is gone on with or left as it is, and run folders that you put beside them are compared, too. For
each decision the result is `comparison.json`, `comparison.png` and a table: areas under the accuracy-compute fronts of
the test split, operating points chosen on validation data, and paired differences of PPO's policies (without them, of
all) to each other contender, with 95 % intervals over inputs and seeds.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from dynrl.comparison import Front


@dataclass
class Args:
    """Settings of `dynrl compare`."""

    decisions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Decisions to learn; see `dynrl list`."""
    out: Path
    """Folder of all runs; the same command goes on with it."""
    data: str | None = None
    """Data set, as of `dynrl train`; default: each decision's."""
    agents: tuple[str, ...] = ("ppo", "gate")
    """What learns, as of `dynrl train`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Policy seeds; the backbone's is the first of them."""
    finetune: bool = False
    """Train backbones and policies in turn, as of `dynrl train`."""
    prices: tuple[float, ...] = ()
    """Policies to train at one price each, PPO's: what one policy for all prices must stand beside."""
    plain: tuple[str, ...] = ()
    """Smaller networks to train alone by the same recipe, each a NAME=VALUE that differs from the backbone's settings:
    layers=[2,2,2], widths=[16,32,64]."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Train what is missing, then compare."""
    from dynrl.data import check_dataset, load_dataset
    from dynrl.envs import decision
    from dynrl.envs.core import check_price_range
    from dynrl.recipes import defaults
    from dynrl.scripts.common import folder_name, use_threads
    from dynrl.training import plan

    if not args.decisions or not args.agents or not args.seeds:
        raise ValueError("expected at least one decision, one agent and one seed")
    cells = [(name, check_dataset(args.data or decision(name).data)) for name in args.decisions]
    for name, data in cells:  # what can be refused is, before hours of training
        row = defaults(name, data)
        for agent, seed in product(args.agents, args.seeds):
            plan(name, data, agent=agent, seed=seed, finetune=args.finetune)
        for setting in args.plain:
            row.changed((setting,)).build(load_dataset(data), args.seeds[0])
    for price in args.prices:
        check_price_range((price, price))
    if args.prices and "ppo" not in args.agents:
        raise ValueError("--prices trains PPO at one price each, to stand beside PPO: add ppo to --agents")
    use_threads(args.threads)
    for name, data in cells:
        folder = args.out / f"{name}-{folder_name(data)}"
        if not train_cells(folder, name, data, args):
            return
        compare_runs(folder)


def train_cells(folder: Path, decision: str, data: str, args: Args) -> bool:
    """Train what is missing in `folder`; False after Ctrl-C."""
    from dynrl.policies import load_policy
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import drop_half_made, read_config
    from dynrl.training import learn, make_run, plan, plan_again, pretrain_into

    backbone = folder / "backbone"
    backbone.mkdir(parents=True, exist_ok=True)
    pretrain_into(backbone, plan(decision, data, seed=args.seeds[0]))
    for setting in args.plain:
        plain = folder / f"plain-{re.sub(r'[^a-z0-9]+', '-', setting.lower()).strip('-')}"
        plain.mkdir(exist_ok=True)
        pretrain_into(plain, plan(decision, data, seed=args.seeds[0], network=(setting,)), plain_only=True)
    kinds: list[tuple[str, Any, tuple[float, float] | None]] = [(agent, agent, None) for agent in args.agents]
    kinds += [(f"ppo-at-{price:g}", "ppo", (price, price)) for price in args.prices]
    for (kind, agent, price_range), seed in product(kinds, args.seeds):
        run = folder / f"{kind}{'-tuned' if args.finetune else ''}-{seed}"
        policy = run / "policy.safetensors"
        if policy.is_file() and load_policy(policy)[1].get("finished", True):
            continue
        drop_half_made(run)
        if run.is_dir() and (met := read_config(run)["data"]) != data:  # folders of images may bear the same name
            raise ValueError(f"{run} was trained on {met}, not {data}; choose another --out")
        print(f"cell: {run}", flush=True)
        if run.is_dir():
            folder_of, planned = RunFolder(run), plan_again(RunFolder(run))
        else:
            given = {"agent": agent, "finetune": args.finetune, "seed": seed}
            given |= {"price_range": price_range} if price_range else {}
            planned = plan(decision, data, **given)
            folder_of = make_run(planned, run, backbone)
        if not learn(folder_of, planned):
            return False
    return True


def compare_runs(folder: Path) -> dict[str, Any]:
    """Compare all runs and plain networks in `folder`; write, print and return the comparison."""
    from dynrl import comparison as cp
    from dynrl import evaluation as ev
    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.files import write_json
    from dynrl.heuristics import HEURISTICS
    from dynrl.policies import load_policy
    from dynrl.progress import progress
    from dynrl.scripts.common import commit
    from dynrl.scripts.evaluate import RANDOM_SEEDS, load_runs, plain_network

    runs = []
    for run in sorted(folder.iterdir()):
        policy = run / "policy.safetensors"
        if policy.is_file() and load_policy(policy)[1].get("finished", True):
            runs.append(run)
        elif policy.is_file():
            print(f"left out, since it was stopped early: {run}", file=sys.stderr)
    configs, pretrained, models, seeds = load_runs(runs)
    dataset = load_dataset(configs[0]["data"])
    test, validation = dataset.test, dataset.validation.head(1024)
    backbone, dense_macs = pretrained.for_inference(), pretrained.dense_macs
    one_price = {name: mine for name, mine in models.items() if len(mine[0].curve) == 1}
    models = {name: mine for name, mine in models.items() if name not in one_price}
    plain = runs[0] / "plain.safetensors"
    smaller = [plain_network(path, dataset) for path in sorted(folder.glob("plain-*"))]
    networks = [network.for_inference() for network in smaller]
    # What dense is: the best there is on the full route, by validation data; of tuned ones the mean over their seeds.
    dense = {name: [m.backbone for m in mine] for name, mine in models.items() if name.endswith(" tuned")}
    dense |= {"pretrained": [backbone]}
    dense |= {"plain": [load_backbone(plain)[0].for_inference()]} if plain.is_file() else {}
    fronts: dict[str, Front] = {}
    budgets, tries = len(cp.BUDGETS), sum(ev.static_tries(backbone))
    rules = HEURISTICS.get(backbone.decision, {})
    contestants = sum(map(len, models.values())) + RANDOM_SEEDS + len(rules) + bool(networks)
    total = budgets * contestants + tries + ev.ORACLE_DRAWS + len(one_price)
    with progress(total=total, desc="comparing", unit="pass") as bar:

        def front(name: str, *reaches: cp.Reach) -> None:
            fronts[name] = cp.Front.of(reaches, len(test), bar.update)

        for name, mine in models.items():
            front(name, *(cp.model_reach(model, test) for model in mine))
        front("random", *(cp.random_reach(backbone, test, validation, seed) for seed in range(RANDOM_SEEDS)))
        static = ev.static_routes(backbone, validation, bar.update)
        uniform = ev.uniform_routes(backbone, validation) if backbone.num_choices > 2 else []
        front("static", cp.routes_reach(backbone, test, static + uniform))
        for name, fit in rules.items():
            front(name, cp.rule_reach(fit, backbone, test, dataset.validation))
        if networks:
            front("smaller", cp.networks_reach(networks, dense_macs, test, validation))

        known_prices = []
        for name, alone in one_price.items():  # beside what is trained in the same way, but for all prices
            twins = models.get(re.sub(r" at [^ ]+", "", name))
            if twins and (row := cp.at_equal_macs(twins, alone, test, dataset.task)):
                known_prices.append({"policy": name, **row})
            bar.update()

        def full(network: Any, split: Any) -> Any:
            return ev.score_routes(network, network.dense_actions(len(split)), split).metric

        def error(networks: Any) -> float:
            return dataset.task.error(sum(float(full(n, dataset.validation).mean()) for n in networks) / len(networks))

        best = min(dense, key=lambda name: error(dense[name]))
        fronts["dense"] = cp.Front.of([cp.fixed_reach(full(n, test), 1.0) for n in dense[best]], len(test))
        known = ev.oracle_candidates(backbone, static)
        oracle = ev.score_routes(backbone, ev.oracle_routes(backbone, test, known, bar.update), test)
        fronts["oracle"] = cp.Front.of([cp.fixed_reach(oracle.metric, float(oracle.macs.mean()))], len(test))
    contenders = [name for name in models if name.startswith("learned")] or list(models)
    result = {
        "decision": backbone.decision, "data": dataset.name, "metric": dataset.task.metric, "seeds": seeds,
        "date": f"{date.today()}", "commit": commit(), "budgets": list(cp.BUDGETS), "inputs": len(test), "dense": best,
        "fronts": {name: _figures(front) for name, front in fronts.items()},
        "differences": [
            {
                "policy": name, "rival": rival,
                **cp.differences(fronts[name], fronts[rival], dataset.task, rival == "dense" and name == best),
            }
            for name in contenders for rival in fronts if rival != name
        ],
        "one_price": known_prices,
    }  # fmt: skip
    write_json(folder / "comparison.json", result)
    draw(result, folder / "comparison.png")
    print_differences(result)
    return result


def _figures(front: Front) -> dict[str, list[float | None]]:
    """Mean and spread over seeds at each budget; None where it is out of reach."""

    def listed(values: Any) -> list[float | None]:
        return [float(v) if ok else None for v, ok in zip(values, front.reached.tolist(), strict=True)]

    means = front.metric.mean(2)
    spread = means.std(0) if len(means) > 1 else means[0] * 0
    return {"metric": listed(means.mean(0)), "std": listed(spread), "macs_fraction": listed(front.macs.mean(0))}


def verdict(of: dict[str, float]) -> str:
    """What an interval says."""
    return "better" if of["low"] > 0 else "worse" if of["high"] < 0 else "even"


def print_differences(result: dict[str, Any]) -> None:
    """The differences as a table."""
    from dynrl.tasks import TASKS

    task = TASKS[result["metric"]]
    print(f"\n{result['decision']} on {result['data']}, {result['inputs']} test inputs; seeds: {result['seeds']}")
    print(f"difference in {task.heading}, more is better for the policy; 95 % interval over inputs and seeds")
    for row in result["differences"]:
        for at in ("area", "0.333", "0.5"):
            if of := row.get(at):
                gain, low, high = (task.show(of[name]) for name in ("difference", "low", "high"))
                print(f"{row['policy']} less {row['rival']:20} {at:>6} {gain:>8} [{low}, {high}]  {verdict(of)}")
    for row in result["one_price"]:
        gain, low, high = (task.show(row[name]) for name in ("difference", "low", "high"))
        said = f"at {row['macs_fraction']:.3f} and {row['one_price_macs_fraction']:.3f} of the MACs"
        print(f"all prices less {row['policy']}, {said}: {gain} [{low}, {high}]  {verdict(row)}")


def draw(result: dict[str, Any], path: Path) -> None:
    """The fronts, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dynrl.scripts.common import save_picture
    from dynrl.scripts.evaluate import MARKERS
    from dynrl.tasks import TASKS

    task = TASKS[result["metric"]]
    figure, axis = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    for name, front in result["fronts"].items():
        columns = zip(front["macs_fraction"], front["metric"], front["std"], strict=True)
        rows = [row for row in columns if row[0] is not None]
        if not rows:
            continue
        xs, ys, spread = zip(*rows, strict=True)
        if name == "dense":
            axis.axhline(task.factor * ys[0], color="grey", linewidth=0.8, label="dense")
        else:
            axis.errorbar(
                xs, [task.factor * y for y in ys], yerr=[task.factor * s for s in spread],
                fmt=MARKERS.get(name, "x-."), label=name, capsize=2,
            )  # fmt: skip
    axis.set(xlabel="MACs, share of the dense network's", ylabel=f"test {task.heading}", yscale=task.axis)
    axis.set_title(f"{result['decision']} on {result['data']}")
    axis.grid(alpha=0.3)
    axis.legend()
    save_picture(figure, path)


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("compare")
