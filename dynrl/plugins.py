"""Plugins are files that dynrl's commands import; they add your own backbones, data sets, decisions, and so on.

A plugin adds rows to registries: `dynrl.backbones.FAMILIES`, `dynrl.data.DATASETS`, `dynrl.recipes.DEFAULTS`,
`dynrl.envs.rewards.REWARDS`, `dynrl.agents.base.AGENTS`, `dynrl.evaluation.RULES`, and decisions by `dynrl.envs.add`.
Remote workers import it, too.

A run that was trained with plugins names them in its folder, and they are imported again when the folder is opened. A
folder may come from anywhere, so only plugins that were given on this machine before are imported on its word.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "DYNRL_PLUGINS"  # it lists files and modules, separated by os.pathsep; child processes inherit it
FILE = "plugins.json"  # the file in a run folder that names its plugins


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
        entry, known = str(path) if name.endswith(".py") else name, given_plugins()
        if entry not in known:
            os.environ[VARIABLE] = os.pathsep.join([*known, entry])
        _trust(entry)


def given_plugins() -> list[str]:
    """Return the files and modules that were given to this process, as its folders name them."""
    return [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]


def find_again(folder: str | Path) -> None:
    """Import the plugins that a run folder names, of those that were given on this machine before; warn of others."""
    file = Path(folder) / FILE
    try:
        named = json.loads(file.read_text()) if file.is_file() else []
    except ValueError:
        named = None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{file} is no list of plugins; put back the one that dynrl wrote, or remove it")
    for name in named:
        reason = "was not given on this machine before"
        if name in _trusted():
            try:
                load_plugins([name])
                continue
            except ValueError as error:
                reason = str(error)
        warnings.warn(
            f"{folder} was made with the plugin {name}, which {reason}. What it adds is not known here; if that is "
            f"needed, give it: dynrl --plugin {name} VERB ...",
            stacklevel=2,
        )


def _trust_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dynrl" / "plugins"


def _trusted() -> list[str]:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        return _trust_file().read_text().splitlines()
    return []


def _trust(entry: str) -> None:
    if entry not in _trusted():
        with contextlib.suppress(OSError, RuntimeError):  # where nothing can be kept, plugins are to be given again
            _trust_file().parent.mkdir(parents=True, exist_ok=True)
            with _trust_file().open("a") as file:
                file.write(f"{entry}\n")
