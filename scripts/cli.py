"""`dynrl VERB ...` runs the script of that name."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from dynrl._version import __version__

VERBS = {
    "train": "learn a policy (after pretraining a backbone if none is given), evaluate it, write a run folder",
    "demo": "show where compute pays: five rows, on curves to be traced, in minutes",
    "evaluate": "report accuracy, MACs and time of one or more run folders",
    "compare": "train a matrix of policies, and report which is better, by how much, and how certain that is",
    "sweep": "search for good training settings with Ray Tune",
    "pretrain": "train a plain network, and a backbone from it under random routes",
    "attack": "change inputs by little so that a model spends more, and say what is left of what it saves",
    "calibrate": "time a routed model on this machine, for budgets in milliseconds",
    "export": "write a routed model as a program that needs torch alone",
    "bench": "measure ops and whole networks against their ideals, sampling speed, and how soon agents learn",
    "list": "list decisions, data sets and backbones",
    "tables": "write the tables of README and docs from results/",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; bad input ends with a reason of one line and exit code 2."""
    given, plugins = list(sys.argv[1:] if argv is None else argv), list[str]()
    while given[:1] == ["--plugin"] and len(given) > 1:
        given, plugins = given[2:], [*plugins, given[1]]
    if given and given[0] in ("-h", "--help"):
        print("usage: dynrl [--plugin FILE.py] VERB ...; `dynrl VERB --help` shows its settings\n")
        print(*(f"  {verb:10} {what}" for verb, what in VERBS.items()), sep="\n")
        return
    if given == ["--version"]:
        return print(f"dynrl {__version__}")
    if not given or given[0] not in VERBS:
        print(f"dynrl: expected a verb: {', '.join(VERBS)}; got {given[0] if given else 'none'}", file=sys.stderr)
        sys.exit(2)
    run(given[0], given[1:], plugins)


def run(verb: str, argv: Sequence[str] | None = None, plugins: Sequence[str] = ()) -> None:
    """Parse the verb's settings and run it, with everything that `plugins` add (see `dynrl.plugins`)."""
    try:
        with ended_alike():
            _run(verb, sys.argv[1:] if argv is None else argv, plugins)
    except ModuleNotFoundError as error:
        if (error.name or "dynrl").partition(".")[0] in {"dynrl", *sys.stdlib_module_names}:
            raise
        print(
            f"dynrl {verb}: error: {error.name} is not installed; the commands take more than dynrl itself: "
            "pip install 'dynrl[train]' (from a checkout: pip install '.[train]')",
            file=sys.stderr,
        )
        sys.exit(2)
    except (ValueError, OSError) as error:  # an OSError is a path that cannot be read or written
        print(f"dynrl {verb}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        again = "go on" if verb in ("compare", "sweep") else "begin anew"
        print(f"dynrl {verb}: interrupted; {f'{stopped}' or f'to {again}, give the same command'}", file=sys.stderr)
        sys.exit(130)


def _run(verb: str, argv: Sequence[str], plugins: Sequence[str]) -> None:
    from dynrl.plugins import load_plugins
    from dynrl.progress import talking
    from dynrl.scripts.options import parse_words

    module = importlib.import_module(f"dynrl.scripts.{'bench.__main__' if verb == 'bench' else verb}")
    args = parse_words(verb, module, argv)
    load_plugins(plugins)
    with talking():
        module.main(args)


@contextlib.contextmanager
def ended_alike() -> Iterator[None]:
    """Within the block, SIGTERM does what Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
