"""A user's module becomes a backbone: its blocks may be skipped, or its layers get exits; both are named.

`dynrl.backbones.traced` cuts a module by torch.fx, which leaves nothing to do between the parts. A module that cannot
be traced runs as it is and is held at its parts, by `dynrl.backbones.held`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.channels import CHANNELS, gives_channels_last, takes_channels_last
from dynrl.backbones.early import early_inputs
from dynrl.backbones.exit import SEES, Exits
from dynrl.backbones.forward import Stand
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.held import Held
from dynrl.backbones.mixture import Mix, Run, by_choice, by_gates, kinds_of, mixed, own_count, side_by_side
from dynrl.backbones.positions import SHARES, Positions
from dynrl.backbones.skip import Skipping
from dynrl.backbones.traced import Traced, TracedStand, Untraceable, fold_norms
from dynrl.backbones.walk import END, GO_ON, STOP, Point, State, Walk
from dynrl.cost import Executed, executed, macs_of
from dynrl.inputs import Form
from dynrl.inputs import parts as tensors_of
from dynrl.ops.gated_positions import Block
from dynrl.ops.gated_residual import run_rows
from dynrl.ops.move import beside, keep_rows, replace_some, take_rows
from dynrl.ops.pooled import summary

Standing = Stand | TracedStand
Channels = Literal["first", "last"]
TIMED_ROWS, ROUNDS = 8, 3  # memory formats are timed on so many rows, so often in turn
CLEARLY = 0.75  # how much of the time of channels_last contiguous maps must take to be preferred: timings are noisy
ROUNDED = 0.01  # outputs that change by more than this share of the largest one are not just rounded
LEAST_MACS = 10**7  # below this, Python takes most of the time in either format


class _OfModule(Backbone):
    """This is the base class of both kinds: a user's module, cut around its parts of given names.

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
            self._check_rows()
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
                if not _same(stand, self._cut.output(inputs)):
                    raise Untraceable(f"what torch.fx cut out of {type(self.module).__name__} computes something else")
        except Untraceable as error:
            self.way, self.why = "in place", str(error)
            self.exports, self.captures = False, ()  # type: ignore[misc]
            self._cut = Held(self.module, self._names, self._example, leaving)

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Refuse a module whose answer to an input depends on those beside it: blocks run on any of the rows."""
        both, kind = self._example(2, alike=False), type(self.module).__name__
        given = both.clone()
        alone, together = self._cut.output(both[:1].clone()), self._cut.output(given)
        if any(not torch.equal(x, tensors_of(both)[name]) for name, x in tensors_of(given).items()):
            raise ValueError(
                f"{kind} writes into its inputs, which are needed again where rows go on apart; write into a copy there"
            )
        if not alone.dim() or together.shape != (2 * alone.shape[0], *alone.shape[1:]):
            shapes = f"{tuple(alone.shape)} for one input and {tuple(together.shape)} for two"
            raise ValueError(f"expected {kind} to return a row for each input, got {shapes}")
        rounding, alone = _rounding(alone.dtype), alone.float()
        if float((together[: len(alone)].float() - alone).abs().max()) > rounding * float(alone.abs().max()):
            raise ValueError(
                f"expected what {kind} returns for an input to depend on that input only, but it changes with the "
                "inputs beside it (or by chance); a network that mixes the rows of a batch cannot be routed row by row"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._recut()  # the buffers that the pieces hold were replaced
        return self

    def train(self, mode: bool = True) -> Any:
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
            if not _same(twin._cut.output(inputs), expected):  # it reads its layers in ways that no trace shows
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


class SkipModule(_OfModule, Skipping):
    """A module of your own with blocks that may be skipped: action 1 runs a block, 0 passes the row through.

    Any chain of residual blocks will do: the blocks of a ViT or a language model, or those blocks of a convolutional
    network that keep the shape of their input. The full route is the module itself, with the same weights.

    A block may be given further tensors and may return a tuple: its first argument and the first value are the
    features. Tensors with a row for each input are cut down to the rows that run the block. Further values must be None
    or arguments that the block hands on. Caches are refused.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs: a tensor [B, ...], a tuple that begins with
            one, or an object with `logits`. It is held, not copied, and put into eval mode.
        input_shape: the shape of one input, or a batch of examples [n, ...]; a dict of either if the module takes
            tensors by name. Of examples, only shapes and the types of integers are kept.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks that keep their input's shape
            and contain their shortcut.
        family: the name under which `FAMILIES` holds a function that builds this backbone from the other arguments
            without `module`, for `load_backbone`; None for a backbone that is never loaded by name.
        classes: the number of outputs; may be left out.
        channels: "first" if features are [n, C, ...], "last" if they are [n, ..., C]. None reads it off the ops that
            compute on them: convolutions have channels first, linear layers and layer norms have them last.
        input_dtype: the type of inputs whose shape is given, by its name in torch, or a dict of these; None is the
            weights' type.

    Raises:
        ValueError: a block changes its input's shape, the module cannot be cut there (see `dynrl.backbones.traced` and
            `dynrl.backbones.held`), it fails on inputs of that form, or no op tells the channels.
    """

    family = "skip_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
    ) -> None:
        super().__init__(module, input_shape, blocks, family, channels, input_dtype, blocks=list(blocks))
        block_macs, width, self._lasts = [], 1, list[bool]()
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(self._example(1)))
        fixed_macs = [macs_of(ops)]
        for k, name in enumerate(blocks):
            x = stand.x
            ops, y = executed(lambda: stand(x.clone()))  # noqa: B023 (called at once)
            block_macs.append(macs_of(ops))
            self._lasts.append(self._last(k, takes_channels_last(ops, x.shape)))
            width = max(width, summary(x, self._lasts[-1]).shape[1])
            if y.shape != x.shape:
                shapes = f"{tuple(y.shape)} of {tuple(x.shape)}"
                raise ValueError(
                    f"expected blocks that keep their input's shape; {name!r} makes {shapes}: leave it out"
                )
            ops, stand = executed(lambda: stand.follow(y))  # noqa: B023
            fixed_macs.append(macs_of(ops))
        _set_classes(self, stand, classes)
        self._set_points(list(blocks), block_macs, fixed_macs, width)

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return _arrived(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        stand = self._standing(state)
        return [_arrived(state.walk, state.rows, stand.follow(stand.through(action)))]

    def _run_block(self, state: State, index: Tensor) -> Tensor:
        stand: Any = self._standing(state)
        return run_rows(stand.x, index, stand)

    def _run_rest(self, state: State) -> State:
        stand: Any = self._standing(state)
        return _arrived(state.walk, state.rows, stand.follow(stand.x))

    def _gated_run(self, state: State, gates: Tensor) -> State:
        stand, x = self._standing(state), state.features
        skip, run = (beside(gates[:, choice], x) for choice in (0, 1))
        # A block may overwrite its input, so it gets a copy.
        return _arrived(state.walk, state.rows, stand.follow(run * stand(x.clone()) + skip * x))

    def _summary(self, point: int, x: Tensor) -> Tensor:
        return summary(x, self._lasts[point])

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each block runs on the first rows of the batch, as many as chose to run it."""
        counts = (route == 1).sum(0).tolist()

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for count in counts:
                if count:
                    stand.part(slice(count))
                stand = stand.follow(stand.x)
            return stand

        return run


