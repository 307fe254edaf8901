"""A user's module becomes a backbone: its blocks may be skipped, or its layers get exits; both are named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynrl.backbones.base import Backbone
from dynrl.backbones.channels import gives_channels_last, takes_channels_last
from dynrl.backbones.early import early_inputs
from dynrl.backbones.exit import Exits
from dynrl.backbones.skip import Skipping
from dynrl.cost import executed_macs
from dynrl.ops.move import apart
from dynrl.ops.pooled import summary


class _Tracer(fx.Tracer):
    """The tracer looks into the modules that hold the parts, and into no other modules."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._open = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name not in self._open


class Part:
    """A part is a named piece of a module, as a function of rows; its other arguments are constants."""

    def __init__(self, module: nn.Module, node: fx.Node) -> None:
        self.module, self._more, self._options = module, node.args[1:], dict(node.kwargs)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        """Run the part on rows."""
        return self.module(x, *self._more, **self._options)


def cut(module: nn.Module, names: Sequence[str]) -> tuple[list[fx.GraphModule], list[Part]]:
    """Cut `module` around its parts of these names, which it must run one after the other.

    Args:
        module: a module that maps one tensor to one tensor.
        names: names of parts, as in `module.named_modules()`.

    Returns:
        the pieces before the first part, between parts and behind the last one (one more than parts), and the parts.
        Both hold the weights of `module` themselves, not copies.

    Raises:
        ValueError: there is no such part; a part is not run exactly once, on one tensor, in this order; a tensor passes
            a part by (a shortcut around it); or the module that holds the parts decides by the values of its inputs, so
            that torch.fx cannot trace it.
    """
    parts = dict(module.named_modules())
    missing = [name for name in names if not name or name not in parts]
    if missing or not names or len(set(names)) < len(names):
        found = [name for name in parts if name][:40]
        raise ValueError(f"expected different names of parts of the module, got {list(names)}; it has {found} ...")
    kind = type(module).__name__
    options = {
        p.name: p.default for p in inspect.signature(module.forward).parameters.values() if p.default is not p.empty
    }
    try:
        graph = _Tracer(names).trace(module, concrete_args=options)
    except Exception as error:  # a user's forward may raise anything on a tracer's proxies
        raise ValueError(
            f"the part of {kind} that holds {names[0]!r} cannot be traced by torch.fx ({error}); wrap it in a module "
            "whose forward takes one tensor and decides nothing by its values"
        ) from error
    _, *more = (node for node in graph.nodes if node.op == "placeholder")
    if len(more) != len(options):
        raise ValueError(f"expected {kind}.forward to take one tensor; wrap it in a module that does")
    for node in more:  # these nodes only check that an option has its default
        _erase(graph, node)
    nodes = list(graph.nodes)
    calls = []
    for name in names:
        mine = [node for node in nodes if node.op == "call_module" and node.target == name]
        if len(mine) != 1:
            raise ValueError(
                f"expected {kind} to run {name!r} once for an input, it does so {len(mine)} times; name other parts"
            )
        given = mine[0].all_input_nodes
        if len(given) != 1 or mine[0].args[:1] != (given[0],):
            raise ValueError(f"expected {name!r} to be given one tensor and constants, it is given {mine[0].args}")
        calls.append(mine[0])
    at = [nodes.index(call) for call in calls]
    if at != sorted(at):
        in_order = [name for _, name in sorted(zip(at, names, strict=True))]
        raise ValueError(f"expected the parts in the order in which {kind} runs them: {in_order}")
    between = []
    for k in range(len(calls) + 1):
        first = 0 if k == 0 else at[k - 1]
        last = at[k] if k < len(calls) else len(nodes) - 1
        entry = nodes[0] if k == 0 else calls[k - 1]
        result = calls[k].args[0] if k < len(calls) else nodes[-1].args[0]
        between.append(fx.GraphModule(module, _copied(nodes[first + 1 : last], entry, result, names, kind)))
    return between, [Part(parts[name], call) for name, call in zip(names, calls, strict=True)]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _copied(nodes: list[fx.Node], entry: fx.Node, result: Any, names: Sequence[str], kind: str) -> fx.Graph:
    """Copy `nodes` into a graph that runs from `entry` to `result`."""
    graph = fx.Graph()
    made = {entry: graph.placeholder("x")}

    def known(node: fx.Node) -> fx.Node:
        if node not in made:
            if node.op != "get_attr":
                raise ValueError(
                    f"{kind} needs {node.name!r}, made before one of {list(names)}, after it, too: such a part is no "
                    "whole block; name the block that has its shortcut inside"
                )
            made[node] = graph.node_copy(node)
        return made[node]

    for node in nodes:
        if node.op != "placeholder":
            made[node] = graph.node_copy(node, known)
    if not isinstance(result, fx.Node):
        raise ValueError(f"expected {kind}.forward to return one tensor, it returns {type(result).__name__}")
    graph.output(known(result))
    return graph


