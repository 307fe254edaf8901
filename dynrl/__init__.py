"""dynrl learns policies that decide, input by input, which parts of a neural network run."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrl.deploy import RoutedModel, load, plug
    from dynrl.evaluation import attack, compare, evaluate
    from dynrl.training import train

from dynrl._version import __version__

__all__ = ["RoutedModel", "__version__", "attack", "compare", "evaluate", "load", "plug", "train"]

_WHERE = {
    "RoutedModel": "deploy", "load": "deploy", "plug": "deploy", "train": "training", "evaluate": "evaluation",
    "compare": "evaluation", "attack": "evaluation",
}  # fmt: skip

if importlib.util.find_spec("gymnasium") is not None:
    from dynrl.envs import register

    register()
    del register


def __getattr__(name: str) -> Any:
    """Load a name on first use, so that `import dynrl` stays cheap, also for remote workers that look for env ids."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"dynrl.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


# This is for remote workers, for example (see dynrl.plugins). It comes last, since plugins may import from dynrl.
if os.environ.get("DYNRL_PLUGINS"):
    from dynrl.plugins import load_plugins

    load_plugins(os.environ["DYNRL_PLUGINS"].split(os.pathsep))
    del load_plugins
