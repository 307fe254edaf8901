"""Networks of several scales beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import MultiScaleNet


def make() -> MultiScaleNet:
    return MultiScaleNet((1, 12, 12), 5, layers=(1, 2, 1, 1), scales=3, width=4, growth=4).eval()


@torch.no_grad()
def test_scales_are_dropped_in_equal_parts_and_half_of_the_other_maps_with_them():
    backbone, met = make(), {}
    backbone.run(
        torch.randn(2, 1, 12, 12),
        lambda state: met.update({state.point: state.features}) or torch.ones_like(state.rows),
    )
    # Stem: 4, 8 and 16 channels; a layer adds 4, 8 and 16.
    assert [[tuple(x.shape[1:]) for x in met[k]] for k in range(3)] == [
        [(8, 12, 12), (16, 6, 6), (32, 3, 3)],
        [(16, 12, 12), (32, 6, 6), (64, 3, 3)],
        [(16 + 8, 6, 6), (32 + 16, 3, 3)],
    ]
    assert backbone.feature_width == 3 + 64


def test_all_that_runs_before_an_exit_is_of_use_to_it():
    backbone = make()
    for k in range(4):
        backbone.zero_grad()
        route = (torch.arange(3) < k).long().expand(3, -1)
        backbone(torch.randn(3, 1, 12, 12), route).square().sum().backward()
        used = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        ran = {"stem", *(f"stages.{i}" for i in range(k + 1)), f"heads.{k}", f"fcs.{k}"}
        assert used == {name for name, _ in backbone.named_parameters() if any(name.startswith(f"{r}.") for r in ran)}


def test_an_early_exit_sees_the_whole_image():
    """In the first layer already, what an exit says depends on all corners of the image."""
    backbone, image = make(), torch.randn(1, 1, 12, 12, requires_grad=True)
    backbone(image, torch.zeros(1, 3, dtype=torch.int64))[0, 0].backward()
    assert all(image.grad[0, 0, y, x] != 0 for y in (0, -1) for x in (0, -1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": (1, 1)}, "an exit for each of 3 scales"), ({"layers": (1, 0, 1)}, "each number in layers"),
        ({"scales": 1}, "scales of at least 2"), ({"width": 0}, "width of at least 1"),
        ({"input_shape": (12, 12)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MultiScaleNet(**{"input_shape": (1, 12, 12), **settings})
