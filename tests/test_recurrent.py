"""The recurrent backbones against torch's own layers, and rows that stand at different steps."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import END, SkipGRU, SkipLSTM, merge
from dynrl.deploy import RoutedModel
from tests.cases import make_policy

STEPS, WIDTH, HIDDEN, ROWS = 7, 3, 20, 13


def backbone(kind=SkipGRU, **settings):
    return kind((STEPS, WIDTH), classes=4, hidden=HIDDEN, **settings).eval()


both = pytest.mark.parametrize("kind", [SkipGRU, SkipLSTM])


@both
def test_a_frozen_network_moves_as_torch_can_flatten_it(kind):
    """On CUDA, torch's layers flatten their weights when they move, which fails in another memory order."""
    network = backbone(kind).for_inference()
    before = network.rnn.weight_hh_l0.stride()
    moved = list[bool]()
    network._apply(lambda tensor: moved.append(tensor.is_contiguous()) or tensor.clone())
    assert len(moved) >= 6 and all(moved)
    assert before == network.rnn.weight_hh_l0.stride() != (HIDDEN, 1)


@both
@torch.no_grad()
def test_always_updating_is_torchs_layer_with_the_same_weights(kind):
    ours, theirs = backbone(kind), kind.layer(WIDTH, HIDDEN)
    ours.rnn.load_state_dict(theirs.state_dict())
    inputs = torch.randn(ROWS, STEPS, WIDTH)
    last = theirs(inputs.transpose(0, 1))[0][-1]
    expected = last @ ours.fc.weight.t() + ours.fc.bias
    for network in (ours, ours.for_inference()):
        torch.testing.assert_close(network(inputs), expected, atol=1e-5, rtol=0)
        for side in (network.ideal(inputs, network.dense_actions(ROWS)), *network.dense_twins(inputs).values()):
            torch.testing.assert_close(side(), expected, atol=1e-5, rtol=0)


@both
@torch.no_grad()
def test_updating_at_some_steps_is_torchs_layer_on_those_alone(kind):
    network, inputs = backbone(kind), torch.randn(ROWS, STEPS, WIDTH)
    route = torch.randint(0, 2, (ROWS, STEPS))
    route[:, 2] = 1
    outputs = network(inputs, route)
    for row, chosen, output in zip(inputs, route.bool(), outputs, strict=True):
        states, _ = network.rnn(row[chosen].unsqueeze(0))
        torch.testing.assert_close(network.fc(states[0, -1]), output, atol=1e-5, rtol=0)


@both
@torch.no_grad()
def test_updating_some_units_is_torchs_layer_of_these_alone(kind):
    network, inputs = backbone(kind, shares=(0, 0.25, 0.6, 1)), torch.randn(ROWS, STEPS, WIDTH)
    assert network.widths == (0, 5, 12, 20)
    for choice, width in enumerate(network.widths[1:], 1):
        alone = kind.layer(WIDTH, width, batch_first=True)
        for name, value in network.rnn.named_parameters():
            part = value.unflatten(0, (-1, HIDDEN))[:, :width].flatten(0, 1)
            alone.get_parameter(name).copy_(part[:, :width] if "weight_hh" in name else part)
        expected = alone(inputs)[0][:, -1] @ network.fc.weight[:, :width].t() + network.fc.bias
        route = torch.full((ROWS, STEPS), choice)
        for mine in (network, network.for_inference()):
            walk = mine.run_route(inputs, route)
            torch.testing.assert_close(walk.outputs, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.ideal(inputs, route)(), expected, atol=1e-5, rtol=0)
        counted = sum(part.numel() for name, part in alone.named_parameters() if "weight" in name)
        assert walk.macs.tolist() == [STEPS * counted + HIDDEN * 4] * ROWS


@torch.no_grad()
def test_never_updating_costs_the_head_only():
    network = backbone()
    walk = network.run_route(torch.randn(ROWS, STEPS, WIDTH), torch.zeros(ROWS, STEPS, dtype=torch.int64))
    assert walk.macs.tolist() == [HIDDEN * 4] * ROWS
    torch.testing.assert_close(walk.outputs, network.fc.bias.expand(ROWS, -1))


@both
@pytest.mark.parametrize("sees", ["state", "state+input"])
@torch.no_grad()
def test_rows_refilled_in_mid_batch_go_as_they_go_alone(sees, kind):
    network, inputs = backbone(kind, sees=sees), torch.randn(ROWS, STEPS, WIDTH)
    late, rows = torch.randn(3, STEPS, WIDTH), torch.tensor([8, 0, 5])
    route, late_route = torch.randint(0, 2, (ROWS, STEPS)), torch.randint(0, 2, (3, STEPS))
    alone = {i: network.begin(inputs[i : i + 1].clone()) for i in range(ROWS) if i not in rows}
    alone |= {row: network.begin(late[i : i + 1].clone()) for i, row in enumerate(rows.tolist())}
    actions = route.clone()
    actions[rows] = late_route
    state = network.begin(inputs)
    walk, ended = state.walk, {}
    for step in range(2):
        (state,) = network.advance(state, route[:, step])
    keep = torch.ones(ROWS, dtype=torch.bool)
    keep[rows] = False
    states = merge([state.where(keep[state.rows], 0), network.begin(late, walk, rows)])
    for row in keep.nonzero().flatten().tolist():
        for step in range(2):
            (alone[row],) = network.advance(alone[row], route[row, step : step + 1])
    while 0 in states:
        state = states[0]
        torch.testing.assert_close(
            network.observe(state), torch.cat([network.observe(alone[row]) for row in state.rows.tolist()])
        )
        taken = actions[state.rows, walk.steps[state.rows]]
        for row, action in zip(state.rows.tolist(), taken, strict=True):
            (alone[row],) = network.advance(alone[row], action.unsqueeze(0))
        states = merge(network.advance(state, taken))
        if END in states:
            ended |= {row: walk.outputs[row].clone() for row in states[END].rows.tolist()}
    assert len(ended) == ROWS
    for row, output in ended.items():
        torch.testing.assert_close(output, network.output(alone[row])[0], atol=1e-5, rtol=1e-5)
        assert walk.macs[row] == alone[row].walk.macs[0]


