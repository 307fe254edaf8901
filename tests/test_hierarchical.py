"""The upper of two recurrent layers, updated at boundaries: against torch's own layers, run on the boundaries alone."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import MultiScaleRNN

LENGTH, ROWS = 7, 21


def network():
    torch.manual_seed(0)
    return MultiScaleRNN((LENGTH,), 4, tokens=9, width=3, lower=5, hidden=6).eval()


def texts():
    """Texts of all lengths, the shortest of one token."""
    inputs = torch.randint(1, 9, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return inputs.where(torch.arange(LENGTH) < (torch.arange(ROWS) % LENGTH + 1).unsqueeze(1), 0)


def expected(backbone, text, actions):
    """The answer and the MACs of one text, by torch's layers on its tokens and then on its boundaries."""
    length = int((text > 0).sum())
    low = backbone.lower(backbone.embedding(text[:length]))[0]
    boundaries = low[actions[:length] == 1]
    up = backbone.upper(boundaries)[0][-1] if len(boundaries) else torch.zeros(6)
    upper = sum(weight.numel() for weight in backbone.upper.parameters() if weight.dim() == 2)
    lower = sum(weight.numel() for weight in backbone.lower.parameters() if weight.dim() == 2)
    return backbone.fc(up), 6 * 4 + length * lower + len(boundaries) * upper


@torch.no_grad()
def test_the_upper_layer_reads_the_boundaries_alone():
    backbone, inputs = network(), texts()
    for seed in range(3):
        route = (torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.3 * (seed + 1)).long()
        route[seed] = 0
        walk, gated = backbone.run_route(inputs, route), torch.nn.functional.one_hot(route, 2).float()
        for row, (text, actions) in enumerate(zip(inputs, route, strict=True)):
            answer, macs = expected(backbone, text, actions)
            torch.testing.assert_close(walk.outputs[row], answer, atol=1e-5, rtol=1e-5)
            assert walk.macs[row] == macs and walk.steps[row] == (text > 0).sum()
        torch.testing.assert_close(backbone(inputs, gated), walk.outputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(backbone._along(inputs, route), walk.outputs, atol=1e-5, rtol=1e-5)
    whole = backbone.whole(inputs)
    torch.testing.assert_close(backbone.for_inference()(inputs), whole, atol=1e-5, rtol=1e-5)
    full = inputs[LENGTH - 1 :: LENGTH]
    torch.testing.assert_close(
        backbone.ideal(full, backbone.dense_actions(len(full)))(), backbone.whole(full), atol=1e-5, rtol=1e-5
    )


def test_what_is_trained_on_is_what_is_walked():
    backbone, inputs = network(), texts()
    ((answer,),) = backbone.training_outputs(inputs, torch.full((ROWS,), 0.2), torch.Generator().manual_seed(0))
    answer.output.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())
    route = torch.randint(0, 2, (ROWS, LENGTH))
    walk, (learned,) = backbone.run_training(inputs, lambda state: state.along(route))
    torch.testing.assert_close(learned.output, backbone.run_route(inputs, route).outputs, atol=1e-5, rtol=1e-5)
    assert learned.output.requires_grad and torch.equal(walk.route >= 0, inputs > 0)


@torch.no_grad()
def test_policies_are_told_when_the_text_ends():
    backbone, inputs = network(), texts()
    for step, state in enumerate(states(backbone, inputs)):
        told = backbone.observe(state)[:, -2:]
        assert torch.equal(told[:, 1] == 1, state.walk.own["length"][state.rows] == step + 1)
        torch.testing.assert_close(told[:, 0], torch.full((state.count,), (step + 1) / LENGTH))


def states(backbone, inputs):
    met = []
    backbone.run(inputs, lambda state: met.append(state.copy()) or torch.zeros(state.count, dtype=torch.int64))
    return met


def test_bad_settings_and_texts_are_refused():
    with pytest.raises(ValueError, match="expected token ids"):
        MultiScaleRNN((4, 3))
    with pytest.raises(ValueError, match="lower"):
        MultiScaleRNN((4,), lower=0)
    with pytest.raises(ValueError, match=r"token ids in 0\.\.8"):
        network().check_inputs(torch.full((1, LENGTH), 9))
