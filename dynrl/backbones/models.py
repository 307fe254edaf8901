"""Whole models are the choices: which one first, and after each answer whether to stop or to ask a dearer one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from dynrl.backbones.base import Answer, Backbone
from dynrl.backbones.early import EXIT_SCORES, SCORES, early_inputs
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.rows import check_rows
from dynrl.backbones.traced import BATCH_NORMS
from dynrl.backbones.walk import END, STOP, Point, State, Walk, merge
from dynrl.cost import executed, macs_of
from dynrl.inputs import Form
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.move import keep_rows, take_rows
from dynrl.schema import arguments, check_counts

TOLD = 2 * SCORES + 1  # how sure the last answer is and the one before, and whether they agree
PASS = 256  # the rows of a pass that estimates statistics of batch norm


class Models(Backbone):
    """Whole models of equal outputs, cheap to dear: which one first, and after each answer stop, or any dearer one.

    At first, choice k runs model k. After model i, 0 stops, and j runs model i + j. An input moves whole from model to
    model, and each answer replaces the one before. The full route is the last model at once. Models may be trained or
    not; pretraining trains each of them alone.

    Args:
        modules: at least two modules from one tensor [B, *input_shape] to outputs [B, classes], by rising MACs; they
            are held, not copied, and put into eval mode.
        input_shape: the shape of one input.
        sizes: the height and width to which images are resized for each model (bilinear, antialiased; this counts 0
            MACs); None gives each model the input as it is.
        family: the name under which `FAMILIES` holds a function that builds this backbone from the other arguments
            without `modules`, for `load_backbone`; None for a backbone that is never loaded by name.
        classes: the number of outputs; may be left out.

    Raises:
        ValueError: there are fewer than two models, their MACs fall, their outputs differ or are no classes, the
            compute of one cannot be counted, what one says of an input depends on those beside it, or sizes fit neither
            the models nor the inputs.

    The sources are IDK cascades (Wang et al. 2018, UAI) and model choice by a policy (Bolukbasi et al. 2017, ICML).
    """

    family = "models"
    decision = "model"
    scores: ClassVar = EXIT_SCORES
    rule = "cascade"
    exports = True
    budgets: ClassVar = (0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.7)  # the last model may cost a hundredfold

    def __init__(
        self,
        modules: Sequence[nn.Module],
        input_shape: Sequence[int],
        sizes: Sequence[int] | None = None,
        family: str | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if len(modules) < 2:
            raise ValueError(f"expected at least two models to choose from, got {len(modules)}")
        if sizes and (len(sizes) != len(modules) or len(input_shape) != 3):
            raise ValueError(
                f"expected a size of images for each of {len(modules)} models, got {list(sizes)} for inputs of shape "
                f"{tuple(input_shape)}"
            )
        if family is not None:
            self.family = family  # type: ignore[misc]
        self.input_shape, self.sizes = tuple(input_shape), tuple(sizes or ())
        self.config = {"input_shape": list(input_shape), "sizes": list(self.sizes)}
        self.members = nn.ModuleList(modules).eval()
        for k, size in enumerate(self.sizes):  # what resizing does to rows and columns of images, as products
            for name, length in zip(("down", "right"), input_shape[1:], strict=True):
                product = _resize(torch.eye(length)[None, None], (size, length))[0, 0]
                self.register_buffer(f"{name}{k}", product, persistent=False)
        macs, outputs = zip(*map(self._count, range(len(modules))), strict=True)
        shape = outputs[0]
        if len(set(outputs)) > 1 or len(shape) != 1 or shape[0] < 2 or classes not in (None, shape[0]):
            raise ValueError(
                f"expected models with outputs [batch, {classes or 'classes'}], got {list(outputs)} for one input"
            )
        # In files of earlier versions, models are in the order of what a walk through each of them costs.
        walked = [of.dense_macs if isinstance(of, Backbone) else cost for of, cost in zip(modules, macs, strict=True)]
        if list(macs) != sorted(macs) and walked != sorted(walked):
            raise ValueError(f"expected models from cheap to dear, got {list(macs)} MACs; give them in another order")
        for k, module in enumerate(modules):
            if not isinstance(module, Backbone):  # which has been checked, or is ours
                examples = Form(self.input_shape).example(3, next(module.parameters()), alike=False)
                check_rows(f"model {k}", partial(self._answer, k), examples)
        self.config["classes"] = shape[0]
        count = len(modules)
        self._pose(
            [Point("first", count), *(Point(f"after{k}", count - k) for k in range(count - 1))],
            costs=[macs, *([0, *macs[k + 1 :]] for k in range(count - 1))],
            start_macs=0,
            full_route=(count - 1, *[-1] * (count - 1)),
            feature_width=TOLD + _look(torch.zeros(1, *input_shape)).shape[1],
        )

    @classmethod
    def at_sizes(cls, module: nn.Module, input_shape: Sequence[int], sizes: Sequence[int], images: Tensor) -> Self:
        """Pose one trained module at several sizes of its images: the choice of a resolution.

        All sizes share the module's weights. Batch norm has statistics and weights of its own at each size, since means
        and variances change with the size (Wang et al. 2020, ECCV, "Resolution Switchable Networks").

        Args:
            module: the module, which must take images of any size; it is copied.
            input_shape: the shape of one input.
            sizes: the sizes, from small to large.
            images: [n, *input_shape], training inputs, on which the statistics are estimated at each size.
        """
        posed = cls(_sharing([copy.deepcopy(module) for _ in sizes]), input_shape, sizes)
        for k in range(len(sizes)):
            posed._estimate(k, images)
        return posed

    @torch.no_grad()
    def _estimate(self, k: int, images: Tensor) -> None:
        """Estimate the statistics of batch norm in model k anew, as means over passes through `images` [n, ...]."""
        norms = [part for part in self.members[k].modules() if isinstance(part, BATCH_NORMS)]
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # which makes them means over all passes
            norm.train()
        for rows in images.split(PASS):
            self._answer(k, rows)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.eval()

    def _count(self, k: int) -> tuple[int, tuple[int, ...]]:
        """Return the MACs of model k on one row, and the shape of its output."""
        member = self.members[k]
        if isinstance(member, Backbone):
            return member.whole_macs, (member.config["classes"],)
        weight = next(member.parameters())
        example = torch.zeros(1, *self.input_shape, dtype=weight.dtype, device=weight.device)
        uncounted = [name for name, part in member.named_modules() if isinstance(part, nn.RNNBase)]
        if uncounted:
            raise ValueError(f"the compute of {uncounted} in model {k} cannot be counted; leave this model out")
        ops, output = executed(lambda: member(self._resized(k, example)))
        return macs_of(ops), tuple(output.shape[1:])

    def _resized(self, k: int, inputs: Tensor) -> Tensor:
        """Return images as large as model k wants them; other inputs as they are."""
        if not self.sizes or inputs.shape[-2:] == (self.sizes[k],) * 2:
            return inputs
        if is_compiling():  # torch cannot trace the resizing of images whose number is data
            (channels, height, width), size = self.input_shape, self.sizes[k]
            # The products are of matrices: onnxruntime refuses others where there are no rows.
            low = (inputs.mT.reshape(-1, height) @ self.get_buffer(f"down{k}").t()).reshape(-1, channels, width, size)
            return (low.mT.reshape(-1, width) @ self.get_buffer(f"right{k}").t()).reshape(-1, channels, size, size)
        return _resize(inputs, (self.sizes[k],) * 2)

    def _answer(self, k: int, inputs: Tensor) -> Tensor:
        """Return what model k says of inputs [n, ...]: [n, classes]."""
        member: Any = self.members[k]
        run = member.whole if isinstance(member, Backbone) else member
        answer: Tensor = run(self._resized(k, inputs))
        return answer

    def _after(self, k: int, walk: Walk, rows: Tensor, answer: Tensor, before: Tensor, likely: Tensor) -> State:
        """Return the state of `rows` behind model k, whose answer is [n, classes]; for the others see `_tell`."""
        if k + 1 == len(self.members):
            return State(walk, END, rows)
        return State(walk, k + 1, rows, _tell(answer, before, likely))

    def run(self, inputs: Any, choose: Callable[[State], Tensor]) -> Walk:
        """Do `Backbone.run`; a model waits for all rows that ask it, wherever they come from, and runs once."""
        state = self.begin(inputs)
        walk, asking = state.walk, merge(super().advance(state, choose(state)))
        while asking:
            state = self._heard(asking.pop(min(asking)))
            if state.point != END:
                asking = merge([*asking.values(), *super().advance(state, choose(state))])
        return walk

    def advance(self, state: State, action: Tensor) -> list[State]:
        """Do `Backbone.advance`."""
        return [self._heard(asking) for asking in super().advance(state, action)]

    def _start(self, walk: Walk, rows: Tensor, inputs: Tensor) -> State:
        look = _look(inputs)
        walk.keep("look", rows, look)
        return State(walk, 0, rows, look.new_zeros(rows.shape[0], TOLD))

    def _chosen(self, point: int, choice: int) -> int:
        """Return the model that a choice at a point runs; the choice to stop is the model that spoke last."""
        return max(point - 1, 0) + choice

    def leads_to(self, column: int, choice: int) -> int:
        """Return `Backbone.leads_to`: behind each model but the last, there is a point."""
        k = self._chosen(column, choice)
        return END if (column and choice == STOP) or k + 1 == len(self.members) else k + 1

    def _run(self, state: State, action: Tensor) -> list[State]:
        """Return one state for each model that is asked, for `_heard`, and one of the rows that stop."""
        walk, point, reached = state.walk, state.point, []
        for choice in range(self.points[point].n):
            kept = keep_rows(action == choice, state.rows, state.features)
            if kept is None:
                continue
            rows, told = kept
            if point and choice == STOP:
                reached.append(State(walk, END, rows))
                continue
            likely = told.new_zeros(rows.shape[0], self.config["classes"])
            if point:
                likely = self.output(State(walk, point, rows)).float().softmax(1)
            reached.append(State(walk, self._chosen(point, choice), rows, (told[:, :SCORES], likely)))
        return reached

    def _heard(self, asking: State) -> State:
        """Let the model whose number is the state's `point` answer the rows; those that have ended stay as they are.

        Before, the state's features are how sure the answer before was, and which probabilities it gave.
        """
        walk, k, rows = asking.walk, asking.point, asking.rows
        if k == END:
            return asking
        answer = self._answer(k, walk.inputs if rows is walk.all_rows else take_rows(walk.inputs, rows))
        walk.put_output(rows, answer)
        return self._after(k, walk, rows, answer, *asking.features)

    def _gated_run(self, state: State, gates: Tensor) -> State:
        walk, point = state.walk, state.point
        assert isinstance(walk, GatedWalk)
        if not point:
            self._nobody_comes(walk)
        self._send(walk, state, gates)
        if point:
            walk.leave(gates, STOP)
        answer = self._answer(point, walk.inputs)  # of the next model, which some may come to from any point before
        weight = walk.own["weight"][:, point]
        before = walk.own["before"][:, point] / weight.clamp_min(1e-9).unsqueeze(1)
        walk.put_output(state.rows, answer)
        walk.weight, walk.present = weight, walk.own["present"][:, point]
        return self._after(point, walk, state.rows, answer, before[:, :SCORES], before[:, SCORES:])

    def _nobody_comes(self, walk: GatedWalk) -> None:
        """Prepare what a gated walk keeps for each model: the shares of rows that come to it, and what they bring.

        They bring the scores of the answer before and its probabilities of the classes, weighted by their shares.
        """
        shape = (len(walk), len(self.members))
        walk.own["weight"] = walk.weight.new_zeros(shape)
        walk.own["before"] = walk.weight.new_zeros(*shape, SCORES + self.config["classes"])
        walk.own["present"] = torch.zeros(shape, dtype=torch.bool, device=walk.weight.device)

    def _send(self, walk: GatedWalk, state: State, gates: Tensor) -> None:
        """Send the share of each row that chooses a model to that model."""
        bring = walk.weight.new_zeros(len(walk), SCORES + self.config["classes"])
        if state.point:
            bring = torch.cat([state.features[:, :SCORES], self.output(state).float().softmax(1)], 1)
        likeliest = gates.argmax(1)
        at = torch.arange(len(self.members), device=gates.device)
        for choice in range(1 if state.point else 0, gates.shape[1]):
            mine = at == self._chosen(state.point, choice)
            share = (walk.weight * gates[:, choice].float()).unsqueeze(1) * mine
            walk.own["weight"] = walk.own["weight"] + share
            walk.own["before"] = walk.own["before"] + share.unsqueeze(2) * bring.unsqueeze(1)
            walk.own["present"] = walk.own["present"] | ((walk.present & (likeliest == choice)).unsqueeze(1) & mine)

    def observe(self, state: State) -> Tensor:
        """Return what is told of the answers so far (0 before the first), and a look at the input.

        These are the `exit_scores` of the last answer, those of the answer before, and the probability that the answer
        before gave the class that is now the likeliest; then the input's means (`early_inputs`) and its contrast.
        """
        return torch.cat([state.features, state.get(state.walk.own["look"])], 1)

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the last model's answer; with a rate, yield instead that of each other model, one a pass.

        So the plain network is the last model, and each model is trained alone.
        """
        rows = torch.arange(len(inputs), device=inputs.device)
        last = len(self.members) - 1
        for k in [last] if rate is None else range(last):
            yield [Answer(self._answer(k, inputs), rows)]

    def constant_routes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return each model alone, from dear to cheap."""
        stops = (STOP,) * (self.columns - 1)
        return [(f"model {k} alone", (k, *stops)) for k in reversed(range(len(self.members)))]

    def ideal(self, inputs: Tensor, route: Tensor) -> Callable[[], Any]:
        """Return `Backbone.ideal`: each model runs on the first rows of the batch, as many as ask it."""
        asked = [0] * len(self.members)
        for point, column in enumerate(route.unbind(1)):
            for choice in range(1 if point else 0, self.points[point].n):
                asked[self._chosen(point, choice)] += int((column == choice).sum())

        def run() -> None:
            for k, count in enumerate(asked):
                if count:
                    self._answer(k, inputs[:count])

        return run

    def for_inference(self) -> Self:
        """Return a frozen copy; models that are families of dynrl make themselves faster, too."""
        twin = super().for_inference()
        for k, member in enumerate(self.members):
            if isinstance(member, Backbone):
                twin.members[k] = member.for_inference()
        for name, part in list(twin.members.named_modules()):
            if type(part) in BATCH_NORMS and part.track_running_stats:  # a subclass may do more, such as timm's
                twin.members.set_submodule(name, _Affine(part))
        return twin


class _Affine(nn.Module):
    """This is a frozen batch norm. Torch cannot trace its own on rows whose number is data."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        self.register_buffer("scale", scale.detach())
        self.register_buffer("shift", shift.detach())

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


