"""A user's module becomes a backbone, cut around the parts that are named: this is what all such families share.

`dynrl.backbones.traced` cuts a module by torch.fx, which leaves nothing to do between the parts. A module that cannot
be traced runs as it is and is held at its parts, by `dynrl.backbones.held`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from dynrl.backbones.base import Backbone
from dynrl.backbones.chance import drawing
from dynrl.backbones.channels import CHANNELS
from dynrl.backbones.forward import Stand
from dynrl.backbones.held import Held
from dynrl.backbones.rows import check_rows, same
from dynrl.backbones.traced import Traced, TracedStand, Untraceable, fold_norms
from dynrl.backbones.walk import END, State, Walk
from dynrl.inputs import Form

Standing = Stand | TracedStand
Channels = Literal["first", "last"]
TIMED_ROWS, ROUNDS = 8, 3  # memory formats are timed on so many rows, so often in turn
CLEARLY = 0.75  # how much of the time of channels_last contiguous maps must take to be preferred: timings are noisy
LEAST_MACS = 10**7  # below this, Python takes most of the time in either format


class OfModule(Backbone):
    """This is the base class of these families: a user's module, cut around its parts of given names.

    Attributes:
        way: "traced" if torch.fx cut the module; "in place" if it runs as it is and is held at its parts.
        why: why it was not traced; empty if it was.
    """

    way: Literal["traced", "in place"]

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        parts: Sequence[str],
        family: str | None,
        channels: Channels | None,
        input_dtype: Any,
        leaving: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            got = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
            raise ValueError(f"expected a torch module, such as a network that was built or loaded, got {got}")
        uncounted = [name for name, part in module.named_modules() if isinstance(part, nn.RNNBase)]
        if uncounted:
            raise ValueError(
                f"the compute of {uncounted} cannot be counted; recurrent layers are for SkipGRU and SkipLSTM"
            )
        _check_names(module, parts)
        if channels not in (None, *CHANNELS):
            raise ValueError(f"expected channels={' or '.join(map(repr, CHANNELS))}, or None, got {channels!r}")
        form = Form.of(input_shape, input_dtype)
        _unfold_buffers(module)
        self.module, self._names, self._channels = module, list(parts), channels
        if family is not None:
            self.family = family  # type: ignore[misc]
        self.input_shape, self.input_dtype = form.shape, form.dtype
        self.input_name = next(iter(inspect.signature(module.forward).parameters), self.input_name)
        self.config = form.config | ({} if channels is None else {"channels": channels}) | config
        self._prefers_last = dict[tuple[torch.device, torch.dtype], bool]()  # found out once for each place
        self.register_load_state_dict_post_hook(_cut_again)  # with assign=True, loading replaces the parameters
        self.eval()
        try:
            self._cut_up(leaving)
            check_rows(type(module).__name__, self._cut.output, self._example(3, alike=False))
        except ValueError:
            raise
        except Exception as error:  # a user's forward may raise anything
            nested = any(
                isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor for part in module.modules()
            )
            if nested and "nested" in str(error).lower():
                raise ValueError(
                    f"{type(module).__name__} hands nested tensors on, whose rows cannot be told apart; make its "
                    "nn.TransformerEncoder with enable_nested_tensor=False"
                ) from error
            raise ValueError(
                f"{type(module).__name__} fails on inputs of shape {form} ({type(error).__name__}: {error}); give the "
                "shape of one input, without the batch; or a batch of examples, by name if there are several tensors, "
                "as its forward calls them. Of examples, integers such as token ids keep their type"
            ) from error

    def _cut_up(self, leaving: bool) -> None:
        self.way, self.why = "traced", ""
        try:
            if self.form.named:
                raise Untraceable(f"{type(self.module).__name__} is given tensors by name")
            self._cut: Traced | Held = Traced(self.module, self._names)
            _check_training(self.module, self._names)
            inputs = self._example(1)
            with torch.no_grad():
                stand: Any = self._cut.enter(inputs)
                for name in self._names:
                    if not isinstance(stand.x, Tensor) or stand.x.shape[0] != 1:
                        raise Untraceable(f"{name!r} is not given one row for each input")
                    y = stand.part()
                    if not isinstance(y, Tensor):
                        raise Untraceable(f"{name!r} returns a {type(y).__name__}")
                    stand = stand.follow(y)
                if not isinstance(stand, Tensor):
                    raise Untraceable(f"{type(self.module).__name__} returns a {type(stand).__name__}")
                if not same(stand, self._cut.output(inputs)):
                    raise Untraceable(f"what torch.fx cut out of {type(self.module).__name__} computes something else")
        except Untraceable as error:
            self.way, self.why = "in place", str(error)
            self.exports, self.captures = False, ()  # type: ignore[misc]
            self._cut = Held(self.module, self._names, self._example, leaving)

    @torch.no_grad()
    def _check_routes(self) -> None:
        """Refuse a module in which an input's way depends on the routes of those beside it; a family's last check.

        Blocks run on the rows that lie one behind the other in the first dimension; a module may lay them otherwise.
        """
        inputs, full = self._example(3, alike=False), torch.tensor(self.full_route)
        even = torch.arange(self.columns) % 2 == 0
        route = torch.stack([full, full * even, full * ~even]).to(inputs.device)
        try:
            together = self._watched(inputs, route)
            alone = [self._watched(inputs[row : row + 1], route[row : row + 1])[0] for row in range(3)]
            fits = all(
                len(ours) == len(theirs) and all(map(same, ours, theirs))
                for ours, theirs in zip(together, alone, strict=True)
            )
            why = ""
        except Exception as error:  # a user's layer may raise anything on rows that are not its own
            fits, why = False, f" ({type(error).__name__}: {error})"
        if not fits:
            raise ValueError(
                f"{type(self.module).__name__} cannot be routed row by row: an input's features at {self._names} are "
                f"others where inputs beside it take other routes{why}. Hand on tensors with the rows first there and "
                "in between, [batch, tokens, channels], or with the tokens of one row behind those of another"
            )

    def _watched(self, inputs: Any, route: Tensor) -> list[list[Tensor]]:
        """Return, for each row, its features at all points that it comes to, and its output."""
        seen: list[list[Tensor]] = [[] for _ in range(len(inputs))]

        def watch(state: State) -> Tensor:
            x = state.features[0] if isinstance(state.features, tuple) else state.features
            for row, mine in zip(state.rows.tolist(), x.clone(), strict=True):
                seen[row].append(mine)
            return state.along(route)

        outputs = self.run(inputs.clone(), watch).outputs
        assert outputs is not None
        return [[*mine, output] for mine, output in zip(seen, outputs, strict=True)]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._recut()  # the buffers that the pieces hold were replaced
        return self

    def train(self, mode: bool = True) -> Any:
        """Put the module into training or eval mode, and cut it anew."""
        super().train(mode)
        self._recut()  # the pieces hold the mode as a constant, for example whether dropout is on
        return self

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norms folded into the convolutions before them, in the faster memory format.

        Which format is faster depends on the layers and on the machine, so a few rows are timed in both, once.
        """
        twin, inputs = super().for_inference(), self._example(2)
        with torch.no_grad():
            expected = twin._cut.output(inputs)
            fold_norms(twin.module, twin._names, lambda: twin._cut.output(inputs))
            twin._recut()
            if not same(twin._cut.output(inputs), expected):  # it reads its layers in ways that no trace shows
                twin = super().for_inference()
        convolves = any(isinstance(part, nn.Conv2d) for part in twin.module.modules())
        if convolves and TIMED_ROWS * self.dense_macs >= LEAST_MACS:
            weight = next(self.parameters())
            place = weight.device, weight.dtype
            if place not in self._prefers_last:
                self._prefers_last[place] = twin._faster_last()
            twin._lay_out(self._prefers_last[place])
        return twin

    @torch.no_grad()
    def _faster_last(self) -> bool:
        """Tell whether the whole module is faster in channels_last."""
        inputs = self._example(TIMED_ROWS)
        wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for last, taken in times.items():
                self._lay_out(last)
                self._cut.output(inputs)  # what the other format left in the caches must not count
                wait()
                start = time.perf_counter()
                self._cut.output(inputs)
                wait()
                taken.append(time.perf_counter() - start)
        return min(times[False]) > CLEARLY * min(times[True])

    def _lay_out(self, last: bool) -> None:
        form = torch.channels_last if last else torch.contiguous_format
        for part in self.module.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data = part.weight.data.contiguous(memory_format=form)

    def _pose(self, *args: Any, **kwargs: Any) -> None:
        super()._pose(*args, **kwargs)
        # A module may keep what it computes, such as weights of attention. With a graph of gradients behind it, as the
        # runs that are counted leave it, the module could not be copied any more.
        with torch.no_grad():
            self._cut.output(self._example(1))

    def _recut(self) -> None:
        if hasattr(self, "_cut"):
            self._cut = self._cut.again()

    def _example(self, rows: int, alike: bool = True) -> Any:
        return self.form.example(rows, next(self.module.parameters()), alike)

    def _last(self, k: int, told: bool | None) -> bool:
        """Return whether the features at part `k` have their channels last, if ops have `told` so or not."""
        if self._channels is not None:
            return self._channels == "last"
        if told is None:
            raise ValueError(
                f"no op of {type(self.module).__name__} tells which dimension of its features at {self._names[k]!r} is "
                "that of channels; say channels='first' ([n, C, ...]) or channels='last' ([n, ..., C])"
            )
        return told

    def ready(self, state: State) -> State:
        """Return a copied `state` in a forward of its own."""
        state.held = self._standing(state)
        return state

    def _standing(self, state: State) -> Standing:
        """Return what goes on from `state`; a copy or a merged state has to enter the module anew."""
        if state.held is not None:
            return state.held
        return self._cut.at(state.point, state.features, state.get(state.walk.inputs))

    def _set_classes(self, output: Tensor, classes: int | None) -> None:
        """Note the number of classes, `classes` where they are given, that outputs for one input have."""
        if output.dim() < 2 or classes not in (None, output.shape[-1]):
            wanted = "classes" if classes is None else classes
            raise ValueError(
                f"expected a module with outputs [batch, {wanted}], got {tuple(output.shape)} for one input"
            )
        self.config["classes"] = output.shape[-1]


