"""Pictures of reports and comparisons are drawn by matplotlib from what their JSON files hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from dynrl.data import Split
from dynrl.evaluation.difficulty import bin_name
from dynrl.evaluation.report import correlation_text, seeds_text, words_read
from dynrl.files import told_here, write_aside
from dynrl.tasks import TASKS, Task

RIVALS = {"random": "s--", "static": "^:", "uniform": "<:", "smaller": "X", "oracle": "*"}  # other rivals: "x-."
MARKERS = {"ppo": "o", "gate": "v"}  # markers by agent where the backbone is frozen; other agents: "p"
WIDE, LINES = 120, 12  # the letters of a line of a text, and the lines of a text that are shown
MOST_TICKS = 32  # more names along an axis would lie on one another
TUNED = {"ppo": "D", "gate": "P"}  # markers by agent where the backbone was fine-tuned; other agents: "d"


def style(name: str, kind: dict[str, Any] | None) -> str:
    """Choose how a line is drawn: a run by the fields of its kind (`RunKind.to_dict`), a rival by its name."""
    if kind is None:
        return RIVALS.get(name, "x-.")
    marker = TUNED.get(kind["agent"], "d") if kind["tuned"] else MARKERS.get(kind["agent"], "p")
    if kind["cost"] == "time":
        marker = "h"
    line = "-" if kind["policy"] == "sequential" else ":" if kind["baseline"] == "value" else "-."
    return marker + line


def _or_warn(draw: Callable[..., None]) -> Callable[..., None]:
    """Let `draw` warn where it fails: a table is printed and training goes on without a picture, too."""

    @wraps(draw)
    def drawn(*given: Any) -> None:
        from matplotlib import pyplot

        (path,) = (each for each in given if isinstance(each, Path))
        open_before = pyplot.get_fignums()
        try:
            draw(*given)
        except Exception as error:
            path.unlink(missing_ok=True)  # a picture from before would show other figures than the file beside it
            warnings.warn(
                f"{path} cannot be drawn ({type(error).__name__}: {error}); the JSON file beside it holds the figures",
                stacklevel=2,
            )
            for number in set(pyplot.get_fignums()) - set(open_before):
                pyplot.close(number)

    return drawn


def _new_figure(**settings: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.figure(layout="constrained", **settings)


def _save(figure: Any, path: Path) -> None:
    """Write a figure as a complete PNG file or not at all, and close the figure."""
    from matplotlib import pyplot
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    # Names are a user's own: dollars in them are no formulas. Numbers along axes may be (powers of ten).
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for text in (text for tick in figure.findobj(Tick) for text in tick.findobj(Text)):
        text.set_parse_math(True)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    pyplot.close(figure)


def show_in_tensorboard(picture: Path, run: Path) -> None:
    """Add a picture to the TensorBoard files of a run, beside its curves; warn where that fails."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    try:
        with told_here(), SummaryWriter(str(run)) as writer:
            writer.add_image(picture.stem, imread(picture), dataformats="HWC")
    except Exception as error:  # the picture itself is there
        warnings.warn(f"TensorBoard shows no {picture} ({type(error).__name__}: {error})", stacklevel=2)


@_or_warn
def draw_report(report: dict[str, Any], test: Split, path: Path, pictures: dict[str, Any] | None = None) -> None:
    """Draw the metric against MACs and against measured time, and where one policy spends, and on which inputs.

    `pictures` is what `dynrl.evaluation.scores.pictures` returns, if answers are pictures.
    """
    hard = {} if report["usage"] is None else report["usage"]["difficulty"]
    count = 2 + bool(hard) + bool(pictures) + ("budgeted" in report)
    figure = _new_figure(figsize=(11, 4.2 * count))
    upper, lower, *lowest = figure.subfigures(count, 1)
    if pictures:
        _draw_pictures(pictures, test.task, lowest.pop())
    if "budgeted" in report:
        _draw_budgeted(report, lowest.pop())
    axes = upper.subplots(1, 2, sharey=True)
    dense, metric, task = report["dense"], report["metric"], TASKS[report["metric"]]
    full_height = task.factor * dense[metric]
    for axis, x, label, full in (
        (axes[0], "macs_fraction", "MACs, share of the dense network's", 1.0),
        (axes[1], "latency_ms", f"milliseconds a batch of {dense['batch_size']}", dense["latency_ms"]),
    ):
        _draw_fronts(report["points"], x, task, axis)
        axis.axhline(full_height, color="grey", linewidth=0.8)
        axis.plot([full], [full_height], "D", color="grey", label="dense")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale(task.axis)
    axes[0].set_ylabel(f"test {task.heading}")
    # Beside the axes: inside, many names would lie on the points.
    upper.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    title = f"{report['decision']} on {Path(report['data']).name}, policy seeds: {seeds_text(report)}"
    upper.suptitle(fill(title, 120), fontsize="medium")
    if report["usage"] is not None:
        _draw_usage(report["usage"], report["classes"], test, lower)
    for part in lowest:
        part.suptitle(f"{report['usage']['policy']}, by what makes an input hard", fontsize="medium")
        for axis, (name, found) in zip(part.subplots(1, len(hard), squeeze=False)[0], hard.items(), strict=True):
            _draw_difficulty(name, found, task, axis)
    _save(figure, path)


