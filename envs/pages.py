"""The page of an environment is its docstring, completed by what the registries know."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from dynrl.backbones import Backbone
from dynrl.envs import DECISIONS
from dynrl.envs.rewards import REWARDS, Reward
from dynrl.policies import SIGHTS

EXAMPLE = """```python
import gymnasium, dynrl

env = gymnasium.make("{env_id}", price=0.1)
observation, info = env.reset(seed=0)
ended = False
while not ended:
    observation, reward, ended, _, info = env.step(env.action_space.sample())
print(info["route"], info["macs_fraction"])
```"""


def page(own: str, decision: str) -> str:
    """Return the page of a decision's environment: its class's docstring and sections from the registries.

    Args:
        own: the class's own docstring, which has the question and then sections on features, action, episode and
            source.
        decision: a name in `DECISIONS`.
    """
    # What a plugin added by mistake is refused where it is asked for (`check_reward`), not here, by every environment.
    rewards = [f"| `{row.name}` | {row.about} |" for row in REWARDS.values() if isinstance(row, Reward)]
    families = [f"- `{family.__name__}`: {_first_line(family)}" for family in families_of(decision)]
    sections = [inspect.cleandoc(own)]
    for name, sight in SIGHTS.items():
        sections += [f"## Observation, sight `{name}`", f"A float32 vector. {inspect.getdoc(sight)}"]
    sections += [
        "## Reward",
        "At each step minus price x (compute of this step / compute of the dense network); the first step also pays "
        "for what ran before the first decision. At the last step also, by `reward`:",
        "\n".join(["| `reward` | what the answer is worth |", "|---|---|", *rewards]),
        "## Backbones",
        "\n".join(families),
    ]
    if decision in DECISIONS:
        sections += ["## Example", EXAMPLE.format(env_id=DECISIONS[decision].env_id)]
    return "\n\n".join(sections)


def families_of(decision: str) -> list[type[Backbone]]:
    """Return the families of backbones that pose a decision, including those around a user's module."""

    def below(kind: type[Backbone]) -> Iterator[type[Backbone]]:
        for family in kind.__subclasses__():
            if "family" in vars(family) and family.decision == decision:
                yield family
            yield from below(family)

    return sorted(set(below(Backbone)), key=lambda family: family.__name__)


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
