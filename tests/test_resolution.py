"""Networks of resolutions beyond what every backbone is tested for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynrl.backbones import ResolutionNet


def make(growth: int = 4) -> ResolutionNet:
    return ResolutionNet((1, 12, 12), 5, exits=2, layers=1, scales=3, width=4, growth=growth).eval()


@torch.no_grad()
def test_features_are_a_map_of_each_scale_and_only_the_coarsest_in_the_last_sub_network():
    backbone, met = make(), {}
    backbone.run(
        torch.randn(2, 1, 12, 12),
        lambda state: met.update({state.point: state.features}) or torch.ones_like(state.rows),
    )
    # Stem: 4, 8 and 16 channels. A layer adds 4, 8 and 16; a sub-network has two at each scale, one in front of an exit.
    # Between scales, half of the channels are left, of both sub-networks': (24 + 48) / 2 = 36, (12 + 24) / 2 = 18.
    assert [[tuple(x.shape[1:]) for x in met[k]] for k in range(5)] == [
        [(4, 12, 12), (8, 6, 6), (16 + 16, 3, 3)],
        [(4, 12, 12), (8, 6, 6), (16 + 32, 3, 3)],
        [(4, 12, 12), (8 + 16, 6, 6), (36 + 16, 3, 3)],
        [(4, 12, 12), (8 + 16, 6, 6), (36 + 32, 3, 3)],
        [((18 + 16 + 68) // 2 + 16, 3, 3)],
    ]


def test_a_stop_saves_all_finer_scales_and_what_runs_before_an_exit_is_of_use_to_it():
    backbone = make(growth=16)
    for k in range(6):
        backbone.zero_grad()
        route = (torch.arange(5) < k).long().expand(3, -1)
        backbone(torch.randn(3, 1, 12, 12), route).square().sum().backward()
        used = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        ran = ("stem.", *(f"stages.{i}." for i in range(k + 1)), f"heads.{k}.", f"fcs.{k}.")
        assert used == {name for name, _ in backbone.named_parameters() if name.startswith(ran)}


@torch.no_grad()
def test_a_sub_network_takes_in_what_the_one_before_had_at_the_same_layer():
    """The maps that its layers add follow from the formula, layer by layer."""
    backbone = make()
    image = torch.randn(2, 1, 12, 12)
    _, middle, coarsest = (maps := backbone._advance_to(1, backbone._advance_to(0, image)))
    made = backbone._advance_to(2, maps)[1]
    torch.testing.assert_close(made[:, :8], middle)
    for layer, own, before, after in zip(
        backbone.stages[2].fusions[0].layers, (8, 16), (16, 32), (16, 24), strict=True
    ):
        lent = F.interpolate(layer.up(coarsest[:, :before]), size=(6, 6), mode="bilinear")
        torch.testing.assert_close(made[:, own:after], torch.cat([lent, layer.same(made[:, :own])], 1))


@torch.no_grad()
def test_maps_of_odd_sizes_meet():
    backbone = ResolutionNet((3, 13, 10), 4, exits=1, layers=2, scales=4, width=4, growth=2, stem_stride=2).eval()
    assert backbone(torch.randn(2, 3, 13, 10)).shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exits": 0}, "exits of at least 1"), ({"layers": 0}, "layers of at least 1"),
        ({"growth": 1}, "growth of at least 2"), ({"scales": 1}, "scales of at least 2"),
        ({"input_shape": (12, 12)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ResolutionNet(**{"input_shape": (1, 12, 12), **settings})
