"""`dynrl bench model` measures whole routed networks against dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones import FAMILIES, Backbone, State
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel, load
from dynrl.evaluation import captured, dense_sides, medians_in_turn, random_rate
from dynrl.policies import LearnedPolicy, Policy, PolicySpec, RandomPolicy
from dynrl.runs import RunFolder


@dataclass(frozen=True)
class Network:
    """A network to measure has batch sizes, the backbone's settings, and the router's hidden units."""

    batches: tuple[int, ...]
    settings: dict[str, Any]
    family: str = "skip_resnet"
    router_hidden: int = 64


NETWORKS = {
    "resnet20 32x32": Network(
        (1, 8, 64, 256), {"input_shape": (3, 32, 32), "layers": (3, 3, 3), "widths": (16, 32, 64)}
    ),
    "resnet110 32x32": Network((256,), {"input_shape": (3, 32, 32), "layers": (18, 18, 18), "widths": (16, 32, 64)}),
    "resnet50 224x224": Network(
        (1, 8, 64),
        {
            "input_shape": (3, 224, 224), "classes": 1000, "block": "bottleneck", "layers": (3, 4, 6, 3),
            "widths": (64, 128, 256, 512), "stem": "imagenet",
        },
    ),
    "token vit 224x224": Network(
        (8, 64),
        {
            "input_shape": (3, 224, 224), "classes": 1000, "patch": 16, "width": 384, "depth": 12, "heads": 6,
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
}  # fmt: skip


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


def _compiled(network: Backbone, inputs: Tensor, route: Tensor) -> Callable[[], Any] | None:
    """Compile the dense network by torch's Inductor; return None if it fails, as it does for some shapes."""
    torch._dynamo.reset()  # otherwise, shapes that it has seen before make it try dynamic ones
    run = torch.compile(network.ideal(inputs, route), dynamic=False)
    try:
        run()
    except Exception as error:  # the compiler may raise anything
        print(f"torch.compile failed on the dense network: {str(error).splitlines()[0]}", flush=True)
        return None
    return run


def bench_model(
    device: str = "cpu", dtype: str = "float32", rounds: int = 15, networks: tuple[str, ...] = (),
    batches: tuple[int, ...] = (), runs: tuple[Path, ...] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure networks of random weights on random routes at half the MACs, and learned policies from `runs`.

    Rows have the times of the dense network (the faster of both memory formats), of the compiled dense network, of the
    ideal, of the routed network on a given route, and of the routed network with its router. The router of random
    routes decides in vain; that of a run really decides.
    """
    unknown = set(networks) - set(NETWORKS)
    if unknown:
        raise ValueError(f"unknown networks {sorted(unknown)}; expected some of {sorted(NETWORKS)}")
    for run in runs:
        _ = RunFolder(run).config  # a folder that holds no run is refused before anything is measured
    rows = []
    for name in networks or NETWORKS:
        network = NETWORKS[name]
        torch.manual_seed(0)
        backbone = FAMILIES[network.family](**network.settings).eval().to(device, getattr(torch, dtype))
        spec = PolicySpec.of("sequential", backbone, (0.01, 1.0), network.router_hidden)
        model = RoutedModel(backbone, _InVain(spec.build()))
        for batch in batches or network.batches:
            inputs = torch.randn(batch, *backbone.input_shape, device=device, dtype=getattr(torch, dtype))
            with torch.inference_mode():
                count = 256 if batch > 64 else 16  # one input is enough: the cost of a route does not depend on it
                rate = random_rate(model.backbone, inputs[:1].expand(count, *inputs.shape[1:]), 0.5)
            assert rate is not None, "each of these networks can do with half of its MACs"
            model.policy.route = RandomPolicy(backbone.thrift, rate).route(inputs).to(device)
            rows.append({"network": name, "policy": "random", **_measure(model, inputs, model.policy.route, rounds)})
            _show(rows[-1])
    for run in runs:
        plugged = load(run).to(device, getattr(torch, dtype))
        plugged.set_budget(0.5)
        test = load_dataset(RunFolder(run).data).test
        for batch in batches or (256,):
            inputs = test.inputs[:batch].to(device, getattr(torch, dtype))
            plugged(inputs)
            assert plugged.last_route is not None
            route = plugged.last_route.actions
            rows.append({"network": str(run), "policy": "learned", **_measure(plugged, inputs, route, rounds)})
            _show(rows[-1])
    for row in rows:
        row |= {"device": device, "dtype": dtype}
    return rows


@torch.inference_mode()
def _measure(model: RoutedModel, inputs: Tensor, route: Tensor, rounds: int) -> dict[str, Any]:
    backbone, device = model.backbone, inputs.device
    taken = route.clamp_min(0)  # -1 marks columns where a row never was
    sides = dense_sides(backbone, inputs)
    run = _compiled(backbone, inputs, backbone.dense_actions(len(inputs), device))
    sides["ideal"] = backbone.ideal(inputs, route)
    sides["routed"] = lambda: backbone.run_route(inputs, taken)
    graphs = _captured(model, inputs, route, sides) if device.type == "cuda" and backbone.captures else {}
    compiled = {} if run is None else {"compiled": run}
    every = {**sides, **compiled, "with router": lambda: model(inputs), **graphs}
    ms = medians_in_turn(every, rounds, wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    dense = min(value for name, value in ms.items() if name.startswith("dense"))
    on_device = {}
    if graphs:
        on_device["captured_dense_ms"] = min(value for name, value in ms.items() if name.startswith("captured dense"))
        for name in ("ideal", "routed", "with router"):
            on_device[f"captured_{name.replace(' ', '_')}_ms"] = ms[f"captured {name}"]
    fraction = float(backbone.run_route(inputs, taken).macs.double().mean()) / backbone.dense_macs
    return {
        "batch": len(inputs), "macs_fraction": fraction, "dense_ms": dense, "compiled_ms": ms.get("compiled"),
        "ideal_ms": ms["ideal"], "routed_ms": ms["routed"], "with_router_ms": ms["with router"],
        "speedup": dense / ms["routed"], "speedup_with_router": dense / ms["with router"],
        "realised_ratio": ms["ideal"] / ms["routed"], "realised_ratio_with_router": ms["ideal"] / ms["with router"],
        "rounds": rounds, **on_device,
    }  # fmt: skip


def _captured(
    model: RoutedModel, inputs: Tensor, route: Tensor, sides: dict[str, Callable[[], Any]]
) -> dict[str, Callable[[], Any]]:
    """Capture all `sides` and the model with its router as CUDA graphs; there are none if the policy cannot be."""
    try:
        graph = model.capture(len(inputs))
    except ValueError:  # the policy gives whole routes
        return {}
    backbone = model.backbone
    # `run_route` would look at the route's values, which a capture forbids.
    alone = {**sides, "routed": lambda: backbone.run(inputs, lambda state: state.along(route))}
    graphs = {f"captured {name}": captured(side, 1) for name, side in alone.items()}
    return {**graphs, "captured with router": lambda: graph(inputs)}


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
        print(
            "    captured: " + ", ".join(f"{k[9:-3]} {v:.3f}" for k, v in row.items() if k.startswith("captured")),
            flush=True,
        )