class _OfModule(Backbone):
    """This is the base class of both kinds: a user's module, cut around its parts of given names."""

    def __init__(
        self, module: nn.Module, input_shape: Sequence[int], parts: Sequence[str], family: str | None, **config: Any
    ) -> None:
        super().__init__()
        uncounted = [name for name, part in module.named_modules() if isinstance(part, nn.RNNBase)]
        if uncounted:
            raise ValueError(
                f"the compute of {uncounted} cannot be counted; recurrent layers are for SkipGRU and SkipLSTM"
            )
        self.module, self._parts_named = module, list(parts)
        if family is not None:
            self.family = family  # type: ignore[misc]
        self.input_shape = tuple(input_shape)
        self.config = {"input_shape": list(input_shape), **config}
        self.register_load_state_dict_post_hook(_cut_again)  # with assign=True, loading replaces the parameters
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._cut()  # the buffers that the pieces hold were replaced
        return self

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self._cut()  # the pieces hold the mode as a constant, for example whether dropout is on
        return self

    def _cut(self) -> None:
        self._between, self._named = cut(self.module, self._parts_named)

    def _example(self) -> Tensor:
        weight = next(self.module.parameters())
        return torch.zeros(1, *self.input_shape, dtype=weight.dtype, device=weight.device)


class SkipModule(_OfModule, Skipping):
    """A module of your own with blocks that may be skipped: action 1 runs a block, 0 passes the row through.

    Any chain of residual blocks will do: the blocks of a torchvision or timm ViT, or those ResNet blocks that keep the
    shape of their input. The full route is the module itself, with the same weights.

    Args:
        module: a module that maps one tensor [B, *input_shape] to outputs [B, classes]; it is held, not copied, and put
            into eval mode.
        input_shape: the shape of one input.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks that keep their input's shape
            and contain their shortcut.
        family: the name under which `FAMILIES` holds a function that builds this backbone from the other arguments
            without `module`, for `load_backbone`; None for a backbone that is never loaded by name.
        classes: the number of outputs; may be left out.

    Raises:
        ValueError: a block changes its input's shape, or `cut` refuses the blocks.
    """

    family = "skip_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        blocks: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__(module, input_shape, blocks, family, blocks=list(blocks))
        block_macs, width, x, self._last = [], 1, self._example(), list[bool]()
        macs, lead = executed_macs(self._between[0], x)
        x, fixed_macs = lead, [macs]
        for name, block, behind in zip(blocks, self._named, self._between[1:], strict=True):
            self._last.append(takes_channels_last(block, x.clone()))
            width = max(width, summary(x, self._last[-1]).shape[1])
            macs, y = executed_macs(block, x.clone())
            if y.shape != x.shape:
                shapes = f"{tuple(y.shape)} of {tuple(x.shape)}"
                raise ValueError(
                    f"expected blocks that keep their input's shape; {name!r} makes {shapes}: leave it out"
                )
            block_macs.append(macs)
            macs, x = executed_macs(behind, y)
            fixed_macs.append(macs)
        _set_classes(self, x, classes)
        self._set_points(list(blocks), block_macs, fixed_macs, width)

    def _lead(self, inputs: Tensor) -> Tensor:
        return apart(self._between[0](inputs), inputs)  # blocks write in place, but the inputs belong to the user

    def _block(self, point: int) -> Callable[[Tensor], Tensor]:
        return self._named[point]

    def _follow(self, point: int, x: Tensor) -> Tensor:
        return self._between[point + 1](x)

    def _summary(self, point: int, x: Tensor) -> Tensor:
        return summary(x, self._last[point])


class ExitModule(_OfModule, Exits):
    """A module of your own with classifiers behind some of its layers: action 0 stops with an answer, 1 goes on.

    An early classifier is one linear layer on images' maps reduced to 4x4, or on each channel's mean of other features.
    The classifiers are made here and are untrained; `dynrl.pretraining.pretrain` trains all exits together. The last
    exit is the module's own output.

    Args:
        module: a module that maps one tensor [B, *input_shape] to outputs [B, classes]; it is held, not copied, and put
            into eval mode.
        input_shape: the shape of one input.
        layers: the names (as in `module.named_modules()`), in running order, of layers that everything the module
            computes goes through; there is an exit behind each.
        family: the same as in `SkipModule`.
        classes: the number of outputs; may be left out.

    Raises:
        ValueError: `cut` refuses the layers.
    """

    family = "exit_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        layers: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__(module, input_shape, layers, family, layers=list(layers))
        x = self._example()
        _set_classes(self, module(x), classes)
        self.heads, stage_macs, widths, self._last = nn.ModuleList(), [], [], list[bool]()
        for k in range(len(layers)):
            self._last.append(gives_channels_last(partial(self._advance_to, k), x.clone()))
            macs, x = executed_macs(partial(self._advance_to, k), x)
            seen = early_inputs(x, self._last[k])
            self.heads.append(nn.Linear(seen.shape[1], self.config["classes"], device=x.device, dtype=x.dtype))
            widths.append(summary(x, self._last[k]).shape[1])
            stage_macs.append(macs + executed_macs(self.heads[k], seen)[0])
        stage_macs.append(executed_macs(self._between[-1], x)[0])
        self._set_points(list(layers), stage_macs, widths)

    def _advance_to(self, k: int, x: Tensor) -> Tensor:
        x = self._between[k](x)
        return self._named[k](x) if k < len(self._named) else x

    def _exit(self, k: int, x: Tensor) -> Tensor:
        return x if k == len(self._named) else self.heads[k](early_inputs(x, self._last[k]))

    def _summary(self, k: int, x: Tensor) -> Tensor:
        return summary(x, self._last[k])


def _cut_again(backbone: _OfModule, keys: Any) -> None:
    backbone._cut()


def _set_classes(backbone: Backbone, output: Tensor, classes: int | None) -> None:
    if output.dim() != 2 or classes not in (None, output.shape[1]):
        wanted = "classes" if classes is None else classes
        raise ValueError(f"expected a module with outputs [batch, {wanted}], got {tuple(output.shape)} for one input")
    backbone.config["classes"] = output.shape[1]
