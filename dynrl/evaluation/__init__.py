"""This package measures routed models: scores, calibration, rivals, how sure differences are, and reports."""

from dynrl.evaluation.attacks import attack, attack_text
from dynrl.evaluation.calibration import calibrate, calibrate_latency, collapse, is_deaf
from dynrl.evaluation.comparison import COMPARED, compare, comparison_text
from dynrl.evaluation.contenders import (
    BUDGETS,
    Constant,
    Contender,
    Dense,
    Ground,
    Learned,
    Oracle,
    Plain,
    Random,
    Reached,
    Ruled,
    Smaller,
    Static,
    rivals,
)
from dynrl.evaluation.difficulty import by_difficulty, spearman
from dynrl.evaluation.intervals import Front, area, differences, paired, verdict
from dynrl.evaluation.prices import find_price_range
from dynrl.evaluation.report import evaluate, measure, report_text
from dynrl.evaluation.routes import (
    ORACLE_PRICE,
    affordable,
    cheapest_choices,
    measured_routes,
    oracle_candidates,
    oracle_routes,
    random_rate,
    spaced_routes,
    static_routes,
    static_tries,
)
from dynrl.evaluation.rules import RULES, rules_of
from dynrl.evaluation.scores import Score, Usage, Walked, score, score_routes, score_rows
from dynrl.evaluation.timing import captured, dense_sides, medians_in_turn, step_times

__all__ = [
    "BUDGETS", "COMPARED", "ORACLE_PRICE", "RULES", "Constant", "Contender", "Dense", "Front", "Ground", "Learned",
    "Oracle", "Plain", "Random", "Reached", "Ruled", "Score", "Smaller", "Static", "Usage", "Walked", "affordable",
    "area", "attack", "attack_text", "by_difficulty", "calibrate", "calibrate_latency", "captured",
    "cheapest_choices", "collapse", "compare", "comparison_text", "dense_sides", "differences", "evaluate",
    "find_price_range", "is_deaf", "measure", "measured_routes", "medians_in_turn", "oracle_candidates",
    "oracle_routes", "paired", "random_rate", "report_text", "rivals", "rules_of", "score", "score_routes",
    "score_rows", "spaced_routes", "spearman", "static_routes", "static_tries", "step_times", "verdict",
]  # fmt: skip
