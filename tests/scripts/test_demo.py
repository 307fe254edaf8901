"""The demo's five rows are those of its budget, and the best of each kind."""

from dynrl.data import load_dataset
from dynrl.recipes import defaults
from dynrl.scripts import demo


def test_five_rows():
    def point(policy, budget, accuracy):
        return {"policy": policy, "budget": budget, "accuracy": accuracy}

    points = [
        point("learned", 0.5, 0.9), point("random", 0.5, 0.3), point("random", 0.8, 0.9),
        point("threshold margin", 0.5, 0.8), point("threshold entropy", 0.5, 0.7), point("static", 0.5, 0.97),
        point("smaller", 0.5, 0.6), point("plain 3 MMACs", None, 0.6),
    ]  # fmt: skip
    report = {"dense": {"accuracy": 0.95, "latency_ms": 3.0}, "points": points}
    found = [(name.split()[0], row["accuracy"]) for name, row in demo.rows(report)]
    assert found == [("dense", 0.95), ("learned,", 0.9), ("best", 0.8), ("plain", 0.6), ("random", 0.3)]


def test_the_plain_network_fits_the_budget():
    row = defaults(demo.DECISION, demo.DATA)
    data = load_dataset(demo.DATA)
    whole, half = (r.build(data, 0).dense_macs for r in (row, row.changed(demo.HALF)))
    assert 0.45 < half / whole <= demo.BUDGET