class Members(Models):
    """Whole models that are networks of dynrl's own families, each on its full route.

    Args:
        input_shape: the shape of one input.
        classes: the number of outputs of each model.
        members: the settings of the models, by rising MACs: each has "family", a name in `FAMILIES`, and arguments of
            that family other than `input_shape` and `classes`.
        sizes: see `Models`.
    """

    family = "members"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int = 10,
        members: tuple[dict[str, Any], ...] = (),
        sizes: tuple[int, ...] = (),
    ) -> None:
        built = []
        for i, settings in enumerate(members):
            shape = (*input_shape[:1], sizes[i], sizes[i]) if i < len(sizes) else input_shape
            built.append(_network(settings, shape, classes, f"members[{i}]"))
        super().__init__(built, input_shape, sizes, classes=classes)
        self.config["members"] = [_settings(member) for member in built]

    @classmethod
    def joined(cls, backbones: Sequence[Backbone]) -> Self:
        """Return the choice between backbones that were trained on the same data, by rising MACs, with their weights.

        Raises:
            ValueError: the backbones were trained on other data than one another, or are for other inputs or classes.
        """
        first = backbones[0]
        for known, found in (
            ("inputs and outputs", [(backbone.input_shape, backbone.config["classes"]) for backbone in backbones]),
            ("what they were trained on", [backbone.known for backbone in backbones]),
        ):
            if any(one != found[0] for one in found):
                raise ValueError(f"expected models of one data set, got {known} {found}")
        ordered = sorted(backbones, key=lambda backbone: backbone.whole_macs)
        posed = cls(first.input_shape, first.config["classes"], tuple(map(_settings, ordered)))
        for member, backbone in zip(posed.members, ordered, strict=True):
            member.load_state_dict(backbone.state_dict())
        posed.trained_on, posed.standard = first.trained_on, first.standard
        return posed


