"""Invariants 1 to 3 of the walk, on every registered backbone and on the toys."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynrl.backbones import END, CostTable, Point, State, Walk, choice_rates, load_backbone, merge
from dynrl.backbones.skip import Skipping
from dynrl.ops.costs import COSTS
from dynrl.ops.move import each
from dynrl.policies import PolicySpec, StepSight
from dynrl.routes import draw_routes
from tests.cases import BACKBONES, BUILT, EXAMPLES, GATED, HELD, REGISTERED, make_backbone, trained
from tests.ops_cases import COMPACT
from tests.toys import Branching, Exiting, Looping, Roundabout

ROWS = 9


def inputs_for(backbone, rows=ROWS):
    return backbone.random_inputs(rows)


def random_routes(backbone, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, backbone.num_choices, (rows, backbone.columns), generator=generator)


def step_by_step(backbone, inputs, route):
    """Each row alone, one advance at a time."""
    outputs, macs = [], []
    for row, actions in zip(inputs, route, strict=True):
        state = backbone.begin(row.unsqueeze(0))
        while state.point != END:
            (state,) = backbone.advance(state, state.along(actions.unsqueeze(0)))
        outputs.append(backbone.output(state)[0])
        macs.append(state.walk.macs[0])
    return torch.stack(outputs), torch.stack(macs)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_step_by_step_is_whole_walk_is_compacted_walk_is_gated_walk(name):
    backbone = make_backbone(name)
    for seed in range(4):
        inputs, route = inputs_for(backbone), random_routes(backbone, seed=seed)
        alone, macs = step_by_step(backbone, inputs, route)
        walk = backbone.run_route(inputs.clone(), route)
        torch.testing.assert_close(walk.outputs, alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(walk.macs, macs)
        if backbone.gates:
            gates = F.one_hot(route, backbone.num_choices).float()
            torch.testing.assert_close(backbone(inputs.clone(), gates), alone, atol=1e-5, rtol=1e-5)
        # What ran is written down: walking along it again changes nothing.
        again = backbone.run_route(inputs.clone(), walk.route.clamp_min(0))
        assert torch.equal(again.route, walk.route)
        assert torch.equal(walk.steps, (walk.route >= 0).sum(1))


@pytest.mark.parametrize("name", [*BACKBONES, *HELD])
@torch.no_grad()
def test_inference_copy_gives_the_same_and_leaves_the_original(name):
    backbone = make_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    inputs, route = inputs_for(backbone), random_routes(backbone)
    fast, expected = backbone.for_inference(), backbone(inputs, route)
    for copied in (fast, fast.for_inference()):  # what was plugged may be plugged again
        torch.testing.assert_close(copied(inputs.clone(), route), expected, atol=1e-4, rtol=1e-4)
        assert not any(p.requires_grad for p in copied.parameters())
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", [*BACKBONES, *HELD])
def test_the_whole_pass_is_the_full_route_of_copies_of_copies_too(name):
    backbone = trained(make_backbone(name)).requires_grad_(False)
    inputs = inputs_for(backbone)
    expected, fast = backbone(inputs.clone()), backbone.for_inference()
    for network in (backbone, fast, fast.for_inference()):
        for gradients in (False, True):  # policies may learn by gradients on a frozen network
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(network.whole(inputs.clone()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*BACKBONES, *HELD])
@torch.no_grad()
def test_inference_copies_run_in_bfloat16(name):
    backbone = make_backbone(name)
    inputs, route = inputs_for(backbone), random_routes(backbone)
    expected, fast = backbone(inputs.clone(), route), backbone.for_inference().to(torch.bfloat16)
    outputs = fast(inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs, route)
    assert outputs.dtype is torch.bfloat16
    torch.testing.assert_close(outputs.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["expert", "hidden-update", "hidden update of an LSTM", "jump"])
@torch.no_grad()
def test_weights_of_an_inference_copy_stay_column_by_column(name):
    backbone = make_backbone(name)
    twin = backbone.for_inference()
    moved = copy.deepcopy(twin).to(torch.float64)
    fresh = make_backbone(name).for_inference()
    fresh.load_state_dict(twin.state_dict())
    inputs, route = inputs_for(backbone), random_routes(backbone)
    expected = backbone.run_route(inputs.clone(), route).outputs
    for frozen in (twin, moved, fresh):
        matrices = [p for n, p in frozen.named_parameters() if n.startswith(("layers", "gru", "lstm")) and p.dim() == 2]
        assert matrices and all(p.t().is_contiguous() for p in matrices)
        given = inputs.to(matrices[0].dtype) if inputs.is_floating_point() else inputs
        outputs = frozen.run_route(given, route).outputs
        torch.testing.assert_close(outputs.float(), expected, atol=1e-4, rtol=1e-4)
    assert all(p.is_contiguous() for p in backbone.parameters())


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_full_route_is_dense(name):
    backbone = make_backbone(name)
    inputs = inputs_for(backbone)
    walk = backbone.run_route(inputs.clone(), backbone.dense_actions(ROWS))
    torch.testing.assert_close(backbone(inputs), walk.outputs)
    assert (walk.macs == backbone.dense_macs).all()


def looked_at(backbone, state):
    """The state, after its features were observed, as a router does: what routers alone see is charged, too."""
    backbone.observe(state)
    return state


@pytest.mark.parametrize("name", [*BACKBONES, *HELD])
@torch.no_grad()
def test_reported_macs_are_the_executed_ones(name):
    backbone = make_backbone(name)
    for seed in range(3):
        inputs, route = inputs_for(backbone), random_routes(backbone, seed=seed)
        with COSTS.assuming(**COMPACT), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            walk = backbone.run(inputs, lambda state: looked_at(backbone, state).along(route))  # noqa: B023 (runs now)
        assert counter.get_total_flops() == 2 * int(walk.macs.sum())
        assert all(flops > 0 for flops in counter.get_flop_counts()["Global"].values())


def counted(function):
    """The MACs that a function executes, and what it returns."""
    with COSTS.assuming(**COMPACT), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        returned = function()
    return counter.get_total_flops() // 2, returned


@pytest.mark.parametrize("name", BUILT)
@torch.no_grad()
def test_the_ideal_executes_what_the_walk_does_but_for_what_decides(name):
    backbone, deciding = make_backbone(name), []
    for module, layer in backbone.named_modules():
        if {"scorers", "routers"} & {*module.split(".")} and isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, _, said: deciding.append(said.numel() * layer.in_features))
    for rows in (1, 2, ROWS):
        inputs, route = inputs_for(backbone, rows), random_routes(backbone, rows)
        backbone.run_route(inputs.clone(), route)  # a block held in its module is tried out when it first runs
        deciding.clear()
        macs, walk = counted(lambda: backbone.run_route(inputs.clone(), route))  # noqa: B023 (runs now)
        needed = macs - sum(deciding)
        assert counted(backbone.ideal(inputs.clone(), walk.route))[0] == needed


def columns_of(state):
    """[n], the column of each row's next decision."""
    column = state.column
    return torch.full_like(state.rows, column) if isinstance(column, int) else column


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_gated_walk_shows_and_charges_what_the_compacted_one_does(name):
    backbone = make_backbone(name)
    sight = StepSight.of(backbone)
    for seed in range(4):
        inputs, route = inputs_for(backbone), random_routes(backbone, seed=seed)
        price, met = torch.rand(ROWS), {}

        def act(state, route=route, price=price, met=met):
            view, columns = sight.see(backbone, state, price), columns_of(state)
            met.update({(int(row), int(columns[i])): view[i] for i, row in enumerate(state.rows)})
            return state.along(route)

        def gate(state, route=route, price=price, met=met):
            view, columns = sight.see(backbone, state, price), columns_of(state)
            for row in state.walk.present.nonzero().flatten().tolist():
                expected = met.pop((row, int(columns[row])))
                torch.testing.assert_close(view[row], expected, atol=1e-5, rtol=1e-5)
            return F.one_hot(state.along(route), backbone.num_choices).float()

        walk, gated = backbone.run(inputs.clone(), act), backbone.gated(inputs.clone(), gate)
        assert not met, "the gated walk missed decisions that the compacted one met"
        torch.testing.assert_close(gated.outputs, walk.outputs, atol=1e-5, rtol=1e-5)
        for field in ("route", "steps", "macs", "last"):
            assert torch.equal(getattr(gated, field), getattr(walk, field)), field
        torch.testing.assert_close(gated.expected_macs, walk.macs.float())


