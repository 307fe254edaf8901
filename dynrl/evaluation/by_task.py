"""A rule of thumb for routing networks is a table: one route for each task, whatever the image shows."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.backbones import Backbone, RoutingNet
from dynrl.data import Split
from dynrl.evaluation.routes import FITTED, Fit, Found, PolicyFor, best_within
from dynrl.evaluation.scores import Walked, score_routes
from dynrl.policies import RoutePolicy

PRICES = (0.0, *(0.03 * 10 ** (i / 6) for i in range(16)))  # of the dense MACs, in units of the log-likelihood


class TablePolicy(RoutePolicy):
    """This policy gives each input the route of its task.

    Args:
        backbone: the backbone that the policy is for, which tells tasks.
        table: [tasks, columns], the routes.
    """

    table: Tensor

    def __init__(self, backbone: RoutingNet, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self._task = backbone.task

    def route(self, inputs: Tensor) -> Tensor:
        """Return each input's route: [B, columns]."""
        return self.table[self._task(inputs)]


def tables(backbone: Backbone) -> dict[str, Fit]:
    """Return the rule."""
    return {"table": fit_table}


@torch.inference_mode()
def fit_table(backbone: Backbone, split: Split) -> PolicyFor:
    """Search for the best route of each task at several prices; see `dynrl.evaluation.rules`.

    The search begins with what the network's own table prefers. At each price, from low to high, it tries every choice
    in every column, and each task keeps what earns it more. A budget gets the best of the tables within it.

    Source: Routing Networks (Rosenbaum et al. 2018, ICLR), where an agent for each task, which sees nothing but the
    layer, does best.
    """
    assert isinstance(backbone, RoutingNet), "the rule is that of its family"
    split, found = split.head(FITTED), list[Found]()
    task, table = backbone.task(split.inputs).cpu(), backbone.table.argmax(2).cpu()
    counts = torch.bincount(task, minlength=len(table)).clamp_min(1)

    def walked(table: Tensor) -> Walked:
        return score_routes(backbone, table[task].to(split.inputs.device), split)

    def earned(table: Tensor, price: float) -> Tensor:
        """Return what each task earns by its route, a mean over its rows: [tasks]."""
        rows = walked(table)
        return torch.zeros(len(table)).index_add(0, task, rows.likely - price * rows.macs) / counts

    for price in PRICES:
        best = earned(table, price)
        for column in range(backbone.columns):
            for choice in range(backbone.num_choices):
                tried = table.clone()
                tried[:, column] = choice
                got = earned(tried, price)
                table = torch.where((got > best).unsqueeze(1), tried, table)
                best = torch.maximum(got, best)
        rows, policy = walked(table), TablePolicy(backbone, table.to(split.inputs.device))
        found.append(Found(policy, float(rows.macs.mean()), split.task.mean(rows.metric, split.targets)))
    return best_within(found, split.task)
