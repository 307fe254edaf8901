"""Each layer of this network has modules of unequal structure, or none, and each image takes one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.expert import Convolution
from dynrl.backbones.gated import straight_through
from dynrl.backbones.walk import END, Point, State, Walk
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.gated_residual import ResidualBlock, gated_residual
from dynrl.ops.partition import run_by_choice
from dynrl.ops.pooled import summary
from dynrl.routes import draw_routes
from dynrl.schema import MOST_ROWS, check_count, check_counts

SPREAD = 4.0  # the deviation of the table's logits at first, so that tasks begin on different routes
BEHIND = 8.0  # how far the logits of cheaper modules are behind those of the dearest at first
STEP = 10.0  # the learning rate of the table
LEAST = -3.0  # the least log-probability that policies are told: a module of less would never be tried


class _Module(nn.Module):
    """A module is a convolution, ReLU and a 1x1 convolution, added to its input and followed by ReLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels, kernel, relu=True)
        self.second = Convolution(channels, channels, 1)

    def folded(self) -> ResidualBlock:
        """Return a frozen copy for inference."""
        return ResidualBlock([FoldedConv2d.of(part.conv, part.norm) for part in (self.first, self.second)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _stem(inputs: int, channels: int) -> nn.Sequential:
    """Make the first two convolutions."""
    inner = max(1, channels // 2)
    return nn.Sequential(
        Convolution(inputs, inner, stride=2, relu=True), Convolution(inner, channels, stride=2, relu=True)
    )


def _layer(channels: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """Make a layer's modules, those of the first network first; one that passes is an identity."""
    return nn.ModuleList(_Module(channels, kernel) if kernel else nn.Identity() for kernel in kernels)


class RoutingNet(Backbone):
    """A routing network: each layer has several modules, and action m takes module m, for one task or for many.

    The network begins with two convolutions of stride 2. A module keeps the form of the map: it is a convolution, ReLU
    and a 1x1 convolution, added to its input. The mean over the map and a linear layer end the network. The full route
    takes the last module of each layer; trained alone, it is a trunk that all tasks share.

    If inputs tell their task, in their last channels, a table has logits for each task, layer and module. Pretraining
    draws routes from the table, and trains it with the modules by straight-through gates, so that modules come to serve
    some tasks and not others. Policies are told the task, and begin with the table's choices. Each task has a learned
    vector that is added behind the first convolutions.

    Args:
        input_shape: (channels, height, width) of one image, with the channels that tell the task.
        classes: the number of outputs.
        image_channels: the number of the first channels that are the image. Each channel behind them stands for a task,
            and the one of the input's own task holds the largest number. None if inputs tell no task.
        channels: the number of channels of the map.
        layers: the number of layers.
        kernels: the sizes of the modules' first convolutions in each layer, from small to large; 0 is no module: the
            map passes.
        own: what each task has of its own: nothing; its last linear layer ("head"); or a whole network ("network"), in
            whose layers it chooses, so that nothing is shared.

    Attributes:
        tasks: the number of tasks that inputs tell; 0 if they tell none.

    Raises:
        ValueError: there is no layer, there are fewer than two modules, kernels are even or fall, or there are not as
            many channels as image_channels.

    Source: Routing Networks (Rosenbaum et al. 2018, ICLR): layers of modules, one of which may pass, and a table a
    task. There, tables are learned by reinforcement only. Here, they are trained first, and a policy that sees the
    features, too, is learned on the modules. Modules of unequal cost are those of Dynamic Deep Neural Networks (Liu &
    Deng 2018, AAAI).
    """

    family = "routing_net"
    decision = "branch"
    rule = "table"
    exports = True
    captures: ClassVar[tuple[str, ...]] = ("kernels", "select")
    budgets: ClassVar = (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)  # the last one is a whole path
    table: Tensor
    stems: Any  # lists of modules, whose own parts torch's types do not know
    layers: Any

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        image_channels: int | None = None,
        channels: int = 32,
        layers: int = 3,
        kernels: tuple[int, ...] = (0, 1, 3, 3, 3),
        own: Literal["nothing", "head", "network"] = "head",
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        image = input_shape[0] if image_channels is None else image_channels
        if not 1 <= image <= input_shape[0]:
            raise ValueError(f"expected 1 to {input_shape[0]} image_channels, got {image_channels}")
        if len(kernels) < 2 or list(kernels) != sorted(kernels) or not all(k == 0 or k % 2 for k in kernels):
            raise ValueError(
                f"expected the odd sizes of at least two modules, from small to large, 0 for none, got {tuple(kernels)}"
            )
        check_counts("kernels", kernels, least=0)
        for name, count in (("classes", classes), ("channels", channels), ("layers", layers)):
            check_count(name, count, 1, MOST_ROWS)
        self.input_shape, self.tasks, self.kernels = tuple(input_shape), input_shape[0] - image, tuple(kernels)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "image_channels": image_channels,
            "channels": channels, "layers": layers, "kernels": list(kernels), "own": own,
        }  # fmt: skip
        kinds = max(self.tasks, 1)
        self.networks = kinds if own == "network" else 1
        if own == "network":  # its first convolutions run on as many rows as there are of each task
            self.exports, self.captures = False, ()  # type: ignore[misc]
        self.stems = nn.ModuleList(_stem(image, channels) for _ in range(self.networks))
        self.layers = nn.ModuleList(_layer(channels, self.kernels * self.networks) for _ in range(layers))
        self.told = nn.Parameter(torch.randn(kinds, channels))
        cheaper = torch.tensor([kernel < kernels[-1] for kernel in kernels])
        # A buffer, since it takes steps of its own, and no other training may move it.
        self.register_buffer("table", SPREAD * torch.randn(kinds, layers, len(kernels)) - BEHIND * cheaper)
        heads, bound = 1 if own == "nothing" else kinds, channels**-0.5
        self.weight = nn.Parameter(torch.empty(heads, classes, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(heads, classes))
        start, shape = count_macs(self.stems[0], (image, *input_shape[1:]))
        modules = [count_macs(module, shape)[0] for module in list(self.layers[0])[: len(kernels)]]
        self._pose(
            [Point(f"layer{i}", len(kernels)) for i in range(1, layers + 1)],
            costs=[
                [macs + (classes * channels if i == layers else 0) for macs in modules] for i in range(1, layers + 1)
            ],
            start_macs=start,
            full_route=(len(kernels) - 1,) * layers,
            feature_width=channels + (self.tasks + len(kernels) if self.tasks else 0),
        )
        self.suggested = len(kernels) if self.tasks else 0

    def task(self, inputs: Tensor) -> Tensor:
        """Return the task of each of `inputs` [n, ...]: [n] int64, all 0 if they tell none."""
        if not self.tasks:
            return torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)
        return inputs[:, -self.tasks :, 0, 0].argmax(1)

    def _task(self, state: State) -> Tensor:
        return state.get(state.walk.own["task"])

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        task = self.task(inputs)
        walk.keep("task", rows, task)
        x = self._lead(self._images(inputs), task)
        return State(walk, 0, rows, x + self.told[task].unsqueeze(2).unsqueeze(3))

    def _images(self, inputs: Tensor) -> Tensor:
        return inputs[:, : inputs.shape[1] - self.tasks]

    def _lead(self, images: Tensor, task: Tensor) -> Tensor:
        """Run the first convolutions, those of each row's own network."""
        if self.networks == 1:
            x: Tensor = self.stems[0](images)
            return x
        return run_by_choice(self.stems, task, images)

    def _module(self, point: int, module: int) -> nn.Module:
        found: nn.Module = self.layers[point][module]
        return found

    def _chosen(self, state: State, action: Tensor) -> Tensor:
        """Return the number of each row's module in its layer, where all networks' modules lie side by side."""
        return action if self.networks == 1 else action + len(self.kernels) * self._task(state)

    def _run(self, state: State, action: Tensor) -> list[State]:
        x, chosen = state.features, self._chosen(state, action)
        for module, kernel in enumerate(self.kernels * self.networks):
            if kernel:
                x = gated_residual(x, chosen == module, self._module(state.point, module))
        return [self._go_on(state, x)]

    def _gated_run(self, state: State, gates: Tensor) -> State:
        x, done = state.features, torch.zeros_like(state.features)
        task = self._task(state)
        for module, kernel in enumerate(self.kernels * self.networks):
            network, choice = divmod(module, len(self.kernels))
            share = gates[:, choice] * (1 if self.networks == 1 else task == network)
            # A module may overwrite its input, so it gets a copy.
            done = done + share.view(-1, 1, 1, 1) * (self._module(state.point, module)(x.clone()) if kernel else x)
        return self._go_on(state, done)

    def _go_on(self, state: State, x: Tensor) -> State:
        """Continue from behind the modules to the next point or the end."""
        if state.point + 1 < len(self.points):
            return State(state.walk, state.point + 1, state.rows, x)
        state.walk.put_output(state.rows, self._head(x, self._task(state)))
        return State(state.walk, END, state.rows)

    def _head(self, x: Tensor, task: Tensor) -> Tensor:
        means = x.mean((2, 3))
        if len(self.weight) == 1:
            return F.linear(means, self.weight[0], self.bias[0])
        return torch.bmm(self.weight[task], means.unsqueeze(2)).squeeze(2) + self.bias[task]

    def observe(self, state: State) -> Tensor:
        """Return each channel's mean; if inputs tell a task, also that (one-hot), and the table's log-probabilities.

        These are what the backbone suggests. They are `LEAST` or more.
        """
        means = summary(state.features)
        if not self.tasks:
            return means
        task = self._task(state)
        told = torch.eye(self.tasks, dtype=torch.float32, device=task.device)[task]
        preferred = self.table[:, state.point].float().log_softmax(1).clamp_min(LEAST)
        return torch.cat([means, told, preferred[task]], 1)

    def open_up(self) -> None:
        """Give the modules that are like the full route's own the weights of these: all begin as good as the trunk."""
        for layer in self.layers:
            for module, kernel in enumerate(self.kernels * self.networks):
                full = (module // len(self.kernels) + 1) * len(self.kernels) - 1
                if kernel == self.kernels[-1]:
                    layer[module].load_state_dict(layer[full].state_dict())

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the full route's answers; with a rate, those of gates that the table draws, and let the table learn.

        Where a random route of that rate takes something cheaper than the dearest modules, this is taken instead. So at
        rate 1, all rows go by the table. If inputs tell no task, routes are random.
        """
        if rate is None or not self.tasks:
            yield from super().training_outputs(inputs, rate, generator)
            return
        route = draw_routes(self.thrift, rate, generator).to(inputs.device)
        dearest = self.kernels.index(self.kernels[-1])  # the first of the dearest choices
        table = self.table.float().cpu().clone().requires_grad_()  # on the CPU, as the generator is

        def choose(state: State) -> Tensor:
            drawn = state.along(route)
            gates = straight_through(table[self._task(state).cpu(), state.point], generator).to(drawn.device)
            return torch.where(drawn.unsqueeze(1) < dearest, F.one_hot(drawn, len(self.kernels)).to(gates), gates)

        walk = self.gated(inputs, choose)
        assert walk.outputs is not None
        yield [Answer(walk.outputs, walk.all_rows)]
        if table.grad is not None:  # the pass was backpropagated
            self.table.sub_(STEP * table.grad.to(self.table))

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Tensor]:
        """Return `Backbone.ideal`: each module runs on the first rows of the batch, as many as chose it."""
        chosen = route + len(self.kernels) * self.task(inputs).unsqueeze(1) if self.networks > 1 else route
        counts = [torch.bincount(column, minlength=len(self.layers[0])).tolist() for column in chosen.t()]
        task, images = self.task(inputs), self._images(inputs)

        def run() -> Tensor:
            x = self._lead(images, task)
            for point, sizes in enumerate(counts):
                for module, size in enumerate(sizes):
                    if size and self.kernels[module % len(self.kernels)]:
                        self._module(point, module)(x[:size])
            return self._head(x, task)

        return run

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm and ReLU folded into the convolutions, its maps in channels_last."""
        twin = super().for_inference()
        for stem in twin.stems:
            for part in stem:
                part.fold()
        for layer in twin.layers:
            for i, module in enumerate(layer):
                if isinstance(module, _Module):  # a copy of a copy is folded already
                    layer[i] = module.folded()
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