def _draw_fronts(points: list[dict[str, Any]], x: str, task: type[Task], axis: Any) -> None:
    """Draw a line for each policy, with the spread over its seeds."""
    for policy in dict.fromkeys(p["policy"] for p in points):
        mine = sorted((p for p in points if p["policy"] == policy), key=itemgetter(x))
        ys, spread = ([task.factor * p[key] for p in mine] for key in (task.metric, f"{task.metric}_std"))
        bars, marker = _bars(ys, spread, task), style(policy, mine[0]["kind"])
        axis.errorbar([p[x] for p in mine], ys, yerr=bars, fmt=marker, label=policy, capsize=2)


def _draw_budgeted(report: dict[str, Any], figure: Any) -> None:
    """Draw MSDNet's curve of budgets, and what each exit says of all inputs."""
    axis, task = figure.subplots(), TASKS[report["metric"]]
    _draw_fronts(report["budgeted"]["points"], "macs_fraction", task, axis)
    anytime = report["budgeted"]["anytime"]
    xs, ys = [row["macs_fraction"] for row in anytime], [task.factor * row[task.metric] for row in anytime]
    axis.step(xs, ys, where="post", color="grey", label="anytime: all inputs at one exit")
    axis.set(xlabel="MACs, share of the dense network's", ylabel=f"test {task.heading}", yscale=task.axis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle("MSDNet's budgeted batch, 39 budgets", fontsize="medium")


def _bars(ys: list[float], spread: list[float], task: type[Task]) -> list[list[float]]:
    """Return how far error bars reach below and above: `spread`, but not beyond what is perfect."""
    room = [min(s, abs(task.factor * task.perfect - y)) for y, s in zip(ys, spread, strict=True)]
    return [spread, room] if task.rises else [room, spread]


def _set_names(axis: Any, names: list[str], **settings: Any) -> None:
    """Name the places 0, 1, ... of an axis, as many of them as there is room for."""
    places = range(0, len(names), -(-len(names) // MOST_TICKS))
    axis.set_ticks(places, [names[place].replace("$", r"\$") for place in places], fontsize="x-small", **settings)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-8:]}"


def _draw_usage(usage: dict[str, Any], classes: list[str], test: Split, figure: Any) -> None:
    """Draw what is chosen for each class at each visit of a point, and the images that cost most and least."""
    images = len(test.inputs.shape) == 4 and test.inputs.shape[1] in (1, 3)
    left, right = figure.subfigures(1, 2) if images else (figure, None)
    axis = left.subplots()
    names = ["all" if g["class"] is None else _short(classes[g["class"]]) for g in usage["groups"]]
    shares = [f"{name}  {group['macs_fraction']:.2f}" for name, group in zip(names, usage["groups"], strict=True)]
    picture = axis.imshow(usage["by_column"], aspect="auto", vmin=0, vmax=1)
    _set_names(axis.xaxis, list(map(_short, usage["columns"])), rotation=90)
    _set_names(axis.yaxis, shares)
    axis.set(xlabel="decisions, in their order", ylabel="class, and its share of the dense MACs")
    routes = f"{usage['distinct_routes']} distinct routes, the commonest for {usage['commonest']:.0%}"
    left.suptitle(f"{usage['policy']}, first seed, price {usage['price']:.3g}\n{routes}", fontsize="small")
    left.colorbar(picture, label="mean choice: 0 the thriftiest, 1 the dearest")
    if right is None:
        return
    for name, mine, half in zip(
        ("least", "most"), (usage["cheapest"], usage["dearest"]), right.subfigures(2, 1), strict=True
    ):
        half.suptitle(f"{name} is spent on", fontsize="medium")
        grid = half.subplots(2, -(-len(mine) // 2), squeeze=False).flatten()
        for axis in grid:
            axis.set_axis_off()
        for row, axis in zip(mine, grid, strict=False):
            axis.imshow(_picture(test, row).numpy(), cmap="gray")
            if test.task.by_class:
                axis.set_title(_short(classes[int(test.targets[row])]), fontsize="small")


def _draw_pictures(pictures: dict[str, Any], task: Task, figure: Any) -> None:
    """Draw a row for each kind of `pictures`, with the metric above each that can be compared with its target."""
    target, answers = pictures["target"], pictures["full route"]
    grid = figure.subplots(len(pictures), len(target), squeeze=False)
    for (name, images), row in zip(pictures.items(), grid, strict=True):
        told = [""] * len(images)
        if images is not target and images.shape == answers.shape:
            told = [task.show(metric) for metric in task.score(images, target).tolist()]
            images = images if target.is_floating_point() else images.argmax(1)
        for image, metric, axis in zip(images, told, row, strict=True):
            if image.dim() == 3:
                axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            else:
                axis.imshow(image.numpy(), cmap="nipy_spectral", vmin=0, vmax=answers.shape[1] - 1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(metric, fontsize="x-small", pad=2)
        row[0].set_ylabel(name, fontsize="small")
    half = len(target) // 2
    figure.suptitle(f"{task.heading}; least is spent on the left {half}, most on the right {half}", fontsize="medium")


@_or_warn
def draw_regions(usage: dict[str, Any], test: Split, path: Path) -> None:
    """Draw inputs on which least and most is spent, and for each decision only the parts of theirs that ran."""
    # Each has a row of its own.
    rows = _half(usage, list(zip([*usage["cheapest"], *usage["dearest"]], usage["regions"], strict=True)))
    deep = 1 + max(len(regions) for _, regions in rows)
    figure = _new_figure(figsize=(1.2 * deep, 1.3 * len(rows)))
    figure.suptitle(f"{usage['policy']}: what is seen at each decision", fontsize="medium")
    for axes, (row, regions) in zip(figure.subplots(len(rows), deep, squeeze=False), rows, strict=True):
        image = _picture(test, row)
        seen = [image]
        for parts in regions:
            shown = torch.zeros_like(image)  # black is what did not run, not what is dark
            for top, left, height, width in parts:
                part = slice(top, top + height), slice(left, left + width)
                shown[part] = 0.25 + 0.75 * image[part]
            seen.append(shown)
        for axis in axes:
            axis.set_axis_off()
        for axis, shown in zip(axes, seen, strict=False):
            axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
    _save(figure, path)


@_or_warn
def draw_words(usage: dict[str, Any], path: Path) -> None:
    """Draw texts on which least and most is spent: what was read in black, all other words in pale grey."""
    rows = _half(usage, list(zip(usage["words"], usage["regions"], strict=True)))
    texts = [_lines(words, words_read(words, regions)) for words, regions in rows]
    figure = _new_figure(figsize=(11, 0.6 + 0.19 * sum(len(lines) + 1 for lines in texts)))
    figure.suptitle(f"{usage['policy']}: what is read of texts (black)", fontsize="medium")
    axis, at = figure.subplots(), 0
    for lines in texts:
        for read, rest in lines:
            for shown, colour in ((rest, "silver"), (read, "black")):  # letters are equally wide, so both fit together
                axis.text(0, -at, shown, color=colour, family="monospace", fontsize=8)
            at += 1
        at += 1
    axis.set(xlim=(0, 1), ylim=(-at, 1))
    axis.set_axis_off()
    _save(figure, path)


def _lines(words: list[str], read: list[bool]) -> list[tuple[str, str]]:
    """Break words into at most `LINES` lines; return of each the words that were read and the others, each in place."""
    lines, here = list[tuple[str, str]](), ("", "")
    for word, was in zip(words, read, strict=True):
        shown = word[:WIDE]
        if len(here[0]) + len(shown) > WIDE:
            lines.append(here)
            here = "", ""
        blank = " " * len(shown)
        here = here[0] + (shown if was else blank) + " ", here[1] + (blank if was else shown) + " "
    lines.append(here)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], (" " * 3, "...")]


def _half(usage: dict[str, Any], rows: list[Any]) -> list[Any]:
    """Return half of the inputs that least is spent on, and half of the others; `rows` has one for each of both."""
    least, half = len(usage["cheapest"]), -(-len(usage["cheapest"]) // 2)
    return rows[:half] + rows[least : least + half]


def _picture(test: Split, row: int) -> Tensor:
    """Return an image of a split as a picture's numbers from 0 to 1, [height, width, 1 or 3]."""
    image = test.inputs[row].float().cpu().permute(1, 2, 0)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-6)


def _draw_difficulty(name: str, found: dict[str, Any], task: type[Task], axis: Any) -> None:
    """Draw as bars what inputs of each difficulty take, and as a line what is reached on them."""
    places, rows = range(len(found["bins"])), found["bins"]
    axis.bar(places, [row["macs_fraction"] for row in rows], color="lightsteelblue")
    axis.set_xticks(places, [f"{bin_name(row)}\n{row['inputs']}" for row in rows], fontsize="small")
    axis.set(xlabel=f"{name}, and the number of inputs", ylabel="bars: MACs, share of the dense network's")
    axis.set_title(f"{name}{correlation_text(found)}", fontsize="medium")
    beside = axis.twinx()
    beside.plot(places, [task.factor * row[task.metric] for row in rows], "ko-")
    beside.set(ylabel=f"line: test {task.heading}", yscale=task.axis)


@_or_warn
def draw_comparison(result: dict[str, Any], path: Path) -> None:
    """Draw the fronts of a comparison, with the spread over seeds."""
    figure, task = _new_figure(figsize=(7, 4.6)), TASKS[result["metric"]]
    axis = figure.subplots()
    for name, front in result["fronts"].items():
        columns = zip(front["macs_fraction"], front["metric"], front["std"], strict=True)
        rows = [row for row in columns if row[0] is not None]
        if not rows:
            axis.plot([], [], " ", label=f"{name} (reaches none of the budgets)")
            continue
        xs, ys, spread = map(list, zip(*rows, strict=True))
        if name == "dense":
            axis.axhline(task.factor * ys[0], color="grey", linewidth=0.8, label="dense")
        else:
            ys, spread = ([task.factor * each for each in column] for column in (ys, spread))
            marker = style(name, result["kinds"].get(name))
            axis.errorbar(xs, ys, yerr=_bars(ys, spread, task), fmt=marker, label=name, capsize=2)
    axis.set(xlabel="MACs, share of the dense network's", ylabel=f"test {task.heading}", yscale=task.axis)
    axis.set_title(f"{result['decision']} on {Path(result['data']).name}")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


@_or_warn
def draw_attack(report: dict[str, Any], path: Path) -> None:
    """Draw what share of the inputs is done within a cost, for each kind of inputs; below a limit, too."""
    halves = [("no limit", report["free"])]
    if report["limited"] is not None:
        halves.append((f"set_limit({report['limit']})", report["limited"]))
    figure = _new_figure(figsize=(5.5 * len(halves), 4.2))
    metric, task = report["metric"], TASKS[report["metric"]]
    for axis, (title, rows) in zip(figure.subplots(1, len(halves), sharey=True, squeeze=False)[0], halves, strict=True):
        for row in rows:
            count = len(row["quantiles"])
            shares = [i / (count - 1) for i in range(count)]
            label = f"{row['inputs']}: {task.heading} {task.show(row[metric])}, efficacy {row['efficacy']:.2f}"
            axis.step(row["quantiles"], shares, where="post", label=label)
        axis.set(xlabel="MACs, share of the dense network's", ylabel="share of inputs done", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    what = f"{report['decision']} on {Path(report['data']).name}"
    figure.suptitle(f"{what}, {report['policy']}, epsilon {report['epsilon']:.3g}")
    _save(figure, path)
