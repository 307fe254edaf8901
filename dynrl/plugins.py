"""Plugins are files that dynrl's commands import; they add your own backbones, data sets, decisions, and so on.

A plugin adds rows to registries: `dynrl.backbones.FAMILIES`, `dynrl.data.DATASETS`, `dynrl.recipes.DEFAULTS`,
`dynrl.envs.rewards.REWARDS`, `dynrl.agents.base.AGENTS`, `dynrl.evaluation.RULES`, and decisions by `dynrl.envs.add`.
Remote workers import it, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "DYNRL_PLUGINS"  # it lists files and modules, separated by os.pathsep; child processes inherit it


def load_plugins(names: Iterable[str]) -> None:
    """Import each file (`*.py`, under its name without the suffix) or module once; later workers do the same.

    Raises:
        ValueError: a plugin cannot be found or imported, or has the name of another module.
    """
    for name in names:
        path = Path(name).resolve()
        module = path.stem if name.endswith(".py") else name
        if module in sys.modules:
            there = getattr(sys.modules[module], "__file__", None)
            if name.endswith(".py") and (there is None or Path(there).resolve() != path):
                raise ValueError(f"the plugin {name} has the name of a module that is there ({there}); rename the file")
            continue
        try:
            if name.endswith(".py"):
                there = getattr(importlib.util.find_spec(module), "origin", None)
                if there is not None and Path(there).resolve() != path:  # an installed one, not imported so far
                    raise ImportError(f"it has the name of a module that is there ({there}); rename the file")
                spec = importlib.util.spec_from_file_location(module, path)
                assert spec is not None
                assert spec.loader is not None
                sys.modules[module] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[module])
            else:
                importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a user's file may raise anything
            sys.modules.pop(module, None)
            said = " ".join(str(error).split())
            raise ValueError(f"the plugin {name} cannot be imported: {type(error).__name__}: {said}") from error
        known = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
        entry = str(path) if name.endswith(".py") else name
        if entry not in known:
            os.environ[VARIABLE] = os.pathsep.join([*known, entry])
