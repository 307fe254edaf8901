"""Reinforcement-learning routing policies for dynamic neural networks."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrl.deploy import RoutedModel, load, plug

from dynrl._version import __version__

__all__ = ["RoutedModel", "__version__", "load", "plug"]

if importlib.util.find_spec("gymnasium") is not None:
    from dynrl.envs import register

    register()
    del register


def __getattr__(name: str) -> Any:
    """Load the plug on first use, so that `import dynrl` (and a remote worker's look for env ids) stays cheap."""
    if name in ("RoutedModel", "load", "plug"):
        from dynrl import deploy

        return getattr(deploy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# In a remote worker, say; see dynrl.plugins. Last: what is imported here may itself import from dynrl.
if os.environ.get("DYNRL_PLUGINS"):
    from dynrl.plugins import load_plugins

    load_plugins(os.environ["DYNRL_PLUGINS"].split(os.pathsep))
    del load_plugins