@pytest.mark.parametrize("name", GATED)
def test_gates_carry_gradients(name):
    backbone = make_backbone(name)
    gates = F.one_hot(random_routes(backbone), backbone.num_choices).float().requires_grad_()
    backbone(inputs_for(backbone), gates).square().sum().backward()
    assert torch.isfinite(gates.grad).all()
    assert gates.grad.abs().sum() > 0


@pytest.mark.parametrize("name", GATED)
def test_a_router_learns_through_its_gates(name):
    backbone = make_backbone(name).requires_grad_(False)
    router = PolicySpec.of("sequential", backbone, (0.01, 1.0), hidden=64).build()
    logits_at = router.logits_on(backbone, 0.1)
    walk = backbone.gated(inputs_for(backbone), lambda state: logits_at(state).softmax(1))
    for goal in (walk.outputs.square().sum(), walk.expected_macs.sum()):
        found = torch.autograd.grad(goal, list(router.parameters()), retain_graph=True)
        assert all(torch.isfinite(g).all() for g in found)
        assert all(g.abs().sum() > 0 for g in found)


def every_route(backbone, gates):
    """Each route with its probability [B], if choices are drawn independently by `gates` [B, T, n]."""
    for route in product(range(backbone.num_choices), repeat=backbone.columns):
        yield torch.tensor(route), gates[:, range(backbone.columns), route].prod(1)


