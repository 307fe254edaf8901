"""`dynrl bench model` measures whole routed networks against dense ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.backbones import FAMILIES, Backbone, ExitModule, SkipModule, State
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel, load
from dynrl.evaluation import captured, dense_sides, medians_in_turn, random_rate
from dynrl.policies import LearnedPolicy, Policy, PolicySpec, RandomPolicy
from dynrl.runs import RunFolder
from dynrl.scripts.bench import Keep, forget


@dataclass(frozen=True)
class Network:
    """A network to measure is one of ours, or one that another package makes.

    Attributes:
        batches: the batch sizes on a CPU; without any, the network is left out there unless it is asked for.
        settings: the arguments of the backbone, without `module`.
        family: the backbone's name in `FAMILIES`, or its class.
        router_hidden: the router's hidden units.
        cuda: the batch sizes on a CUDA device.
        module: the function of another package that makes the network, such as "timm.create_model", and the name that
            it is given; None for one of ours.
    """

    batches: tuple[int, ...]
    settings: dict[str, Any]
    family: str | type[Backbone] = "skip_resnet"
    router_hidden: int = 64
    cuda: tuple[int, ...] = ()
    module: tuple[str, str] | None = None

    @property
    def missing(self) -> str | None:
        """The package that the network needs and that is not installed here, if there is one."""
        package = None if self.module is None else self.module[0].partition(".")[0]
        return None if package is None or find_spec(package) else package

    def build(self) -> Backbone:
        """Build the backbone with random weights."""
        kind = FAMILIES[self.family] if isinstance(self.family, str) else self.family
        if self.module is None:
            return kind(**self.settings)
        package, _, function = self.module[0].rpartition(".")
        return kind(getattr(import_module(package), function)(self.module[1]), **self.settings)

    def sizes(self, device: str) -> tuple[int, ...]:
        """Return the batch sizes on this device."""
        return self.cuda if torch.device(device).type == "cuda" else self.batches


def _numbered(**counts: int) -> list[str]:
    """Return the names of so many parts of each layer, such as a.0 and a.1."""
    return [f"{layer}.{i}" for layer, count in counts.items() for i in range(count)]


IMAGES = (3, 224, 224)
CONVNEXT = {"features.1": 3, "features.3": 3, "features.5": 9, "features.7": 3}  # all blocks keep their input's shape
NETWORKS = {
    "resnet20 32x32": Network(
        (1, 8, 64, 256), {"input_shape": (3, 32, 32), "layers": (3, 3, 3), "widths": (16, 32, 64)}, cuda=(256, 64)
    ),
    "resnet110 32x32": Network((256,), {"input_shape": (3, 32, 32), "layers": (18, 18, 18), "widths": (16, 32, 64)}),
    "resnet50 224x224": Network(
        (1, 8, 64),
        {
            "input_shape": IMAGES, "classes": 1000, "block": "bottleneck", "layers": (3, 4, 6, 3),
            "widths": (64, 128, 256, 512), "stem": "imagenet",
        },
        cuda=(256, 64),
    ),
    "token vit 224x224": Network(
        (8, 64),
        {
            "input_shape": IMAGES, "classes": 1000, "patch": 16, "width": 384, "depth": 12, "heads": 6,
            "hidden": 1536,
        },
        "token_vit",
    ),
    "gru256 50 steps": Network((64, 256), {"input_shape": (50, 2), "classes": 1, "hidden": 256}, "skip_gru", 0),
    "gru256 in parts 50 steps": Network(
        (64, 256), {"input_shape": (50, 2), "classes": 1, "hidden": 256, "shares": (0.0, 0.25, 0.5, 1.0)}, "skip_gru", 0
    ),
    "gru512 50 steps": Network((64, 256), {"input_shape": (50, 2), "classes": 1, "hidden": 512}, "skip_gru", 0),
    "gru512 in parts 50 steps": Network(
        (64, 256), {"input_shape": (50, 2), "classes": 1, "hidden": 512, "shares": (0.0, 0.25, 0.5, 1.0)}, "skip_gru", 0
    ),
    "timm vit_b16 224x224": Network(
        (), {"input_shape": IMAGES, "blocks": _numbered(blocks=12)}, SkipModule, cuda=(256, 32),
        module=("timm.create_model", "vit_base_patch16_224"),
    ),
    "torchvision convnext_t 224x224": Network(
        (), {"input_shape": IMAGES, "blocks": _numbered(**CONVNEXT)}, SkipModule, cuda=(128,),
        module=("torchvision.models.get_model", "convnext_tiny"),
    ),
    "torchvision resnet50 224x224, exits": Network(
        (), {"input_shape": IMAGES, "layers": ["layer1", "layer2", "layer3"]}, ExitModule, cuda=(256,),
        module=("torchvision.models.get_model", "resnet50"),
    ),
}  # fmt: skip


# The sides that are CUDA graphs, besides those of the dense network, of which the fastest counts.
GRAPHS = ("captured_ideal", "captured_routed", "captured_with_router", "replayed")


class _InVain(Policy):
    """This policy spends a router's time to decide, and then takes a given route."""

    route: Tensor

    def __init__(self, router: LearnedPolicy) -> None:
        super().__init__()
        self.router, self.sight, self.price_range = router, router.sight, router.price_range

    def forward(self, observation: Tensor) -> Tensor:
        """Return the router's logits, whose MACs are those of a look."""
        logits: Tensor = self.router(observation)
        return logits

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Ask the router, but follow `route` all the same."""
        decide = self.router.chooser(backbone, price)

        def forced(state: State) -> Tensor:
            decide(state)
            return state.along(self.route)

        return forced


def _half(network: Backbone, inputs: Tensor) -> float | None:
    """Return the rate at which random routes cost half of the MACs."""
    # cuDNN would make a plan for each number of rows that comes; some of its plans take a third of a second.
    with torch.backends.cudnn.flags(enabled=False):
        return random_rate(network, inputs, 0.5)


def _compiled(network: Backbone, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
    """Compile the dense network by torch's Inductor, which fails for some shapes."""
    torch._dynamo.reset()  # otherwise, shapes that it has seen before make it try dynamic ones
    run = torch.compile(network.ideal(inputs, route), dynamic=False)
    run()
    return run


