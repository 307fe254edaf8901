"""torch.fx cuts a user's module around its parts; what is cut can be exported, and costs no time between them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynrl.backbones.modes import Modes
from dynrl.ops.gated_residual import gated_residual
from dynrl.ops.move import apart

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def hooked(module: nn.Module) -> bool:
    """Tell whether something is called before or behind a module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def holders(names: Sequence[str]) -> set[str]:
    """Return the names of the modules inside the outermost one that hold what has these names."""
    return {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}


class Untraceable(ValueError):
    """This says why torch.fx cannot cut a module, which may still be held where it runs (`dynrl.backbones.held`)."""


class _Tracer(fx.Tracer):
    """The tracer looks into the modules that hold the parts, and into no other modules."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._open = holders(names)
        self._outside = Modes.now()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name not in self._open

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # A graph has no modes: what is computed without gradients, or in other number types, would be so no more.
        if Modes.now() != self._outside:
            raise Untraceable("its forward turns gradients or autocast on or off")
        return super().create_node(*args, **kwargs)


class Part:
    """A part is a named piece of a module, as a function of rows; its other arguments are constants."""

    def __init__(self, module: nn.Module, node: fx.Node) -> None:
        self.module, self._more, self._options = module, node.args[1:], dict(node.kwargs)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())

    def __call__(self, x: Tensor, by: nn.Module | None = None) -> Tensor:
        """Run the part on rows, or what runs in its place."""
        return (self.module if by is None else by)(x, *self._more, **self._options)


def cut(module: nn.Module, names: Sequence[str]) -> tuple[list[fx.GraphModule], list[Part]]:
    """Cut `module` around its parts of these names, which it must run one after the other.

    Args:
        module: a module that maps one tensor to one tensor.
        names: names of parts, as in `module.named_modules()`.

    Returns:
        the pieces before the first part, between parts and behind the last one (one more than parts), and the parts.
        Both hold the weights of `module` themselves, not copies.

    Raises:
        ValueError: a part is not run exactly once, on one tensor, in this order; or what a part's features are made of
            passes it by (a shortcut around it).
        Untraceable: the module takes, hands to its parts, or returns more than one tensor; it decides by the values of
            its inputs, or has hooks or modes of its own, so that torch.fx cannot trace it; or something else passes a
            part by, such as the number of rows.
    """
    parts, kind = dict(module.named_modules()), type(module).__name__
    options = {
        p.name: p.default for p in inspect.signature(module.forward).parameters.values() if p.default is not p.empty
    }
    if hooked(module) or "forward" in vars(module):
        raise Untraceable(f"{kind} has hooks, or a forward of its own, which torch.fx passes by")
    try:
        graph = _Tracer(names).trace(module, concrete_args=options)
    except Exception as error:  # a user's forward may raise anything on a tracer's proxies
        raise Untraceable(f"torch.fx cannot trace what holds {names[0]!r} in {kind}: {error}") from error
    _, *more = (node for node in graph.nodes if node.op == "placeholder")
    if len(more) != len(options):
        raise Untraceable(f"{kind}.forward takes more than one tensor")
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
            raise Untraceable(f"{name!r} is given more than one tensor: {mine[0].args} {dict(mine[0].kwargs)}")
        calls.append(mine[0])
    at = [nodes.index(call) for call in calls]
    if at != sorted(at):
        in_order = [name for _, name in sorted(zip(at, names, strict=True))]
        raise ValueError(f"expected the parts in the order in which {kind} runs them: {in_order}")
    feeding = _feeding(nodes, [call.args[0] for call in calls])
    between = []
    for k in range(len(calls) + 1):
        first = 0 if k == 0 else at[k - 1]
        last = at[k] if k < len(calls) else len(nodes) - 1
        entry = nodes[0] if k == 0 else calls[k - 1]
        result = calls[k].args[0] if k < len(calls) else nodes[-1].args[0]
        between.append(
            fx.GraphModule(module, _copied(nodes[first + 1 : last], entry, result, feeding, names[k - 1], kind))
        )
    return between, [Part(parts[name], call) for name, call in zip(names, calls, strict=True)]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _feeding(nodes: list[fx.Node], features: Sequence[Any]) -> set[fx.Node]:
    """Return the nodes that the parts' features are made of, but not those of sizes, nor the inputs themselves."""
    sizes, found, waiting = set[fx.Node](), set[fx.Node](), list(features)
    for node in nodes:
        shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        computed = node.op.startswith("call") and node.all_input_nodes
        if shape or node.target == "size" or (computed and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in sizes and (node.op != "placeholder" or node in features):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _copied(
    nodes: list[fx.Node], entry: fx.Node, result: Any, feeding: set[fx.Node], behind: str, kind: str
) -> fx.Graph:
    """Copy `nodes` into a graph that runs from `entry`, the part `behind` which they are, to `result`.

    No node from before may be needed, least of all one of those that are `feeding` the parts.
    """
    graph = fx.Graph()
    made = {entry: graph.placeholder("x")}

    def known(node: fx.Node) -> fx.Node:
        if node not in made:
            if node.op != "get_attr":
                what = f"{kind} needs what {str(node.target)!r} made before {behind!r} after it, too"
                if node not in feeding:
                    raise Untraceable(what)
                raise ValueError(f"{what}: such a part is no whole block; name the block that has its shortcut inside")
            made[node] = graph.node_copy(node)
        return made[node]

    for node in nodes:
        if node.op != "placeholder":
            made[node] = graph.node_copy(node, known)
    if not isinstance(result, fx.Node):
        raise Untraceable(f"{kind}.forward returns no tensor, but a {type(result).__name__}")
    graph.output(known(result))
    return graph


def fold_norms(module: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> None:
    """Fold batch norms into the convolutions before them, in place, wherever torch.fx sees the one behind the other.

    The module is for inference only from then on. What lies in a part of these names is not folded with what does not:
    rows may leave out the one but not the other.

    Args:
        run: runs the module once. What is in a module that cannot be traced is folded only where its own forward runs:
            others may be called layer by layer, with something between.
    """
    part_of = {id(inner): name for name in names for inner in module.get_submodule(name).modules()}
    _fold(module, part_of, _running(module, run))


def _running(module: nn.Module, run: Callable[[], Any]) -> set[int]:
    """Return the ids of the modules whose forward runs in `run`."""
    ran = set[int]()
    hooks = [part.register_forward_pre_hook(lambda part, given: ran.add(id(part))) for part in module.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _fold(module: nn.Module, part_of: dict[int, str], running: set[int]) -> None:
    try:
        if "forward" in vars(module):
            raise Untraceable("torch.fx traces the forward of the class")
        graph = fx.Tracer().trace(module)
    except Exception:  # a user's forward may raise anything on a tracer's proxies; what is inside may be traced
        for child in module.children():
            if id(child) in running:
                _fold(child, part_of, running)
        return
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(before.target), str(node.target)
        convolution: Any = module.get_submodule(names[0])
        norm: Any = module.get_submodule(names[1])
        known = type(convolution) in _CONVOLUTIONS and type(norm) in BATCH_NORMS and norm.running_mean is not None
        together = part_of.get(id(convolution)) == part_of.get(id(norm))
        alone = all(called[name] == 1 and name not in read for name in names)
        if known and together and alone and not (hooked(convolution) or hooked(norm)):
            module.set_submodule(names[0], fuse_conv_bn_eval(convolution, norm))
            module.set_submodule(names[1], nn.Identity())


class Traced:
    """A module that torch.fx has cut around its parts of given names; see `cut`."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, names
        self.between, self.parts = cut(module, names)

    def output(self, inputs: Tensor) -> Any:
        """Return the output of the module itself."""
        return self._module(inputs)

    def again(self) -> Traced:
        """Return the module cut again, after it was moved or its mode changed: the pieces hold both as constants."""
        return Traced(self._module, self._names)

    def enter(self, inputs: Tensor) -> TracedStand:
        """Run what comes before the first part, and stand before it."""
        # Parts may write in place, but the inputs belong to the user.
        return TracedStand(self, 0, apart(self.between[0](inputs), inputs))

    def at(self, k: int, x: Tensor, inputs: Tensor) -> TracedStand:
        """Stand before part `k` with the features `x`."""
        return TracedStand(self, k, x)


class TracedStand:
    """Rows that stand before part `k` with the features `x` [n, ...]; see `dynrl.backbones.forward.Stand`."""

    def __init__(self, traced: Traced, k: int, x: Tensor) -> None:
        self._traced, self.k, self.x = traced, k, x

    def __call__(
        self, x: Tensor, rows: Tensor | None = None, places: Tensor | None = None, by: nn.Module | None = None
    ) -> Tensor:
        """Run the part on `x`, which is all that it is given, whatever rows and places these are."""
        return self._traced.parts[self.k](x, by)

    def part(self, rows: slice | None = None) -> Tensor:
        """Run the part on all rows, or on some of them."""
        return self(self.x if rows is None else self.x[rows])

    def through(self, run: Tensor) -> Tensor:
        """Run the part on the rows where `run` [n] is not 0, and pass the others through."""
        return gated_residual(self.x, run, self._traced.parts[self.k])

    def follow(self, y: Tensor, going: Tensor | None = None) -> TracedStand | Tensor:
        """Go on behind the part with its features `y`, to the next part or to the answer."""
        x = self._traced.between[self.k + 1](y)
        return TracedStand(self._traced, self.k + 1, x) if self.k + 1 < len(self._traced.parts) else x

    def end(self) -> None:
        """Nothing is held here."""
