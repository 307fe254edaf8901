"""Rules of thumb that a decision is known for are fitted on validation data and compared with learned policies.

`RULES` holds the rules by name, and `Backbone.rule` names the one that a family is known for. A plugin adds a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from dynrl.backbones import Backbone, NeuralTree
from dynrl.evaluation.by_task import tables
from dynrl.evaluation.cascades import cascades
from dynrl.evaluation.layouts import layouts
from dynrl.evaluation.looking import looking
from dynrl.evaluation.routes import Fit
from dynrl.evaluation.thresholds import fit_score, thresholds


def trees(backbone: Backbone) -> dict[str, Fit]:
    """Return the threshold on routers, and of a forest one on the vote of paths that the trees' own routers prefer."""
    assert isinstance(backbone, NeuralTree), "the rules are those of its family"
    rules = thresholds(backbone)
    if backbone.config["forest"] > 1:
        (_, paths), *_ = backbone.constant_routes()
        rules["threshold vote"] = partial(fit_score, name="router", unsure=paths)
    return rules


# Each entry maps a backbone to the rules to fit, by the names that reports show.
RULES: dict[str, Callable[[Backbone], Mapping[str, Fit]]] = {
    "threshold": thresholds,
    "trees": trees,
    "cascade": cascades,
    "looks": looking,
    "table": tables,
    "layouts": layouts,
}


def rules_of(backbone: Backbone) -> Mapping[str, Fit]:
    """Return the rules that the backbone's family is known for; there are none if it names none."""
    if backbone.rule is None:
        return {}
    if backbone.rule not in RULES:
        raise ValueError(
            f"{type(backbone).__name__} asks for the rule {backbone.rule!r}; expected one of {sorted(RULES)}. "
            "Add yours to dynrl.evaluation.RULES"
        )
    return RULES[backbone.rule](backbone)
