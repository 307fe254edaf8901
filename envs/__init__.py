"""Environments: one decision of a dynamic network each. `DECISIONS` is the registration table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One row of the table. Names are strings, so that importing dynrl stays cheap.

    Attributes:
        name: what the commands call it.
        env_id: its Gymnasium id.
        entry_point: the single environment.
        vector_entry_point: the batched environment.
        family: the backbone family that poses it.
        action: what is chosen, in a few words.
        source: where the decision comes from.
    """

    name: str
    env_id: str
    entry_point: str
    vector_entry_point: str
    family: str
    action: str
    source: str


DECISIONS: dict[str, Decision] = {
    row.name: row
    for row in (
        Decision(
            "skip", "dynrl/Skip-v0", "dynrl.envs.skip:SkipEnv", "dynrl.envs.skip:SkipVectorEnv", "gated_resnet",
            "run or skip each residual block", "SkipNet (Wang et al. 2018)",
        ),
        Decision(
            "channel", "dynrl/Channel-v0", "dynrl.envs.channel:ChannelEnv", "dynrl.envs.channel:ChannelVectorEnv",
            "slimmable_resnet", "how wide each residual block is", "RNP (Lin et al. 2017)",
        ),
    )
}  # fmt: skip


def decision(name: str) -> Decision:
    """The row of that name, or a ValueError that lists the names."""
    if name not in DECISIONS:
        raise ValueError(f"unknown decision {name!r}; expected one of {sorted(DECISIONS)}")
    return DECISIONS[name]


def register() -> None:
    """Register every decision with Gymnasium, as single and as batched environment."""
    import gymnasium

    for row in DECISIONS.values():
        gymnasium.register(row.env_id, entry_point=row.entry_point, vector_entry_point=row.vector_entry_point)