def _check_names(module: nn.Module, names: Any) -> None:
    """Refuse, with a ValueError, what is no list of names of different parts of a module, none inside another."""
    known, wrong = [name for name, _ in module.named_modules() if name], None
    if isinstance(names, str) or not names:
        names, wrong = [str(names)], f"{names!r}"
    for name in names:
        if not isinstance(name, str):
            wrong = wrong or f"something of type {type(name).__name__}"
        elif name not in known:
            wrong = wrong or f"{name!r}, which it does not have"
        elif list(names).count(name) > 1:
            wrong = wrong or f"{name!r} twice"
        elif outer := next((each for each in names if name.startswith(f"{each}.")), None):
            wrong = wrong or f"{name!r}, which lies inside {outer!r}"
    if wrong is not None:
        near = [name for each in names for name in get_close_matches(str(each), known, 4, 0)]
        raise ValueError(
            f"expected a list of different names of parts of {type(module).__name__}, none inside another, got {wrong}"
            f"; names are such as {', '.join(map(repr, dict.fromkeys(near)))}: named_modules() gives all of them"
        )


def _unfold_buffers(module: nn.Module) -> None:
    """Give expanded buffers memory of their own, since torch could load no file into them."""
    for part in module.modules():
        for name, x in part._buffers.items():
            if x is not None and 0 in x.stride():
                part._buffers[name] = x.clone(memory_format=torch.contiguous_format)


def _check_training(module: nn.Module, names: Sequence[str]) -> None:
    """Raise `Untraceable` if the module can be cut in eval mode alone, for example as it returns more in training.

    What its own forward draws while it is traced would be drawn once for all. Layers draw anew whenever they run.
    """
    module.train()
    try:
        with drawing(next(module.parameters()).device) as drawn:
            Traced(module, names)
            if drawn():
                raise Untraceable(f"{type(module).__name__} draws random numbers in its own forward")
    except ValueError as error:
        raise Untraceable(f"in training mode, {error}") from error
    finally:
        module.eval()


def _cut_again(backbone: OfModule, keys: Any) -> None:
    backbone._recut()


def arrived(walk: Walk, rows: Tensor, stand: Standing | Tensor) -> State:
    """Return the state of `rows` that stand before a part, or have got their answer."""
    if not isinstance(stand, Tensor):
        return State(walk, stand.k, rows, stand.x, stand)
    walk.put_output(rows, stand)
    return State(walk, END, rows)