@pytest.mark.parametrize("name", ["exiting", "looping"])
@torch.no_grad()
def test_a_gated_walk_that_rows_leave_is_the_mean_over_routes(name):
    backbone = make_backbone(name)
    inputs, gates = inputs_for(backbone), torch.randn(ROWS, backbone.columns, 2).mul(2).softmax(2)
    walks = [(p, backbone.run_route(inputs, r.expand(ROWS, -1))) for r, p in every_route(backbone, gates)]
    walk = backbone.gated(inputs, lambda state: state.along(gates))
    torch.testing.assert_close(walk.outputs, sum(p.unsqueeze(1) * w.outputs for p, w in walks))
    torch.testing.assert_close(walk.expected_macs, sum(p * w.macs for p, w in walks))
    torch.testing.assert_close(backbone(inputs, gates), walk.outputs)
    likeliest = backbone.run_route(inputs, gates.argmax(2))
    assert torch.equal(walk.route, likeliest.route)
    assert torch.equal(walk.macs, likeliest.macs)


def test_gates_of_another_width_are_refused():
    backbone = make_backbone("skip")
    with pytest.raises(ValueError, match=r"expected gates of shape \(9, 2\), got \(9, 3\)"):
        backbone.gated(inputs_for(backbone), lambda state: torch.ones(ROWS, 3))