class TokenModule(_OfModule, Positions):
    """A module of your own with blocks on tokens: action c runs a block on the share shares[c] of an input's tokens.

    The blocks of ViTs and of BERT-like encoders will do, which add places to tokens in front of their blocks. The full
    route is the module itself, with the same weights. The layers that score tokens are made here and are untrained;
    `dynrl.pretraining.pretrain` trains them with the module.

    A block may be given further tensors. Those with a row for each input are cut down to the rows that run the block,
    and all of them to the tokens that run: in each dimension, behind the first, that is as long as there are tokens.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs, see `SkipModule`; it is held, not copied,
            and put into eval mode.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks from tokens [n, T, d] to tokens,
            which contain their shortcut.
        family, classes, input_dtype: the same as in `SkipModule`.
        shares: the shares of the tokens, one for each choice, rising to 1.
        leading: the number of tokens in front, such as a class token, that run whenever any token does.
        mask: the name of the input [n, T] that is 0 where a token is padding, as tokenizers give it. The blocks must be
            given a mask made of it. If no input has this name, there is no padding.

    Raises:
        ValueError: a block is given no tokens, what it makes of a token depends on the token's place in the row or on
            padding, or a reason of `SkipModule`.
    """

    family = "token_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        input_dtype: Any = None,
        shares: tuple[float, ...] = SHARES,
        leading: int = 1,
        mask: str = "attention_mask",
    ) -> None:
        config: dict[str, Any] = {"blocks": list(blocks), "shares": list(shares), "leading": leading, "mask": mask}
        super().__init__(module, input_shape, blocks, family, None, input_dtype, **config)
        self.leading = leading
        inputs = self._example(1)
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(inputs))
        stands, fixed_macs = list[Any](), [macs_of(ops)]
        for name in blocks:
            _check_tokens(name, stand)
            stands.append(stand)
            y = stand(stand.x.detach().clone())
            ops, stand = executed(lambda: stands[-1].follow(y))  # noqa: B023 (called at once)
            fixed_macs.append(macs_of(ops))
        _set_classes(self, stand, classes)
        _, tokens, width = stands[0].x.shape
        padded = self.form.named and mask in self.input_shape
        if padded:
            self._check_mask(inputs, tokens)

        def block_macs(point: int, count: int) -> int:
            x, places = stands[point].x.detach()[:, :count].clone(), torch.arange(count, device=inputs.device)
            return macs_of(executed(lambda: stands[point](x, None, places.unsqueeze(0)))[0]) if count else 0

        widths = [width] * len(stands)
        self._set_points(list(blocks), tuple(shares), tokens, widths, block_macs, fixed_macs, padded)
        self.scorers.to(stands[0].x.detach())

    @torch.no_grad()
    def _check_mask(self, inputs: Any, tokens: int) -> None:
        """Refuse a mask of another length, and blocks in which real tokens see padding."""
        mask = self.config["mask"]
        if self.input_shape[mask] != (tokens,):
            raise ValueError(
                f"expected {mask!r}, which says where tokens are padding, to be of shape ({tokens},), got "
                f"{self.input_shape[mask]}; give the name of such an input as mask="
            )
        padded = inputs.clone()
        padded[mask][:, tokens - tokens // 2 :] = 0
        stand: Any = self._cut.enter(padded)
        for name in self._names:
            _check_tokens(name, stand)
            x, real = stand.x, tokens - tokens // 2
            y, other = stand(x.clone()), x.clone()
            other[:, real:] += torch.randn_like(other[:, real:])
            if not _close(stand(other)[:, :real], y[:, :real]):
                raise ValueError(
                    f"expected blocks that are given a mask, so that no token sees padding; in {name!r}, tokens see "
                    f"those where {mask!r} is 0. Give the name of the input that says where padding is as mask="
                )
            stand = stand.follow(y)

    def _real(self, inputs: Any) -> Tensor | None:
        return inputs[self.config["mask"]] != 0 if self._padded else None

    def _standing(self, state: State) -> Standing:
        """Return what goes on from `state`; a copy or a merged state has to enter the module anew."""
        if state.held is not None:
            return state.held
        return self._cut.at(state.point, state.features[0], state.get(state.walk.inputs))

    def _lead(self, inputs: Any) -> tuple[Tensor, Any]:
        return _tokens(self._cut.enter(inputs))

    def _block(self, state: State) -> Block:
        return self._standing(state)

    def _follow(self, state: State, x: Tensor) -> tuple[Tensor, Any]:
        return _tokens(self._standing(state).follow(x))


def _tokens(stand: Standing | Tensor) -> tuple[Tensor, Any]:
    """Return the tokens of a stand and the stand, or outputs and None."""
    if isinstance(stand, Tensor):
        return stand, None
    # What runs on some tokens overwrites them, and a forward that is held may still need its own.
    return stand.x.clone() if isinstance(stand, Stand) else stand.x, stand


@torch.no_grad()
def _check_tokens(name: str, stand: Any) -> None:
    """Refuse a block that is given no tokens, or that needs to know where in its row a token stands."""
    example = stand.x.detach()
    if example.dim() != 3:
        raise ValueError(
            f"expected blocks of tokens [batch, tokens, channels]; {name!r} is given {list(example.shape)}"
        )
    x, tokens = torch.randn_like(example), example.shape[1]
    shuffled = torch.randperm(tokens, device=example.device)
    half = shuffled[: -(-tokens // 2)]
    try:
        whole = stand(x.clone())
        runs = [stand(x[:, some].clone(), None, some.unsqueeze(0)) for some in (shuffled, half, half.sort()[0])]
    except Exception as error:  # a user's block may raise anything on fewer tokens
        raise ValueError(f"expected blocks that run on any number of tokens; {name!r} does not: {error}") from error
    if not (_close(runs[0], whole[:, shuffled]) and _close(runs[1][:, half.argsort()], runs[2])):
        raise ValueError(
            f"expected blocks that treat tokens alike wherever they stand in the row; {name!r} does not: some tokens "
            "alone would mean nothing to it"
        )


def _close(got: Tensor, expected: Tensor, by: float = 1e-2) -> bool:
    """Tell whether two tensors agree up to this share, or up to this share of the largest number expected."""
    # Tokens that see padding only may be NaN.
    close = {"rtol": by, "atol": by * float(expected.nan_to_num().abs().max())}
    return got.shape == expected.shape and torch.allclose(got, expected, equal_nan=True, **close)


def _same(got: Tensor, expected: Tensor) -> bool:
    """Tell whether two tensors differ by no more than rounding in their number type."""
    return _close(got, expected, _rounding(expected.dtype))


def _rounding(dtype: torch.dtype) -> float:
    """Return the share of the largest output by which rounding may change outputs; CUDA rounds float32 to TF32."""
    return max(ROUNDED, torch.finfo(dtype).eps ** 0.5)


class ExpertModule(_OfModule):
    """A module of your own with mixtures of experts: action c lets each token take counts[c] experts of a layer.

    How many is the decision, for all tokens of an input alike; which ones is up to the layer's own router, and their
    weights are by its own rule. The layer's code runs with another number of experts, so a shared expert runs whatever
    is chosen. The full route is the module itself, with the same weights.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs, see `SkipModule`; it is held, not copied,
            and put into eval mode.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks that contain their shortcut and
            a mixture of experts.
        layer: the name of the mixture within each block, such as "mlp"; "" if it is the block itself.
        family, classes, channels, input_dtype: the same as in `SkipModule`.
        counts: the numbers of experts, one for each choice, rising to the layer's own; 0 leaves the mixture out, but
            for its router and a shared expert. None takes 1, 2, 4 and so on, and the layer's own.
        attribute: the name of the number in the layer, or in modules in it.

    Raises:
        ValueError: a layer has no such number, its code does not go by it or fails with another one, its experts are of
            unequal size, or a reason of `SkipModule`.

    Source: mixtures of experts of which each token takes k (Shazeer et al. 2017, ICLR); that easy inputs need fewer
    (Huang et al. 2024, ACL, "Harder Tasks Need More Experts").
    """

    family, decision = "expert_module", "expert"
    _kinds: list[list[nn.Module]] | None

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        layer: str,
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
        counts: tuple[int, ...] | None = None,
        attribute: str = "top_k",
    ) -> None:
        config: dict[str, Any] = {"blocks": list(blocks), "layer": layer, "attribute": attribute}
        super().__init__(module, input_shape, blocks, family, channels, input_dtype, **config)
        self._counts = self._known_counts(counts)
        self.config["counts"] = list(self._counts)
        block_macs, width, self._lasts = [], 1, list[bool]()
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(self._example(1)))
        fixed_macs = [macs_of(ops)]
        for k in range(len(blocks)):
            x = stand.x
            ops, y = executed(lambda: stand(x.clone()))  # noqa: B023 (called at once)
            block_macs.append(self._macs(stand, macs_of(ops)))
            self._lasts.append(self._last(k, takes_channels_last(ops, x.shape)))
            width = max(width, summary(x, self._lasts[-1]).shape[1])
            ops, stand = executed(lambda: stand.follow(y))  # noqa: B023
            fixed_macs.append(macs_of(ops))
        _set_classes(self, stand, classes)
        self._pose(
            [Point(name, len(self._counts)) for name in blocks],
            costs=[[fixed + one for one in macs] for fixed, macs in zip(fixed_macs[1:], block_macs, strict=True)],
            start_macs=fixed_macs[0],
            full_route=(len(self._counts) - 1,) * len(blocks),
            feature_width=width,
        )
        self._check_mixed()

    @torch.no_grad()
    def _check_mixed(self) -> None:
        """Refuse layers that are not given the rows one behind the other: rows would take the experts of others."""
        inputs, route = self._example(2, alike=False), torch.zeros(2, self.columns, dtype=torch.int64)
        route[1] = len(self._counts) - 1
        route = route.to(next(self.parameters()).device)
        try:
            fits = _same(self.run_route(inputs, route).outputs[1:], self.run_route(inputs[1:], route[1:]).outputs)  # type: ignore[index, arg-type]
        except RuntimeError:  # what a layer is given cannot be parted into rows
            fits = False
        if not fits:
            raise ValueError(
                f"expected the mixtures in {self._names} to be given features with the rows first, [batch, tokens, "
                "channels] or the tokens of one row behind those of another; with other rows beside it, a row takes "
                "their number of experts. Let the block hand its mixture the rows first"
            )

    def _known_counts(self, counts: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the numbers of experts, checked against the layers' own."""
        found = dict[str, int]()
        for name in self._names:
            block, layer = self.module.get_submodule(name), self.config["layer"]
            if layer not in (known := [inner for inner, _ in block.named_modules()]):
                near = get_close_matches(layer, known, 4, 0)
                raise ValueError(f"expected the name of a layer in {name!r}, such as one of {near}, got {layer!r}")
            found[name] = own_count(block.get_submodule(layer), self.config["attribute"])
        own = max(found.values())
        if min(found.values()) < own:
            raise ValueError(f"expected layers that take equally many experts, got {found}; name those that do")
        if counts is None:
            counts = (*(2**i for i in range(own.bit_length()) if 2**i < own), own)
        rising = all(less < more for less, more in pairwise((-1, *counts)))
        if len(counts) < 2 or not rising or counts[-1] != own:
            raise ValueError(
                f"expected two numbers of experts or more, such as (0, {own}), that rise to the layer's own, got "
                f"{tuple(counts)}"
            )
        return tuple(counts)

    def _macs(self, stand: Any, own: int) -> list[int]:
        """Return what the block costs at each number of experts, as `stand` is before it; refuse what does not fit."""
        name, x, found = self._names[stand.k], stand.x.detach(), list[int]()
        for choice, count in enumerate(self._counts):
            block, seen = self._mixed(stand.k, partial(_always, choice)), list[int]()
            for given in (x, torch.randn_like(x)):
                try:
                    seen.append(macs_of(executed(lambda: stand(given.clone(), by=block))[0]))  # noqa: B023 (at once)
                except Exception as error:  # a user's layer may raise anything
                    raise ValueError(
                        f"the mixture in {name!r} fails with {count} experts a token ({type(error).__name__}: {error})"
                        "; give other counts="
                    ) from error
            if seen[0] != seen[1]:
                raise ValueError(f"expected experts of equal size in {name!r}, so that MACs do not depend on the input")
            found.append(seen[0])
        if found[-1] != own or any(less >= more for less, more in pairwise(found)):
            raise ValueError(
                f"expected the MACs of {name!r} to rise with {self.config['attribute']!r} at {self._counts}, got "
                f"{found}; the code of the mixture does not go by it"
            )
        return found

    def _recut(self) -> None:
        super()._recut()
        self._kinds = None  # twins do not know that modules were moved, replaced or put into another mode

    def _mixed(self, point: int, mix: Mix) -> nn.Module:
        blocks, layer = [self.module.get_submodule(name) for name in self._names], self.config["layer"]
        kinds = self._kinds
        if kinds is None:
            layers = [block.get_submodule(layer) for block in blocks]
            self._kinds = kinds = [kinds_of(each, self.config["attribute"], self._counts) for each in layers]
        return mixed(blocks[point], layer, kinds[point], mix)

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return _arrived(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        stand: Any = self._standing(state)
        y = stand(state.features, by=self._mixed(state.point, by_choice(action, len(self._counts))))
        return [_arrived(state.walk, state.rows, stand.follow(y))]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        stand: Any = self._standing(state)
        y = stand(state.features, by=self._mixed(state.point, by_gates(gates)))
        return _arrived(state.walk, state.rows, stand.follow(y))

    def observe(self, state: State) -> Tensor:
        """Return the mean of each channel of the features before the block."""
        return summary(state.features, self._lasts[state.point])

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each number of experts is for neighbouring rows, as many as chose it."""
        sizes = [torch.bincount(chosen, minlength=self.num_choices).tolist() for chosen in route.t()]
        blocks = [self._mixed(point, side_by_side(mine)) for point, mine in enumerate(sizes)]

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for block in blocks:
                stand = stand.follow(stand(stand.x, by=block))
            return stand

        return run


def _always(choice: int, run: Run, x: Tensor) -> Tensor:
    return run(choice, x)


class ExitModule(_OfModule, Exits):
    """A module of your own with classifiers behind some of its layers: action 0 stops with an answer, 1 goes on.

    An early classifier is one linear layer on images' maps reduced to 4x4, or on each channel's mean of other features.
    The classifiers are made here and are untrained; `dynrl.pretraining.pretrain` trains all exits together. The last
    exit is the module's own output.

    Args:
        module: a module with outputs [B, classes]; see `SkipModule`.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        layers: the names (as in `module.named_modules()`), in running order, of layers that everything the module
            computes goes through; there is an exit behind each.
        family, classes, channels, input_dtype: the same as in `SkipModule`.
        sees: see `ExitResNet`.

    Raises:
        ValueError: the outputs are no classes, or a reason of `SkipModule`.
    """

    family = "exit_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        layers: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        channels: Channels | None = None,
        input_dtype: Any = None,
        sees: str = SEES[0],
    ) -> None:
        super().__init__(module, input_shape, layers, family, channels, input_dtype, leaving=True, layers=list(layers))
        with torch.no_grad():
            said = self._cut.output(self._example(1))
        if said.dim() != 2:
            raise ValueError(f"expected a module with outputs [batch, classes] for exits, got {tuple(said.shape)}")
        _set_classes(self, said, classes)
        self.heads, stage_macs, widths, self._lasts = nn.ModuleList(), [], [], list[bool]()
        self._shapes = list[torch.Size]()
        stand: Any
        before, stand = executed(lambda: self._cut.enter(self._example(1)))
        for k in range(len(layers)):
            ops, x = executed(stand.part)
            stage: list[Executed] = [*before, *ops]
            macs = macs_of(stage)
            self._lasts.append(self._last(k, gives_channels_last(stage, x.shape)))
            seen = early_inputs(x.detach(), self._lasts[k])
            self.heads.append(nn.Linear(seen.shape[1], self.config["classes"], device=x.device, dtype=x.dtype))
            widths.append(summary(x, self._lasts[k]).shape[1])
            self._shapes.append(x.shape[1:])
            ops, _ = executed(lambda: self.heads[k](seen))  # noqa: B023 (called at once)
            stage_macs.append(macs + macs_of(ops))
            before, stand = executed(lambda: stand.follow(x))  # noqa: B023
        stage_macs.append(macs_of(before))
        self._set_points(list(layers), stage_macs, widths, sees)

    def _exit(self, k: int, x: Tensor) -> Tensor:
        return self.heads[k](early_inputs(x, self._lasts[k]))

    def _summary(self, k: int, x: Tensor) -> Tensor:
        return summary(x, self._lasts[k])

    def _reach(self, walk: Walk, rows: Tensor, stand: Standing | Tensor) -> State:
        """Run the part that `stand` is before, whose state has the features behind it, and keep the exit's answer."""
        if isinstance(stand, Tensor):
            return _arrived(walk, rows, stand)
        x = stand.part()
        walk.put_output(rows, self._exit(stand.k, x))
        return State(walk, stand.k, rows, x, stand)

    def _start(self, walk: Walk, rows: Tensor, inputs: Any) -> State:
        return self._reach(walk, rows, self._cut.enter(inputs))

    def _run(self, state: State, action: Tensor) -> list[State]:
        if is_exporting():
            return self._exported_run(state, action)
        walk, rows, reached = state.walk, state.rows, []
        ended, places = keep_rows(action == STOP, rows), None
        if ended is not None:
            reached.append(State(walk, END, ended[0]))
            places = torch.arange(rows.shape[0], device=rows.device)
        if ended is None or ended[0] is not rows:
            x = state.features
            if places is not None:
                going = keep_rows(action == GO_ON, rows, x, places)
                assert going is not None, "some rows go on if not all of them stop"
                rows, x, places = going
            reached.append(self._reach(walk, rows, self._standing(state).follow(x, places)))
        elif state.held is not None:
            state.held.end()
        return reached

    def _run_rows(self, state: State, index: Tensor) -> State:
        stand: Any = self._standing(state)
        x, rows = take_rows(state.features, index), state.rows.index_select(0, index)
        return self._reach(state.walk, rows, stand.follow(x, index))

    def _exported_run(self, state: State, action: Tensor) -> list[State]:
        """Do `_run` in a program that is exported. Such a state holds the features of all slots, too."""
        walk, k = state.walk, state.point
        whole: Tensor = state.features if state.together else state.held
        stopped, going = keep_rows(action == STOP, state.rows), keep_rows(action == GO_ON, state.rows)
        assert stopped is not None and going is not None and isinstance(self._cut, Traced)
        (rows,), cut, size = going, self._cut, (walk.all_rows.shape[0],)

        def stage(x: Tensor) -> list[Tensor]:
            reached = TracedStand(cut, k, x).follow(x)
            if isinstance(reached, Tensor):
                return [reached]
            y = reached.part()
            return [self._exit(k + 1, y), y]

        classes = whole.new_zeros(*size, self.config["classes"])
        more = [whole.new_zeros(*size, *self._shapes[k + 1])] if k + 1 < len(self.points) else []
        run = torch.zeros_like(walk.all_rows, dtype=torch.bool).index_fill(0, rows, True)
        said, *features = replace_some(run, stage, whole, classes, *more)
        walk.put_output(rows, said.index_select(0, rows))
        on = [State(walk, k + 1, rows, x.index_select(0, rows), x) for x in features] or [State(walk, END, rows)]
        return [State(walk, END, stopped[0]), *on]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        assert isinstance(state.walk, GatedWalk)
        state.walk.leave(gates, STOP)
        return self._reach(state.walk, state.rows, self._standing(state).follow(state.features))

    def training_outputs(
        self, inputs: Any, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield all exits of one pass, weighted equally (Huang et al. 2018, section 4); without a rate, the last."""
        stand: Standing | Tensor = self._cut.enter(inputs)
        answers, rows = [], torch.arange(len(inputs), device=inputs.device)
        while not isinstance(stand, Tensor):
            x = stand.part()
            if rate is not None:
                answers.append(Answer(self._exit(stand.k, x), rows))
            # What follows may write in place, into what the exit needs for its gradients.
            stand = stand.follow(x.clone() if torch.is_grad_enabled() else x)
        yield [*answers, Answer(stand, rows)]

    def ideal(self, inputs: Any, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each stage and its exit run on the first rows of the batch, as many as arrive."""
        counts = (route == GO_ON).sum(0).tolist()

        def run() -> Any:
            stand: Any = self._cut.enter(inputs)
            for count in counts:
                x = stand.part()
                self._exit(stand.k, x)
                if not count:
                    return stand.end()
                stand = stand.follow(x[:count], torch.arange(count, device=x.device))
            return stand

        return run


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


def _check_training(module: nn.Module, names: Sequence[str]) -> None:
    """Raise `Untraceable` if the module can be cut in eval mode alone, for example as it returns more in training."""
    module.train()
    try:
        Traced(module, names)
    except ValueError as error:
        raise Untraceable(f"in training mode, {error}") from error
    finally:
        module.eval()


def _cut_again(backbone: _OfModule, keys: Any) -> None:
    backbone._recut()


def _arrived(walk: Walk, rows: Tensor, stand: Standing | Tensor) -> State:
    """Return the state of `rows` that stand before a part, or have got their answer."""
    if not isinstance(stand, Tensor):
        return State(walk, stand.k, rows, stand.x, stand)
    walk.put_output(rows, stand)
    return State(walk, END, rows)


def _set_classes(backbone: Backbone, output: Tensor, classes: int | None) -> None:
    if output.dim() < 2 or classes not in (None, output.shape[-1]):
        wanted = "classes" if classes is None else classes
        raise ValueError(f"expected a module with outputs [batch, {wanted}], got {tuple(output.shape)} for one input")
    backbone.config["classes"] = output.shape[-1]
