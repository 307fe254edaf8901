"""All environments share one core: a batch of rows walks a backbone, and each step takes one answer of the policy.

The transition is written once, batched, in torch (`reset_tensors`, `step_tensors`). NumPy appears only in the methods
that Gymnasium calls. The single environment is the batched one with one row.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from dynrl.backbones import END, Backbone, State, merge, shared_backbone
from dynrl.data import Dataset, Split, as_dataset
from dynrl.envs import DECISIONS
from dynrl.envs.pages import page
from dynrl.envs.render import MODES, Shown
from dynrl.envs.rewards import check_reward
from dynrl.envs.steps import Steps, steps_for
from dynrl.files import load_tensors
from dynrl.machine import check_device, check_dtype
from dynrl.ops.backend import float32
from dynrl.policies import SIGHTS
from dynrl.schema import check_count, check_one_of, check_price_range, is_number

Info = dict[str, Tensor]


class DenseOutputs:
    """These are the dense network's outputs for a split; each is computed when it is first needed, and kept."""

    def __init__(self, backbone: Backbone, split: Split) -> None:
        self._backbone, self._split = backbone, split
        self._known: Tensor | None = None  # NaN where an output has not been needed yet

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return the outputs [n, ...] for `rows` [n] of the split."""
        inputs = self._split.inputs
        if self._known is None:
            first = self._backbone(inputs[rows[:1]]).float()
            self._known = first.new_full((len(inputs), *first.shape[1:]), torch.nan)
        missing = rows[self._known[rows].flatten(1)[:, 0].isnan()].unique()
        if len(missing):
            self._known[missing] = self._backbone(inputs[missing]).float()
        return self._known[rows]


def check_render(mode: str | None) -> str | None:
    """Return the mode, or raise a ValueError that lists the modes."""
    if mode is not None:
        check_one_of("render_mode", mode, MODES, ", or None")
    return mode


def check_autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    """Return the mode, or raise a ValueError that lists the modes."""
    if not isinstance(mode, AutoresetMode):
        check_one_of("autoreset_mode", mode, [each.value for each in AutoresetMode])
    return AutoresetMode(mode)


def draw(seeds: np.ndarray, episodes: np.ndarray, stream: int) -> np.ndarray:
    """Return a hash [n] uint64 of (seed, episode, stream), by two rounds of splitmix64 (Steele et al. 2014).

    Draws are hashes, not a generator's sequence. So what a sub-environment meets in its k-th episode depends neither on
    the number of other sub-environments nor on when their episodes end.
    """
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream + 1)
        for salt in (episodes.astype(np.uint64), np.uint64(0x632BE59BD9B4E019)):
            z = z + salt * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def stepped_in_torch(env: VectorEnv) -> RoutingVectorEnv:
    """Return `env` if it may be stepped by `step_tensors`, and refuse any other environment by name.

    A wrapper acts in Gymnasium's `step`, so `step_tensors` of what it wraps would leave it out without a word.

    Raises:
        ValueError: it is no dynrl environment, it is wrapped, or its autoreset mode is not SAME_STEP. Another mode
            would lose the first transition of every episode, or train on reset steps.
    """
    mode = env.metadata.get("autoreset_mode")
    if not isinstance(env, RoutingVectorEnv) or mode is not AutoresetMode.SAME_STEP:
        raise ValueError(
            f"expected a dynrl environment with autoreset_mode='SameStep' and no wrapper around it, got "
            f"{type(env).__name__}, {mode}; a reward of your own is a row of dynrl.envs.rewards.REWARDS"
        )
    return env


class RoutingVectorEnv(VectorEnv):
    """In this environment, `num_envs` inputs walk one backbone at the same time.

    A decision's class adds its page and its default backbone.

    Args:
        num_envs: the number of inputs, each a row.
        backbone: a backbone file, a `Backbone`, or None for a small untrained one with fixed weights. A file is loaded
            once a process, however many environments use it. A frozen `for_inference` copy is run.
        data: the data set that the inputs come from, or what makes one (a name, a pair of tensors: see
            `dynrl.data.as_dataset`); None takes the decision's own (`Decision.data`).
        split: the name of a split of the data set.
        reward: a name in `dynrl.envs.rewards.REWARDS`, which says what an answer is worth.
        sight: a name in `dynrl.policies.SIGHTS`, which says what the policy sees. With "step", it looks at every
            decision. With "route", it looks once, at the input: an episode is one step, whose action is a choice for
            each column of the route; choices in columns that a row never comes to have no effect.
        price: the fixed price of the dense network's compute. With None, each episode draws it from `price_range`,
            uniformly in its logarithm.
        price_range: the lowest and highest price. The attribute of that name is what episodes draw from: the fixed
            price twice, if there is one.
        times: the times to charge instead of MACs (see `Backbone.time_table`).
        device: where the backbone runs and the inputs and other tensors are, for example "cpu" or "cuda".
        dtype: the type of the backbone and its inputs, one of `dynrl.machine.DTYPES`. Observations and rewards stay in
            float32.
        group: how many neighbouring sub-environments meet the same input at the same price in each episode, so that one
            input takes several routes. It divides `num_envs`.
        attacked: a file of inputs that take the place of the split's first ones, if it exists (see `train_jointly`).
        autoreset_mode: NEXT_STEP (which stock RLlib expects), SAME_STEP (which wastes no step; our runner and SB3 use
            it) or DISABLED (`reset(options={"reset_mask": ...})`), as `AutoresetMode` or its value.
        render_mode: what `render` returns for each row: "ansi" (text) or "rgb_array" (a picture, with the input beside
            the route if it is an image); None does not render.

    A step's reward is its accuracy term less price x cost. The cost is what the walk was charged since the previous
    step, as a share of what the dense network is charged. The first step also pays for what ran before the first
    decision, so the sum of an episode's rewards is accuracy - price x compute. A reward with a cost of its own
    (`blockdrop`) charges it for the whole walk, with the last step.

    `info` holds both terms of every step (`accuracy_term`, `cost_term`). For rows that ended (the masks are `_route`
    and so on), it holds the task's metric by its name (`accuracy`: 0 or 1; `mse`), `macs_fraction` and `route`.
    `action_mask` belongs to the observation that is returned with it.

    Raises:
        ValueError: a data set, split, reward, sight, device, dtype or mode is unknown; the price is outside its range;
            or the backbone poses another decision or expects other inputs than the data set has.
    """

    metadata: dict[str, Any] = {
        "render_modes": list(MODES), "render_fps": 4, "autoreset_mode": AutoresetMode.NEXT_STEP
    }  # fmt: skip
    decision: ClassVar[str]
    graphs = True  # whether steps are recorded as CUDA graphs, where this can be done

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.__doc__ = page(cls.__doc__ or "", cls.decision)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        backbone: str | Path | Backbone | None = None,
        data: Any = None,
        split: str = "train",
        reward: str = "distillation",
        sight: str = "step",
        price: float | None = None,
        price_range: Sequence[float] = (0.002, 2.0),
        times: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        group: int = 1,
        attacked: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        check_count("num_envs", num_envs, 1)
        check_count("group", group, 1)
        if num_envs % group:
            raise ValueError(f"expected a group that divides the {num_envs} environments, got {group}")
        self.group = group
        mode = check_autoreset(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": mode}
        self.autoreset_mode = mode  # where Gymnasium's own vector environments have it, and torchrl looks for it
        self.num_envs = num_envs
        self.render_mode = check_render(render_mode)
        self.price_range = check_price_range(price_range)
        if price is not None and not is_number(price):
            raise ValueError(f"expected a price as a number, got {price!r}")
        if price is not None and not self.price_range[0] <= price <= self.price_range[1]:
            raise ValueError(
                f"the price {price} is outside its range {self.price_range}; widen price_range or change it"
            )
        if price is not None:  # who asks for the range must not read prices that no episode has
            self.price_range = (float(price), float(price))
        self._fixed_price = price
        data = DECISIONS[self.decision].data if data is None else data
        dataset = data if isinstance(data, Dataset) else as_dataset(data)
        check_one_of("sight", sight, SIGHTS)
        self.device, kind = check_device(device), check_dtype(dtype)
        self.backbone = self._open(backbone, dataset)
        self._data = dataset.seen_by(self.backbone.known)
        self._split = self._data.split(split)
        if self.device.type != "cpu" or kind is not next(self.backbone.parameters()).dtype:
            self.backbone = copy.deepcopy(self.backbone).to(self.device, kind)
        if attacked is not None and Path(attacked).is_file():  # before the first attack, there is none
            self._split = self._split.beginning_with(load_tensors(attacked, "attacked inputs")[0]["inputs"])
        self._split = self._split.to(self.device, kind)
        self.task = self._split.task
        self.sight = SIGHTS[sight].of(self.backbone)
        self.reward = check_reward(reward, self.task, self.sight.looks(self.backbone.max_steps) == 1)
        self._table = None if times is None else self.backbone.time_table(times)
        self._same_step = mode is AutoresetMode.SAME_STEP
        self._next_step = mode is AutoresetMode.NEXT_STEP
        # The price is observed without scaling, and features are means of activations: neither has a bound.
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self.sight.width,), np.float32)
        counts = self.sight.counts
        self.single_action_space: gym.Space[Any] = (
            gym.spaces.Discrete(counts[0]) if len(counts) == 1 else gym.spaces.MultiDiscrete(list(counts))
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeds: np.ndarray | None = None
        self._episodes = np.zeros(num_envs, np.int64)
        self._dense = DenseOutputs(self.backbone, self._split)
        self._states: dict[int, State] = {}
        self._ended: State | None = None  # the rows that have ended and wait for their reset
        self._recorded: Steps | None = None

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained backbone for inputs of that shape; a decision's class writes this."""
        raise NotImplementedError

    @classmethod
    def seeded_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return `default_backbone` with always the same weights; `gym.make` without arguments takes it."""
        with torch.random.fork_rng(), float32():
            torch.manual_seed(0)
            return cls.default_backbone(input_shape)

    def _open(self, backbone: str | Path | Backbone | None, dataset: Dataset) -> Backbone:
        if backbone is None:
            opened = self.seeded_backbone(dataset.input_shape).for_inference()
        elif isinstance(backbone, Backbone):
            opened = backbone.for_inference()
        elif not isinstance(backbone, str | Path):
            raise ValueError(
                f"expected a backbone, its file, or None for a small one, got a {type(backbone).__name__}; "
                "dynrl.backbones makes one of a network"
            )
        else:
            path = Path(backbone)
            opened = shared_backbone(str(path.resolve()), path.stat().st_mtime_ns if path.is_file() else 0)
        if opened.decision != self.decision:
            raise ValueError(
                f"{type(self).__name__} needs a backbone that poses {self.decision!r}, not {opened.decision!r}"
            )
        if opened.form != dataset.form:
            raise ValueError(f"the backbone expects inputs of shape {opened.form}; {dataset.name} has {dataset.form}")
        return opened

    # torch -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_tensors(self, seed: int | Sequence[int | None] | None = None, rows: Tensor | None = None) -> Tensor:
        """Start new episodes in all rows, or in `rows` [n] only, and return all observations [N, width].

        The first call starts all rows.

        Args:
            seed: with a number, sub-environment i draws by `seed + i` from episode 0 on; i is the number of its group
                if there are groups. With a sequence, it draws by `seed[i]`. None continues with the next episodes,
                also in a sequence.
            rows: [n] int64, the rows that start; None starts all rows.
        """
        if seed is not None or self._seeds is None:
            self._seed([None] * self.num_envs if seed is None else seed, rows)
        if rows is None or (not self._states and self._ended is None):
            self._states, self._ended = {}, None
            self._start(None)
        else:
            keep = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
            keep[rows] = False
            left = [s.where(keep[s.rows], s.point) for s in self._states.values()]
            ended = None if self._ended is None else self._ended.where(keep[self._ended.rows], END)
            self._ended = ended if ended is not None and ended.count else None
            self._states = merge(left)
            self._start(rows)
        return self._observe()

    def _seed(self, seed: int | Sequence[int | None], rows: Tensor | None) -> None:
        """Take the seeds of `rows`, or of all rows if None; a row without a seed keeps its own, or draws its first."""
        each = (np.arange(self.num_envs) // self.group).astype(object)
        asked = each + int(seed) if isinstance(seed, int | np.integer) else np.asarray(seed, object)
        if asked.shape != (self.num_envs,):
            raise ValueError(f"expected a seed for each of {self.num_envs} environments, got {asked.shape}")
        if self._seeds is None:
            fresh = each + int(np.random.SeedSequence().entropy) % 2**63  # type: ignore[arg-type]
            asked = np.array([new if one is None else one for one, new in zip(asked, fresh, strict=True)], object)
            self._seeds, rows = np.zeros(self.num_envs, np.int64), None
        at = np.arange(self.num_envs) if rows is None else rows.cpu().numpy()
        at = np.array([row for row in at if asked[row] is not None], np.int64)
        if wrong := [one for one in asked[at] if not isinstance(one, int | np.integer) or isinstance(one, bool)]:
            raise ValueError(f"expected seeds as whole numbers, got {wrong[0]!r}")
        # Gymnasium takes seeds of any size; draws know 64 bits of them.
        self._seeds[at] = np.array([int(one) % 2**64 for one in asked[at]], np.uint64).astype(np.int64)
        self._episodes[at] = 0

    def _start(self, rows: Tensor | None, here: Tensor | None = None) -> None:
        """Draw inputs and prices for `rows`, or for all rows if None, and put them at the first point.

        If the host knows `rows` already, they are `here`, and nothing waits for the device.
        """
        every = rows is None
        at = np.arange(self.num_envs) if rows is None else (rows.cpu() if here is None else here).numpy()
        assert self._seeds is not None
        seeds, episodes = self._seeds[at], self._episodes[at]
        self._episodes[at] += 1
        chosen = self._sent((draw(seeds, episodes, 0) % np.uint64(len(self._split))).astype(np.int64))
        if self._fixed_price is None:
            low, high = np.log(self.price_range)
            share = draw(seeds, episodes, 1).astype(np.float64) / 2.0**64
            prices = self._sent(np.exp(low + (high - low) * share).astype(np.float32))
        else:
            prices = torch.full((len(at),), self._fixed_price, dtype=torch.float32, device=self.device)
        inputs = self._split.inputs[chosen]
        if every:
            self._prices, self._drawn = prices, chosen
            # How much of each row's bill its rewards have charged so far; and what its output was worth when they last
            # paid for it, where they pay at every step.
            if self._recorded is None and self.graphs and self.sight.span == 1:
                self._recorded = steps_for(self.backbone, inputs, partial(self.sight.see, self.backbone), self._table)
                self.graphs = self._recorded is not None
            if self._recorded is None:
                begun = self.backbone.begin(inputs, table=self._table)
            else:
                begun = self._recorded.begin(inputs, prices)
            self._walk = begun.walk
            self._paid, self._gained = torch.zeros_like(self._walk.bill), self._floats(self.num_envs)
        else:
            assert rows is not None
            self._prices[rows], self._drawn[rows] = prices, chosen
            self._paid[rows], self._gained[rows] = 0, 0.0
            if self._recorded is None:
                begun = self.backbone.begin(inputs, self._walk, rows)
            else:
                begun = self._recorded.begin_some(inputs, prices, rows)
        self._states = merge([*self._states.values(), begun])

    def _start_after(self, ended: State) -> None:
        """Do `_start` in the rows of `ended`."""
        if ended.together:
            self._start(None)
        else:
            self._start(ended.rows, ended.held)

    def _sent(self, values: np.ndarray) -> Tensor:
        """Return `values` on the device, without waiting for it."""
        given, waits = torch.from_numpy(values), self.device.type != "cuda"
        return (given if waits else given.pin_memory()).to(self.device, non_blocking=not waits)

    def _floats(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)  # whatever torch's default type is

    def _observe(self) -> Tensor:
        standing = list(self._states.values()) + ([self._ended] if self._ended is not None else [])
        if self._recorded is not None and self._recorded.holds(standing):
            return self._recorded.seen(self._walk.all_rows)
        if len(standing) == 1 and standing[0].together:
            return self._see(standing[0])
        view = self._floats(self.num_envs, self.sight.width)
        for state in standing:
            view[state.rows] = self._see(state)
        return view

    def _see(self, state: State) -> Tensor:
        if self._recorded is not None and self._recorded.holds([state]):
            return self._recorded.seen(state.rows)
        return self.sight.see(self.backbone, state, self._prices)

    @property
    def episodes(self) -> Tensor:
        """The number of each row's episode, from 0 on: [N] int64."""
        return torch.from_numpy(self._episodes - 1).to(self.device)

    @torch.no_grad()
    def foresee(self, actions: Tensor) -> Tensor:
        """Return what `actions` [N] or [N, decisions] would earn on whole walks of the present inputs: [N].

        The walks begin anew. The environment is left as it is.
        """
        state = self.backbone.begin(self._walk.inputs, table=self._table)
        going, end = self._go({state.point: state}, actions.view(self.num_envs, -1))
        assert end is not None and not going, "only what decides the whole walk can be foreseen"
        earned, paid = self._terms(end)
        return self._floats(self.num_envs).index_copy(0, end.rows, earned + paid)

    def _go(self, states: dict[int, State], actions: Tensor) -> tuple[dict[int, State], State | None]:
        """Take as many decisions of every row as one answer covers, from `actions` [N, decisions].

        Returns:
            the states of the rows that go on, by point, and the state of those that have ended.
        """
        ends: list[State] = []
        for _ in range(self.sight.span):
            states = merge(self._advance(states.values(), actions))
            ends += [states.pop(END)] if END in states else []
            if not states:
                break
        return states, merge(ends).get(END)

    def _advance(self, states: Collection[State], actions: Tensor) -> list[State]:
        if states and self._recorded is not None and self._recorded.holds(states):
            return self._recorded.advance(states, actions[:, 0])
        return [end for s in states for end in self.backbone.advance(s, self.sight.pick(actions, s))]

    def _terms(self, end: State) -> tuple[Tensor, Tensor]:
        """Return the accuracy term [n] and the cost term [n] of whole episodes."""
        drawn, share = self._drawn[end.rows], end.get(end.walk.bill).float() / end.walk.table.dense
        return self.reward.terms(
            self.task, self.backbone.output(end).float(), self._split.targets[drawn], lambda: self._dense(drawn),
            self._prices[end.rows], share,
        )  # fmt: skip

    def _gain(self, state: State) -> Tensor:
        """Return how much more the outputs of the rows of `state`, which go on, are worth than was paid before: [n]."""
        drawn = self._drawn[state.rows]
        output, target = self.backbone.output(state).float(), self._split.targets[drawn]
        worth = self.reward.accuracy(self.task, output, target, lambda: self._dense(drawn))
        gained = worth - self._gained[state.rows]
        self._gained[state.rows] = worth
        return gained

    @torch.no_grad()
    def step_tensors(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Info]:
        """Take one answer of the policy for every row: one decision, or as many as the sight's answers cover.

        Args:
            actions: [N] or [N, decisions] int64, in range; this is not checked.

        Returns:
            observations [N, width], a new tensor; rewards [N]; terminated [N] bool; and `info`, tensors of N rows each.
            There, `ended` [N] bool marks the rows whose episode values count, and `final_obs` [N, width] (SAME_STEP
            only) holds their last observations.
        """
        if self._ended is not None and not (self._same_step or self._next_step):
            raise ValueError(
                f"the episodes of rows {self._ended.rows.sort().values.tolist()} have ended; reset these rows first, "
                "by reset(options={'reset_mask': ...})"
            )
        walk = self._walk
        waiting, self._ended = self._ended, None
        self._states, end = self._go(self._states, actions.view(self.num_envs, -1))
        if self.reward.own_cost:  # its shares of a walk are not known before the end
            cost_term = self._floats(self.num_envs)
        else:
            cost_term = -self._prices * ((walk.bill - self._paid).float() / walk.table.dense)
        self._paid = walk.bill.clone()
        accuracy_term = self._floats(self.num_envs)
        terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        info: Info = {"accuracy_term": accuracy_term, "cost_term": cost_term, "ended": terminated}
        if self.reward.per_step and self.backbone.speaks:
            for state in self._states.values():
                accuracy_term[state.rows] = self._gain(state)
        if end is not None:
            metric = self.task.score(self.backbone.output(end).float(), self._split.targets[self._drawn[end.rows]])
            earned, whole = self._terms(end)
            accuracy_term[end.rows] = earned - self._gained[end.rows] if self.reward.per_step else earned
            if self.reward.own_cost:
                cost_term[end.rows] = whole
            terminated[end.rows] = True
            info[self.task.metric] = torch.zeros_like(accuracy_term).index_copy(0, end.rows, metric)
            info["macs_fraction"] = walk.macs.float() / self.backbone.dense_macs
            info["route"] = walk.route.clone()
            info["price"] = self._prices.clone()
            info["target"] = self._split.targets[self._drawn]
            self._ended = end
        if self._same_step and end is not None:
            info["final_obs"] = self._observe_only(end)
            self._ended = None
            self._start_after(end)
        elif waiting is not None:
            self._start_after(waiting)
        return self._observe(), accuracy_term + cost_term, terminated, info

    def _observe_only(self, state: State) -> Tensor:
        view = self._floats(self.num_envs, self.sight.width)
        view[state.rows] = self._see(state)
        return view

    def render(self) -> tuple[Any, ...] | None:
        """Return a frame of each row by `render_mode`: where it stands, its route so far, and what that cost."""
        if self.render_mode is None:
            return None
        if self._seeds is None:
            raise ValueError("reset the environment before it is rendered")
        return tuple(MODES[self.render_mode](self._shown(row)) for row in range(self.num_envs))

    @torch.no_grad()
    def _shown(self, row: int) -> Shown:
        walk, column, worth = self._walk, None, dict[str, float]()
        for state in self._states.values():
            for at in (state.rows == row).nonzero().flatten().tolist():
                column = int(torch.as_tensor(state.column).expand(len(state.rows))[at])
        if self._ended is not None and bool((self._ended.rows == row).any()):
            mine = self._ended.where(self._ended.rows == row, END)
            target = self._split.targets[self._drawn[mine.rows]]
            worth[self.task.metric] = float(self.task.score(self.backbone.output(mine).float(), target))
        return Shown(
            walk.points, walk.route[row].cpu().numpy(), column, float(walk.macs[row]) / self.backbone.dense_macs,
            float(self._prices[row]), worth, self._image(row),
        )  # fmt: skip

    def _image(self, row: int) -> np.ndarray | None:
        """Return the input of a row as [height, width, 3] uint8 if it is an image of one or three channels."""
        raw = self._walk.inputs
        if not isinstance(raw, Tensor) or raw.dim() != 4 or raw.shape[1] not in (1, 3):
            return None
        image = self._data.raw(raw[row].float().cpu())
        if self._data.dtype != "uint8":  # numbers without known bounds
            image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
        image = image.expand(3, -1, -1).permute(1, 2, 0)
        shown: np.ndarray = (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return shown

    # Gymnasium's edge --------------------------------------------------------------------------------------

    def _masks(self, observations: Tensor) -> np.ndarray:
        masks = self.sight.mask(observations).to(torch.int8).cpu().numpy()
        return masks[:, 0] if self.sight.decisions == 1 else masks

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset for Gymnasium; if autoreset is DISABLED, `options` may hold `reset_mask` [N] bool."""
        unknown = set(options or {}) - {"reset_mask"}
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}; expected 'reset_mask' or none")
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        rows = None
        if mask is not None:
            mask = np.asarray(mask)
            if self._next_step or self._same_step or mask.shape != (self.num_envs,) or mask.dtype != bool:
                raise ValueError(
                    f"reset_mask is for autoreset_mode DISABLED, [{self.num_envs}] bool; got {mask.dtype} of shape "
                    f"{mask.shape} and {self.metadata['autoreset_mode']}"
                )
            rows = torch.from_numpy(np.flatnonzero(mask)).to(self.device)
        view = self.reset_tensors(seed, rows)
        return view.cpu().numpy(), {"action_mask": self._masks(view)}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step for Gymnasium."""
        given, shape = np.asarray(actions), self.action_space.shape
        if given.shape != shape or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(f"expected integer actions of shape {shape}, got {given.dtype} of shape {given.shape}")
        if given.min() < 0 or (given.reshape(len(given), -1) >= self.sight.counts).any():
            most = [count - 1 for count in self.sight.counts]
            wanted = f"0 to {most[0]}" if len(most) == 1 else f"0 and {most} at most"
            raise ValueError(f"expected actions of {wanted}, got {given.min()} to {given.max()}")
        if self._seeds is None:
            raise ValueError("reset the environment before its first step")
        view, reward, terminated, tensors = self.step_tensors(torch.from_numpy(given.astype(np.int64)).to(self.device))
        ended = terminated.cpu().numpy()
        info: dict[str, Any] = {"action_mask": self._masks(view)}
        for name in ("accuracy_term", "cost_term"):
            info[name] = tensors[name].cpu().numpy()
        if ended.any():
            for name in (self.task.metric, "macs_fraction", "route"):
                info[name], info[f"_{name}"] = tensors[name].cpu().numpy(), ended
        if "final_obs" in tensors:
            # Rows are filled in one by one: from a list of equally long rows, NumPy would make a matrix.
            final = np.full(self.num_envs, None, dtype=object)
            last = tensors["final_obs"].cpu().numpy()
            for i in np.flatnonzero(ended):
                final[i] = last[i]
            info["final_obs"], info["_final_obs"] = final, ended
            names = [name for name in info if not name.startswith("_") and name not in ("action_mask", "final_obs")]
            info["final_info"] = {name: info[name] for name in names} | {f"_{name}": ended for name in names}
            info["_final_info"] = ended
        return view.cpu().numpy(), reward.cpu().numpy(), ended, np.zeros(self.num_envs, bool), info