@pytest.mark.parametrize("name", BUILT)
def test_compacted_walk_trains_every_parameter_it_ran(name):
    backbone = make_backbone(name).train()
    routes = draw_routes(backbone.thrift, torch.full((16,), 0.7))
    _, answers = backbone.run_training(inputs_for(backbone, 16), lambda state: state.along(routes))
    torch.stack([answer.output.square().sum() for answer in answers]).sum().backward()
    missing = [n for n, p in backbone.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


@pytest.mark.parametrize("name", [name for name, backbone in EXAMPLES.items() if backbone.decision == "skip"])
def test_early_answers_are_those_of_rows_that_skip_all_that_follows(name):
    backbone = make_backbone(name)
    inputs, route = inputs_for(backbone), random_routes(backbone)
    walk, answers = backbone.run_training(inputs.clone(), lambda state: state.along(route))
    whole = backbone.run_route(inputs.clone(), route)
    assert torch.equal(walk.route, route) and torch.equal(walk.macs, whole.macs)  # nothing else is recorded
    torch.testing.assert_close(walk.outputs, whole.outputs)
    points = [point for point, given in enumerate(backbone._early) if given]
    assert len(backbone.points) - 1 in points
    for point, early in zip(points, answers[-len(points) :], strict=True):
        kept = torch.arange(backbone.columns) < point
        torch.testing.assert_close(early.output, backbone.run_route(inputs.clone(), route * kept).outputs)
        assert early.weight == Skipping.auxiliary_weight / len(backbone.points)


@pytest.mark.parametrize("name", [name for name in BUILT if name in GATED])
def test_compacted_walk_and_gated_walk_have_the_same_gradients(name):
    backbone = make_backbone(name)  # eval mode: batch statistics would differ between fewer and all rows
    inputs, route = inputs_for(backbone), random_routes(backbone)
    backbone(inputs, route).square().sum().backward()
    compacted = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    backbone(inputs, F.one_hot(route, backbone.num_choices).float()).square().sum().backward()
    weighed = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}  # not what routers alone see
    assert compacted.keys() <= weighed.keys()
    for n, grad in weighed.items():
        # Choices that no row took: the compacted walk never met them, the gated one weighs them by 0.
        torch.testing.assert_close(compacted.get(n, torch.zeros_like(grad)), grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_copy_is_a_walk_of_its_own(name):
    backbone = make_backbone(name)
    inputs = inputs_for(backbone)
    route = random_routes(backbone)
    state = backbone.begin(inputs.clone())
    twin = state.copy()
    for reached in backbone.advance(state, state.along(route)):  # some rows run, some do not: x is written in place
        assert reached.walk is state.walk
    fresh = backbone.begin(inputs.clone())
    for field in ("inputs", "steps", "macs", "route", "last"):
        assert torch.equal(getattr(twin.walk, field), getattr(fresh.walk, field)), field
    each(torch.testing.assert_close, twin.features, fresh.features)
    assert not torch.equal(state.walk.route, twin.walk.route)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_observe_changes_nothing(name):
    backbone = make_backbone(name)
    state = backbone.begin(inputs_for(backbone))
    features = each(torch.clone, state.features)
    first = backbone.observe(state)
    assert first.dtype is torch.float32
    assert first.shape[1] <= backbone.feature_width
    if backbone.suggested:  # they are the last features, and the last choices
        assert first.shape[1] == backbone.feature_width and backbone.suggested <= backbone.num_choices
    first.zero_()
    each(torch.testing.assert_close, state.features, features)


def test_rows_that_part_meet_again_in_one_state():
    backbone = Branching().eval()
    state = backbone.begin(torch.randn(6, 4))
    reached = merge(backbone.advance(state, torch.tensor([0, 1, 0, 1, 1, 0])))
    assert {point: s.rows.tolist() for point, s in reached.items()} == {2: [0, 2, 5], 1: [1, 3, 4]}
    detour = backbone.advance(reached.pop(1), torch.ones(3, dtype=torch.int64))
    together = merge([*reached.values(), *detour])
    assert together[2].rows.tolist() == [0, 2, 5, 1, 3, 4]
    assert state.walk.steps.tolist() == [1, 2, 1, 2, 2, 1]


def test_rates_are_of_the_point_where_a_choice_was_made():
    backbone = Branching().eval()
    # Two rows take the short cut and run the last layer, one takes a detour and leaves both layers out.
    walk = backbone.run_route(torch.randn(3, 4), torch.tensor([[0, 1, 1], [0, 1, 1], [2, 0, 0]]))
    assert walk.route.tolist() == [[0, -1, 1], [0, -1, 1], [2, 0, 0]]
    rates = choice_rates(backbone.points, walk.route)
    assert rates == pytest.approx({"way/1": 0, "way/2": 1 / 3, "detour": 0, "last": 2 / 3})


def test_a_loop_behind_a_branch_has_a_column_for_each_visit():
    backbone = Roundabout().eval()
    route = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    walk = backbone.run_route(torch.randn(4, 4), route)
    assert walk.route.tolist() == [[0, -1, -1, -1, 1], [1, 1, 0, -1, 0], [1, 1, 1, 1, 1], [1, 0, -1, -1, 0]]
    assert walk.steps.tolist() == [2, 4, 5, 3]
    rates = choice_rates(backbone.points, walk.route)
    assert rates == pytest.approx({"way": 3 / 4, "round": 4 / 6, "last": 2 / 4})


def test_one_bill_in_the_units_of_the_table_holds_what_a_family_charges_itself():
    backbone = Roundabout().eval()
    table = backbone.time_table({"start": 1.0, "choices": [[1.0, 2.0], [0.5, 3.0], [1.0, 4.0]]})
    assert table.dense == pytest.approx((1 + 2 + 3 * 3 + 4) * 136 / 88)  # 48 of 136 MACs are not in the tables
    route, inputs = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 0, 0]]), torch.randn(2, 4)
    state = backbone.begin(inputs, table=table)
    walk, pending = state.walk, {0: state}
    while pending:
        state = pending.pop(min(pending))
        pending = merge([*pending.values(), *backbone.advance(state, state.along(route))])
        pending.pop(END, None)
    # The second round applies the cell once more than the table knows: 16 MACs at the dense network's speed.
    extra = 16 * table.dense / backbone.dense_macs
    torch.testing.assert_close(walk.bill, torch.tensor([1 + 1 + 4, 1 + 2 + 3 + 3 + extra + 0.5 + 1]))
    assert torch.equal(walk.macs, backbone.run_route(inputs, route).macs)


