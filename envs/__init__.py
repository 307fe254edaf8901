"""Each environment poses one decision of a dynamic network. `DECISIONS` is the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """A decision is a row of the table. It names its class by a string, so that importing dynrl stays cheap.

    Attributes:
        name: the name in commands.
        env_id: the id of its environment in Gymnasium.
        vector_entry_point: the class of its environment, a `dynrl.envs.core.RoutingVectorEnv`, as MODULE:CLASS.
        action: what is chosen, in a few words.
        source: the paper that the decision comes from.
        data: the data set that is taken if none is named.
    """

    name: str
    env_id: str
    vector_entry_point: str
    action: str
    source: str
    data: str = "digits"


DECISIONS: dict[str, Decision] = {
    row.name: row
    for row in (
        Decision(
            "skip", "dynrl/Skip-v0", "dynrl.envs.skip:SkipVectorEnv", "run or skip each residual block",
            "SkipNet (Wang et al. 2018)",
        ),
        Decision(
            "exit", "dynrl/Exit-v0", "dynrl.envs.exit:ExitVectorEnv", "stop at an early classifier or go on",
            "BranchyNet (2016), MSDNet (Huang et al. 2018)",
        ),
        Decision(
            "expert", "dynrl/Expert-v0", "dynrl.envs.expert:ExpertVectorEnv",
            "choose one of a layer's unequal experts, or how many a token takes",
            "mixtures of experts (Shazeer et al. 2017)",
        ),
        Decision(
            "channel", "dynrl/Channel-v0", "dynrl.envs.channel:ChannelVectorEnv", "how wide each residual block is",
            "RNP (Lin et al. 2017)",
        ),
        Decision(
            "hidden-update", "dynrl/HiddenUpdate-v0", "dynrl.envs.hidden_update:HiddenUpdateVectorEnv",
            "how much of a recurrent network's hidden state is updated at each step",
            "Skip RNN (Campos et al. 2018), VCRNN (Jernite et al. 2017)",
            data="sequential-digits",
        ),
        Decision(
            "model", "dynrl/Model-v0", "dynrl.envs.model:ModelVectorEnv",
            "which model first, then stop or ask a dearer one", "IDK cascades (Wang et al. 2018)",
        ),
        Decision(
            "unroll", "dynrl/Unroll-v0", "dynrl.envs.unroll:UnrollVectorEnv",
            "apply a network's one block again, or stop with its answer", "adaptive computation time (Graves 2016)",
            data="hops",
        ),
        Decision(
            "jump", "dynrl/Jump-v0", "dynrl.envs.jump:JumpVectorEnv", "which word of a text to read next, or stop",
            "LSTM-Jump (Yu et al. 2017), Structural-Jump-LSTM (Hansen et al. 2019)", data="find-small",
        ),
        Decision(
            "look", "dynrl/Look-v0", "dynrl.envs.look:LookVectorEnv",
            "where in an image, or at which frame, to look next",
            "RAM (Mnih et al. 2014), GFNet (Wang et al. 2020), AdaFrame (Wu et al. 2019)", data="digit-scenes",
        ),
        Decision(
            "positions", "dynrl/Positions-v0", "dynrl.envs.positions:PositionsVectorEnv",
            "which share of an input's tokens or cells runs each block", "Mixture of Depths (Raposo et al. 2024)",
            data="digit-scenes",
        ),
        Decision(
            "branch", "dynrl/Branch-v0", "dynrl.envs.branch:BranchVectorEnv",
            "which module comes next, or none",
            "routing networks (Rosenbaum et al. 2018), module networks (Hu et al. 2017)",
            data="digit-tasks",
        ),
    )
}  # fmt: skip


def decision(name: str) -> Decision:
    """Return the row of that name, or raise a ValueError that lists the names."""
    from dynrl.schema import check_known

    check_known("decision", name, DECISIONS)
    return DECISIONS[name]


def add(row: Decision) -> None:
    """Add a decision of your own to the table and register it with Gymnasium."""
    if row.name in DECISIONS:
        raise ValueError(f"there is a decision {row.name!r} already; give yours another name")
    DECISIONS[row.name] = row
    _register(row)


def register() -> None:
    """Register every decision with Gymnasium, as a single and as a batched environment."""
    for row in DECISIONS.values():
        _register(row)


def _register(row: Decision) -> None:
    import gymnasium

    single = f"dynrl.envs.single:{row.name}"
    gymnasium.register(row.env_id, entry_point=single, vector_entry_point=row.vector_entry_point)