@both
@pytest.mark.parametrize("sees", ["state", "state+input"])
@torch.no_grad()
def test_what_is_seen(sees, kind):
    network, inputs = backbone(kind, sees=sees), torch.randn(2, STEPS, WIDTH)
    state = network.begin(inputs.clone())
    for action in ([1, 0], [0, 0], [1, 1], [0, 1]):
        (state,) = network.advance(state, torch.tensor(action))
    seen = network.observe(state)
    expected = network.feature_width
    states, time, since, rest = seen.split([network.state_width, STEPS, 1, WIDTH if sees == "state+input" else 0], 1)
    torch.testing.assert_close(states, state.features)
    torch.testing.assert_close(time, torch.eye(STEPS)[[4, 4]])  # fewer steps than knots: each has one of its own
    torch.testing.assert_close(since.squeeze(1) * STEPS, torch.tensor([1.0, 0.0]))
    assert sees == "state" or torch.equal(rest, inputs[:, 4])
    weight, start = torch.randn(expected, 3), torch.randn(2, 3)
    got = network.projector(weight)(state, start)
    torch.testing.assert_close(got, seen @ weight + start, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_time_since_the_last_update_is_told_of_each_part():
    network = backbone(shares=(0, 0.5, 0.75, 1))
    state = network.begin(torch.randn(2, STEPS, WIDTH))
    for action in ([3, 2], [2, 0], [1, 1]):
        (state,) = network.advance(state, torch.tensor(action))
    since = network.observe(state)[:, HIDDEN + STEPS :]
    torch.testing.assert_close(since * STEPS, torch.tensor([[0.0, 1, 2], [0, 2, 3]]))


@torch.no_grad()
def test_long_sequences_tell_the_time_by_hats_that_sum_to_one():
    network = SkipGRU((50, WIDTH), hidden=HIDDEN, knots=16)
    state, seen = network.begin(torch.randn(2, 50, WIDTH)), []
    while state.point != END:
        seen.append(network.observe(state)[0, HIDDEN : HIDDEN + 16])
        (state,) = network.advance(state, torch.tensor([1, 0]))
    time = torch.stack(seen)
    torch.testing.assert_close(time.sum(1), torch.ones(50))
    torch.testing.assert_close(time @ torch.arange(16).float(), torch.linspace(0, 15, 50))
    assert ((time > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("sees", ["state", "state+input"])
@torch.no_grad()
def test_a_gated_walk_is_shown_the_same(sees):
    network, inputs = backbone(sees=sees), torch.randn(ROWS, STEPS, WIDTH)
    route, shown = torch.randint(0, 2, (ROWS, STEPS)), {"run": [], "gated": []}

    def act(state):
        shown["run"].append(network.observe(state))
        return route[:, len(shown["run"]) - 1]

    def gate(state):
        shown["gated"].append(network.observe(state))
        return torch.nn.functional.one_hot(route[:, len(shown["gated"]) - 1], 2).float()

    network.run(inputs.clone(), act)
    network.gated(inputs.clone(), gate)
    torch.testing.assert_close(torch.stack(shown["gated"]), torch.stack(shown["run"]))


@torch.no_grad()
def test_a_policy_that_sees_the_state_only_decides_before_the_input():
    """Changing what is never read, nor shown, changes nothing."""
    inputs = torch.randn(ROWS, STEPS, WIDTH)
    for sees in ("state", "state+input"):
        network = backbone(sees=sees)
        router = make_policy(network, (0.1, 1.0), hidden=0)
        router.head.weight[:, : network.feature_width].normal_()
        router.head.bias.zero_()
        model = RoutedModel(network, router)
        outputs, route = model(inputs), model.last_route.actions
        assert 0.05 < route.float().mean() < 0.95
        changed = torch.where((route == 1).unsqueeze(2), inputs, torch.randn_like(inputs) * 9)
        assert torch.equal(model(changed), outputs) == (sees == "state")


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="expected inputs of shape"):
        SkipGRU((1, 24, 24))
    with pytest.raises(ValueError, match="at least one knot"):
        SkipGRU((4, 1), knots=0)
    with pytest.raises(ValueError, match="unknown sees 'input'"):
        SkipGRU((4, 1), sees="input")
    for shares in ((1.0,), (0.5, 0.25, 1.0), (0.0, 0.5), (0.5, 0.5, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="expected two shares or more, each of more of the 128 units"):
            SkipGRU((4, 1), shares=shares)