def _asked(names: tuple[str, ...], device: str) -> dict[str, Network]:
    """Return the networks of these names; by default, those with batch sizes on this device whose packages are here."""
    unknown = set(names) - set(NETWORKS)
    if unknown:
        raise ValueError(f"unknown networks {sorted(unknown)}; expected some of {sorted(NETWORKS)}")
    for name in names:
        if package := NETWORKS[name].missing:
            raise ValueError(f"{name} is made by {package}, which is not installed here: pip install {package}")
    if names:
        return {name: NETWORKS[name] for name in names}
    found = {name: network for name, network in NETWORKS.items() if network.sizes(device)}
    for name, network in found.items():
        if network.missing:
            print(f"left out, as {network.missing} is missing: {name}", flush=True)
    return {name: network for name, network in found.items() if not network.missing}


def bench_model(
    device: str = "cpu", dtype: str = "float32", rounds: int = 15, networks: tuple[str, ...] = (),
    batches: tuple[int, ...] = (), runs: tuple[Path, ...] = (), keep: Keep = forget,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure networks of random weights on random routes at half the MACs, and learned policies from `runs`.

    Rows have the times of the dense network (the faster of both memory formats), of the compiled dense network, of the
    ideal, of the routed network on a given route, and of the routed network with its router. The router of random
    routes decides in vain; that of a run really decides.

    On a CUDA device nothing is compiled. Beside these times, which are of eager calls, rows have those of CUDA graphs:
    of the dense network and of the ideal, of `model(x)` once it replays (`replayed_ms`, with `way` and `recorded`, what
    the model reports of itself), and of the whole walk as one graph where the family can. What fails is named in
    `failed`, and the other sides are measured all the same.

    Args:
        keep: called with each row as soon as it is measured.
    """
    asked = _asked(networks, device)
    for run in runs:
        _ = RunFolder(run).config  # a folder that holds no run is refused before anything is measured
    kind, rows = getattr(torch, dtype), list[dict[str, Any]]()

    def measured(name: str, policy: str, row: dict[str, Any]) -> None:
        rows.append({"network": name, "policy": policy, **row, "device": device, "dtype": dtype})
        _show(rows[-1])
        keep(rows[-1])

    for name, network in asked.items():
        torch.manual_seed(0)
        backbone = network.build().eval().to(device, kind)
        spec = PolicySpec.of("sequential", backbone, (0.01, 1.0), network.router_hidden)
        policy, frozen = _InVain(spec.build()), backbone.for_inference()
        for batch in batches or network.sizes(device) or network.batches or network.cuda:
            inputs = torch.randn(batch, *backbone.input_shape, device=device, dtype=kind)
            with torch.inference_mode():
                # One input is enough: the cost of a route does not depend on it.
                rate = _half(frozen, inputs[:1].expand(64 if batch > 64 else 16, *inputs.shape[1:]))
            assert rate is not None, "each of these networks can do with half of its MACs"
            # A column's choices lie side by side, as those that a router makes do.
            policy.route = RandomPolicy(backbone.thrift, rate).route(inputs).t().contiguous().t()
            model = partial(RoutedModel, backbone, policy)
            measured(name, "random", _measure(model, inputs, policy.route, rounds))
    for run in runs:
        test = load_dataset(RunFolder(run).data).test
        for batch in batches or (256,):
            inputs = test.inputs[:batch].to(device, kind)
            model = partial(_at_half, run, device, kind)
            (plugged := model())(inputs)
            assert plugged.last_route is not None
            measured(str(run), "learned", _measure(model, inputs, plugged.last_route.actions, rounds))
    return rows


def _at_half(run: Path, device: str, dtype: torch.dtype) -> RoutedModel:
    """Load the model of a run, at half of the MACs."""
    model = load(run).to(device, dtype)
    model.set_budget(0.5)
    return model


@torch.inference_mode()
def _measure(make: Callable[[], RoutedModel], inputs: Tensor, route: Tensor, rounds: int) -> dict[str, Any]:
    """Time all sides of the model that `make` makes, and return the row."""
    model, device = make(), inputs.device
    backbone, taken = model.backbone, route.clamp_min(0)  # -1 marks columns where a row never was
    sides = dense_sides(backbone, inputs)
    if isinstance(module := getattr(backbone, "module", None), nn.Module):
        sides["dense as one module"] = partial(module, inputs)
    sides["ideal"] = backbone.ideal(inputs, route)
    sides["routed"] = lambda: backbone.run_route(inputs, taken)
    every, failed = {**sides, "with router": lambda: model(inputs)}, dict[str, str]()
    if device.type == "cuda":
        replayed = make()
        more = _in_graphs(model, replayed, inputs, route, sides)
    else:
        dense = backbone.dense_actions(len(inputs), device)
        more = {"compiled": lambda: _compiled(backbone, inputs, dense)}
    for name, side in more.items():
        try:
            every[name] = side()
        except Exception as error:  # the compiler and CUDA may raise anything
            failed[name] = f"{type(error).__name__}: {error}"[:400]
            print(f"{name} failed: {failed[name].splitlines()[0]}", flush=True)
    ms = medians_in_turn(every, rounds, wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    best = min(value for name, value in ms.items() if name.startswith("dense"))
    fraction = float(backbone.run_route(inputs, taken).macs.double().mean()) / backbone.dense_macs
    row = {
        "batch": len(inputs), "macs_fraction": fraction, "dense_ms": best, "compiled_ms": ms.get("compiled"),
        "ideal_ms": ms["ideal"], "routed_ms": ms["routed"], "with_router_ms": ms["with router"],
        "speedup": best / ms["routed"], "speedup_with_router": best / ms["with router"],
        "realised_ratio": ms["ideal"] / ms["routed"], "realised_ratio_with_router": ms["ideal"] / ms["with router"],
        "rounds": rounds,
    }  # fmt: skip
    if device.type == "cuda":
        row |= _graph_times(ms) | {"failed": failed} | _recorded(replayed)
    return row


def _in_graphs(
    model: RoutedModel, replayed: RoutedModel, inputs: Tensor, route: Tensor, sides: dict[str, Callable[[], Any]]
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return functions that record sides as CUDA graphs and return what replays them; `model` runs eagerly."""
    backbone, model.graphs.enabled = model.backbone, False

    def met() -> Callable[[], Any]:
        for _ in range(3):  # the first call runs, the second one records, the third one replays
            replayed(inputs)
        return lambda: replayed(inputs)

    found: dict[str, Callable[[], Callable[[], Any]]] = {
        f"captured {name}": partial(captured, side, 1) for name, side in sides.items() if name != "routed"
    }
    if "kernels" in backbone.captures:
        # `run_route` would look at the route's values, which a capture forbids.
        along = lambda: backbone.run(inputs, lambda state: state.along(route))  # noqa: E731
        found["captured routed"] = partial(captured, along, 1)
        found["captured with router"] = lambda: partial(model.capture(len(inputs)), inputs)
    return found | {"replayed": met}


def _graph_times(ms: dict[str, float]) -> dict[str, float | None]:
    """Return the times of the sides that are CUDA graphs, None for those that could not be recorded."""
    dense = min((value for name, value in ms.items() if name.startswith("captured dense")), default=None)
    others = {f"{name}_ms": ms.get(name.replace("_", " ")) for name in GRAPHS}
    return {"captured_dense_ms": dense} | others


def _recorded(replayed: RoutedModel) -> dict[str, Any]:
    """Return what a model says of its graphs: how it ran, with how many points by each way, and all of its report."""
    report = replayed.graphs.report()
    return {"way": ", ".join(map(_way, report)) or "eager", "recorded": report}


def _way(recorded: dict[str, Any]) -> str:
    by = Counter(point["by"] for point in recorded.get("points", ()) if "by" in point)
    return " ".join([recorded.get("way", "eager"), *(f"{count} {way}" for way, count in sorted(by.items()))])


def _show(row: dict[str, Any]) -> None:
    print(
        f"{row['network']:18} {row['policy']:8} batch {row['batch']:4} MACs {row['macs_fraction']:.2f} "
        f"dense {row['dense_ms']:8.2f} "
        f"compiled {row['compiled_ms'] or 0:8.2f} ideal {row['ideal_ms']:8.2f} routed {row['routed_ms']:8.2f} "
        f"({row['realised_ratio']:.3f}) with router {row['with_router_ms']:8.2f} "
        f"({row['realised_ratio_with_router']:.3f})",
        flush=True,
    )
    if "captured_dense_ms" in row:
        shown = [(side, row[f"{side}_ms"]) for side in ("captured_dense", *GRAPHS)]
        times = ", ".join(f"{side.replace('_', ' ')} {'-' if ms is None else f'{ms:.3f}'}" for side, ms in shown)
        print(f"    {times} ({row['way']})", flush=True)