class Resolutions(Models):
    """One network of dynrl's own families at several sizes of its images, with the same weights but for batch norm.

    Batch norm has statistics and weights of its own at each size. The plain network is that at the last size; after it,
    all sizes are trained together.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: the number of outputs.
        network: the settings of the network: "family", a name in `FAMILIES`, and arguments of that family other than
            `input_shape` and `classes`. No weight may depend on the size of the images.
        sizes: the sizes in pixels, from small to large.

    Sources: Resolution Switchable Networks (Wang et al. 2020, ECCV); Dynamic Resolution Network (Zhu et al. 2021,
    NeurIPS).
    """

    family = "resolutions"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        network: dict[str, Any] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        check_counts("sizes", sizes)
        built = [_network(network or {}, (*input_shape[:1], size, size), classes, "network") for size in sizes]
        super().__init__(_sharing(built), input_shape, sizes, classes=classes)
        self.config["network"] = _settings(built[0])

    def training_outputs(
        self, inputs: Tensor, rate: Tensor | None, generator: torch.Generator | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answer at the last size; with a rate, that at every size, one a pass."""
        if rate is None:
            yield from super().training_outputs(inputs, None)
        else:
            rows = torch.arange(len(inputs), device=inputs.device)
            for k in range(len(self.members)):
                yield [Answer(self._answer(k, inputs), rows)]


def _network(settings: Mapping[str, Any], shape: tuple[int, ...], classes: int, where: str) -> Backbone:
    """Build a network of dynrl's own families from its settings, which stand at `where`."""
    from dynrl.backbones import FAMILIES  # not at the top of the file: that table holds the classes above

    name, rest = settings.get("family"), {key: value for key, value in settings.items() if key != "family"}
    if name not in FAMILIES:
        raise ValueError(f"{where}.family: expected one of {sorted(FAMILIES)}, got {name!r}")
    config = {"input_shape": shape, "classes": classes, **rest}
    return FAMILIES[name](**arguments(FAMILIES[name], config, f"{where}."))


def _sharing(modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Give all modules, which are of one kind, the weights of the first, but for those of batch norm."""
    for module in modules[1:]:
        for part, other in zip(modules[0].modules(), module.modules(), strict=True):
            if isinstance(part, BATCH_NORMS):
                continue
            for name, weight in part.named_parameters(recurse=False):
                if weight.shape != getattr(other, name).shape:
                    raise ValueError(
                        f"expected a network whose weights are the same at all sizes, got {tuple(weight.shape)} and "
                        f"{tuple(getattr(other, name).shape)} for one {name} of {type(part).__name__}"
                    )
                setattr(other, name, weight)
    return modules


def _settings(backbone: Backbone) -> dict[str, Any]:
    """Return a backbone's settings as `Members` takes them."""
    own = {name: value for name, value in backbone.config.items() if name not in ("input_shape", "classes")}
    return {"family": backbone.family, **own}


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    # On a CPU, torch resizes no numbers of 16 bits with antialiasing.
    wide = images.float() if images.device.type == "cpu" and images.dtype.itemsize < 4 else images
    return F.interpolate(wide, size=size, mode="bilinear", antialias=True).to(images.dtype)


def _look(inputs: Tensor) -> Tensor:
    """Return a cheap look at inputs [n, ...]: their means (`early_inputs`) and their contrast, [n, k] float32."""
    flat = inputs.flatten(1).float()
    # `std` itself takes a tenth as long as a small model.
    contrast = (flat - flat.mean(1, keepdim=True)).norm(dim=1, keepdim=True) / flat.shape[1] ** 0.5
    return torch.cat([early_inputs(inputs).float(), contrast], 1)


def _tell(answer: Tensor, before: Tensor, likely: Tensor) -> Tensor:
    """Return what a policy is told of an answer [n, classes]: [n, TOLD] float32.

    Args:
        answer: the answer.
        before: [n, SCORES], how sure the answer before was; 0 if there was none.
        likely: [n, classes], the probabilities that the answer before gave; 0 if there was none.
    """
    return torch.cat([exit_scores(answer), before, likely.gather(1, answer.argmax(1, keepdim=True))], 1)