def test_rows_at_different_points_are_recorded_at_once_as_they_are_one_point_after_the_other():
    points, drawn = [Point("a", 2), Point("b", 3), Point("c", 2)], torch.Generator().manual_seed(0)
    macs = CostTable(5.0, torch.tensor([[1, 2, -1], [3, 5, 8], [13, 21, -1]]), 60.0)
    times = CostTable(0.5, torch.rand(3, 3, generator=drawn), 7.0)
    both = [Walk(torch.zeros(16, 1), points, macs, times) for _ in range(2)]
    for _ in range(5):
        at = torch.randint(END, 3, (16,), generator=drawn)
        action = torch.randint(0, 2, (16,), generator=drawn) + (at == 1)
        both[0].decided_apart(at, action)
        for point in range(3):
            rows = (at == point).nonzero().squeeze(1)
            both[1].decided(State(both[1], point, rows), action[rows])
        assert all(map(torch.equal, *(walk.records for walk in both)))


def test_bad_times_are_refused():
    backbone = Exiting().eval()
    for times in ({"start": 1.0}, {"start": 1.0, "choices": [[1.0], [1.0, 2.0]]}, {"start": "x", "choices": []}):
        with pytest.raises(ValueError, match="expected times 'start' and 'choices'"):
            backbone.time_table(times)
    for start, ms in ((0.0, 1.0), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="at least 0 milliseconds"):
            backbone.time_table({"start": start, "choices": [[ms, 1.0], [1.0, 1.0]]})


def test_closed_choices_run_as_the_nearest_open_one():
    backbone = Looping().eval()
    walk = backbone.run_route(torch.randn(3, 4), torch.ones(3, 3, dtype=torch.int64))
    assert walk.route.tolist() == [[1, 1, 0]] * 3
    assert (walk.macs == backbone.dense_macs).all()


def test_early_ends_leave_the_rest_of_the_route_open():
    backbone = Exiting().eval()
    walk = backbone.run_route(torch.randn(3, 4), torch.tensor([[1, 0], [0, 1], [0, 0]]))
    assert walk.route.tolist() == [[1, -1], [0, 1], [0, 0]]
    assert walk.macs.tolist() == [24, 48, 72]


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_refilled_slots_start_afresh(name):
    backbone = make_backbone(name)
    walk = backbone.run_route(inputs_for(backbone), random_routes(backbone))
    kept = walk.outputs.clone()
    rows, inputs = torch.tensor([5, 1]), inputs_for(backbone, 2)
    state = backbone.begin(inputs, walk, rows)
    fresh = backbone.begin(inputs.clone())
    torch.testing.assert_close(backbone.observe(state), backbone.observe(fresh))
    assert torch.equal(walk.macs[rows], fresh.walk.macs)
    assert (walk.route[rows] == -1).all()
    others = [i for i in range(ROWS) if i not in (1, 5)]
    torch.testing.assert_close(walk.outputs[others], kept[others])


def test_outputs_handed_out_stay_as_they_were():
    walk = Walk(torch.zeros(4, 1), [Point("only", 2)], CostTable(0, torch.tensor([[0, 1]]), 1))
    walk.put_output(torch.tensor([0, 1]), torch.ones(2, 3))
    handed = walk.outputs
    walk.put_output(torch.tensor([1, 2]), torch.full((2, 3), 7.0))
    assert handed[1].tolist() == [1, 1, 1]
    assert walk.outputs[:, 0].tolist() == [1, 7, 7, 0]


@pytest.mark.parametrize("name", REGISTERED)
def test_files_bring_a_backbone_back(name, tmp_path):
    backbone = make_backbone(name)
    backbone.save(tmp_path / "b.safetensors", note="x")
    loaded, notes = load_backbone(tmp_path / "b.safetensors")
    assert notes == {"note": "x"}
    assert loaded.fingerprint() == backbone.fingerprint()
    inputs, route = inputs_for(backbone), random_routes(backbone)
    assert torch.equal(loaded(inputs, route), backbone(inputs, route))


def test_bad_routes_are_refused():
    backbone = make_backbone("skip")
    inputs = inputs_for(backbone)
    with pytest.raises(ValueError, match="expected integer actions of shape"):
        backbone(inputs, torch.zeros(ROWS, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected actions in 0\.\.1"):
        backbone(inputs, torch.full((ROWS, backbone.max_steps), 2))
    with pytest.raises(ValueError, match="expected gates of shape"):
        backbone(inputs, torch.zeros(ROWS, backbone.max_steps))
