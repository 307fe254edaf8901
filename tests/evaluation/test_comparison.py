"""Comparisons of what is given in memory; `dynrl compare` has its tests in tests/scripts."""

from __future__ import annotations

import pytest
import torch

import dynrl
from dynrl.deploy import SHIPPED, RoutedModel
from dynrl.evaluation import Dense, Front, Ground, Learned, differences
from dynrl.evaluation.comparison import _all_differences
from dynrl.evaluation.contenders import by_chance
from dynrl.runs import RunKind
from tests.cases import answered_by, make_backbone, make_policy


@pytest.mark.parametrize("budgets", [[0.5, 0.5], [50], [0.9, 0.3], [0.0, 0.5], []])
def test_budgets_that_are_no_rising_shares_are_refused(budgets):
    for call in (dynrl.compare, dynrl.evaluate):
        with pytest.raises(ValueError, match=r"expected budgets .* each once and rising, got \["):
            call([SHIPPED / "exit-digits"], budgets=budgets)


@torch.no_grad()
def test_parts_by_chance_are_paired_with_their_own_policies_seed_by_seed():
    backbone = make_backbone("tokens in place")
    ground = Ground(backbone, answered_by(backbone, 48))
    models = [RoutedModel(backbone, make_policy(backbone, start=[at]), [(0.01, 0.9), (1.0, 0.2)]) for at in (0, 1)]
    learned = Learned(RunKind(), models, ground)
    chance, dense = by_chance([learned], ground), Dense(ground, None, [learned])
    fronts = {of.name: Front.of(of, (0.5,), 48) for of in (learned, *chance)}
    (row,) = _all_differences(fronts, [learned], chance, dense, ground.task)
    apart, paired = (differences(*fronts.values(), ground.task, by_seed)["area"] for by_seed in (False, True))
    assert row["area"] == paired and paired["high"] < apart["high"]
