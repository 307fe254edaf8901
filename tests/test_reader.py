"""Networks that read by jumps: where each choice leads, by rules of its own; what is paid; what is learned on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynrl.backbones import END, JumpRNN
from dynrl.ops.costs import COSTS
from dynrl.plans import plan
from tests.ops_cases import COMPACT

LENGTH, JUMPS, ENDS = 12, (1, 2, 5), ((1, 2), (2,))


def network(**settings):
    torch.manual_seed(0)
    given = dict(tokens=9, width=4, hidden=6, jumps=JUMPS, ends=ENDS, follow=True) | settings
    return JumpRNN((LENGTH,), 4, **given).eval()


def texts(rows=40):
    """Texts of all lengths, the shortest of one token."""
    inputs = torch.randint(1, 9, (rows, LENGTH))
    for row, length in enumerate(torch.arange(rows) % LENGTH + 1):
        inputs[row, length:] = 0
    return inputs


def places(text, route):
    """The positions that a text's tokens are read at along a route, one token at a time."""
    tokens = [token for token in text.tolist() if token]
    read = [0]
    for action in route.tolist():
        at = read[-1]
        if action == 0:
            return read
        if action <= len(JUMPS):
            goal = at + JUMPS[action - 1]
        elif action <= len(JUMPS) + len(ENDS):
            marks = ENDS[action - len(JUMPS) - 1]
            goal = next((i + 1 for i in range(at, len(tokens)) if tokens[i] in marks), len(tokens))
        else:
            goal = tokens[at] - 1
        if goal >= len(tokens):
            return read
        read.append(goal)
        if goal == len(tokens) - 1:
            return read
    return read


@torch.no_grad()
def test_rows_read_the_tokens_that_their_choices_lead_to():
    backbone, inputs = network(), texts()
    for seed in range(4):
        torch.manual_seed(seed)
        route = torch.randint(0, backbone.num_choices, (len(inputs), backbone.columns))
        with COSTS.assuming(**COMPACT):
            walk = backbone.run_route(inputs, route)
        for row, text in enumerate(inputs):
            read = places(text, route[row])
            states = backbone.gru(backbone.embedding(text[read].unsqueeze(0)))[0]
            torch.testing.assert_close(walk.outputs[row], backbone.fc(states[0, -1]), atol=1e-5, rtol=1e-5)
            assert walk.macs[row] == len(read) * backbone.read_macs + backbone.fc.weight.numel()


@torch.no_grad()
def test_reports_are_told_which_tokens_are_read():
    backbone, inputs = network(), texts()
    route = torch.randint(0, backbone.num_choices, (len(inputs), backbone.columns))
    for row, parts in enumerate(backbone.regions(inputs, route)):
        assert parts == [[[0, place, 1, 1]] for place in places(inputs[row], route[row])]


@torch.no_grad()
def test_it_says_what_it_would_answer_if_it_stopped_now():
    backbone, inputs = network(), texts(LENGTH)[-1:].expand(5, -1)
    state = backbone.begin(inputs)
    for _ in range(3):
        stopped = state.copy()
        (end,) = backbone.advance(stopped, torch.zeros(5, dtype=torch.int64))
        assert end.point == END
        torch.testing.assert_close(backbone.output(state), backbone.output(end))
        (state,) = backbone.advance(state, torch.ones(5, dtype=torch.int64))


@torch.no_grad()
def test_a_trained_network_is_taken_as_it_is():
    embedding, gru, head = nn.Embedding(9, 4, padding_idx=0), nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)
    backbone, inputs = JumpRNN.from_module(embedding, gru, head, LENGTH, ends=ENDS), torch.randint(1, 9, (5, LENGTH))
    torch.testing.assert_close(backbone(inputs), head(gru(embedding(inputs))[0][:, -1]))
    for parts, reason in (
        ((embedding, nn.LSTM(4, 6), head), "expected an nn.GRU"), ((nn.Embedding(9, 5), gru, head), "of 4 numbers"),
        ((nn.Embedding(9, 4, padding_idx=2), gru, head), "token id 0"), ((embedding, gru, nn.Linear(5, 3)), "on 6 units"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            JumpRNN.from_module(*parts, LENGTH)


@torch.no_grad()
def test_a_walk_ends_although_tokens_name_one_another():
    backbone = network()
    inputs = torch.full((3, LENGTH), 1)  # each names the first
    walk = backbone.run_route(inputs, torch.full((3, LENGTH - 1), backbone.num_choices - 1))
    assert (walk.steps == LENGTH - 1).all() and walk.macs[0] == backbone.dense_macs


def test_it_learns_the_whole_text_by_its_layer_and_the_rest_by_short_walks():
    backbone, inputs = network(), texts()
    rate = torch.full((len(inputs),), 0.5)
    rate[:7] = 1
    (whole,), (walked,) = backbone.training_outputs(inputs, rate)
    assert torch.equal(whole.rows, torch.arange(7)) and torch.equal(walked.rows, torch.arange(7, len(inputs)))
    assert whole.weight + walked.weight == pytest.approx(1)
    dense = backbone.run_route(inputs, backbone.dense_actions(len(inputs))).outputs
    torch.testing.assert_close(whole.output, dense[:7], atol=1e-5, rtol=1e-5)
    ((every,),) = backbone.training_outputs(inputs, None)
    torch.testing.assert_close(every.output, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"jumps": (2, 5)}, "jumps that rise from 1"), ({"jumps": (1, 5, 5)}, "jumps that rise from 1"),
        ({"ends": ((9,),)}, "each number in ends"), ({"tokens": 1}, "tokens of at least 2"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        network(**settings)


def test_bad_texts_are_refused():
    backbone, good = network(), texts(3)
    for bad, reason in (
        (good.float(), "expected inputs of torch.int64, got torch.float32"), (good[:, 1:], "inputs of shape"),
        (good + 8, r"token ids in 0\.\.8, got 8\.\.16"), (good - 1, r"token ids in 0\.\.8, got -1"),
        (good.clone().index_fill_(1, torch.tensor([0]), 0), "texts of one token or more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            backbone.check_inputs(bad)


def test_gates_are_refused():
    with pytest.raises(ValueError, match="JumpRNN has no gates"):
        plan("jump", "find-small", agent="gate")
