"""Modules that run as they are and are held at their parts; the invariants of the walk are in test_walk."""

from __future__ import annotations

import copy
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dynrl
from dynrl.backbones import END, ExitModule, SkipModule, merge
from dynrl.backbones.held import Held
from dynrl.data import Augmentation, Dataset, Split
from dynrl.inputs import Named
from dynrl.policies import RandomPolicy, StaticPolicy
from tests.cases import vector_env
from tests.toys import Reader

BLOCKS = [f"blocks.{i}" for i in range(3)]
TOKENS, ROWS = 5, 5  # as many rows as tokens, so that a shape alone does not tell which tensors have rows


def tokens(rows=ROWS, hidden=True):
    lengths = torch.arange(rows) % TOKENS + 1 if hidden else torch.full((rows,), TOKENS)
    mask = (torch.arange(TOKENS) < lengths.unsqueeze(1)).long()
    return {"x": torch.randint(11, (rows, TOKENS)), "mask": mask}


def reader(kind=SkipModule, parts=BLOCKS):
    module = Reader(ids=True).eval()
    return module, kind(module, tokens(2), parts)


@pytest.mark.parametrize(("kind", "parts"), [(SkipModule, BLOCKS), (ExitModule, BLOCKS[:2])])
@pytest.mark.parametrize("hidden", [True, False])
@torch.no_grad()
def test_tensors_by_name_reach_the_module_and_rows_go_together_as_alone(kind, parts, hidden):
    module, backbone = reader(kind, parts)
    given = tokens(hidden=hidden)
    model = dynrl.plug(backbone, StaticPolicy(backbone.full_route))
    torch.testing.assert_close(model(given), module(**given)["logits"])
    torch.testing.assert_close(model(**given), model(given))
    route = torch.randint(0, 2, (ROWS, backbone.columns))
    together = backbone.run_route(given, route)
    for row in range(ROWS):
        alone = {name: part[row : row + 1] for name, part in given.items()}
        torch.testing.assert_close(together.outputs[row : row + 1], backbone(alone, route[row : row + 1]))


@torch.no_grad()
def test_integers_stay_integers_in_another_type():
    module, backbone = reader()
    model = dynrl.plug(backbone, RandomPolicy(backbone.thrift, 0.5)).to(torch.bfloat16)
    assert model(tokens()).dtype is torch.bfloat16
    assert backbone.config["input_shape"] == {"x": [TOKENS], "mask": [TOKENS]}
    again = SkipModule(module, **backbone.config)
    assert again.form == backbone.form and again.fingerprint() == backbone.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(2, TOKENS)}, "expected 'x' of torch.int64, got torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.int64)}, r"expected 'mask' of shape \[batch, 5\], got .*\(2, 4\)"),
        ({"mask": torch.ones(3, TOKENS, dtype=torch.int64)}, "one row for each input, got rows {'x': 2, 'mask': 3}"),
        ({"more": torch.ones(2, 1)}, r"expected tensors by the names \['mask', 'x'\], got \['mask', 'more', 'x'\]"),
        ({"x": 1}, "one row for each input, got {'x': 'int'}"),
    ],
)
def test_other_inputs_are_refused(change, message):
    model = dynrl.plug(reader()[1], StaticPolicy((1, 1, 1)))
    with pytest.raises(ValueError, match=message):
        model(tokens(2) | change)


def test_inputs_come_in_one_way():
    model = dynrl.plug(reader()[1], StaticPolicy((1, 1, 1)))
    with pytest.raises(ValueError, match=r"all tensors by name, got a Tensor and \['mask'\] by name"):
        model(tokens(2)["x"], mask=tokens(2)["mask"])
    with pytest.raises(ValueError, match="all tensors by name, got nothing"):
        model()
    for given, got in (
        (tuple(tokens().values()), "input_ids.*got tuple of Tensor"),
        (
            {"x": tokens()["x"], "mask": [5]},
            "examples of all tensors, or shapes of all, got {'x': 'Tensor', 'mask': 'list'}",
        ),
    ):
        with pytest.raises(ValueError, match=got):
            SkipModule(Reader(ids=True), given, BLOCKS)
    with pytest.raises(ValueError, match=r"expected a backbone, got Reader; .*SkipModule\(network, "):
        dynrl.plug(Reader(), StaticPolicy((1, 1, 1)))


def test_token_ids_are_refused_by_a_network_of_numbers():
    model = dynrl.plug(SkipModule(Reader(), (5, 8), BLOCKS), StaticPolicy((1, 1, 1)))
    with pytest.raises(ValueError, match=r"expected inputs of torch\.float32, got torch\.int64"):
        model(torch.ones(2, 5, 8, dtype=torch.int64))


class Bare(nn.Module):
    """The first block is given the input or a weight itself, and all features are returned beside the answer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4)) if weight else None
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        seen = [x if self.weight is None else self.weight.expand(len(x), 4)]
        for block in self.blocks:
            seen.append(block(seen[-1]))
        return seen[-1], seen


@pytest.mark.parametrize("weight", [False, True])
@torch.no_grad()
def test_neither_inputs_nor_weights_are_overwritten(weight):
    torch.manual_seed(0)
    module, x = Bare(weight), torch.randn(6, 4)
    backbone = SkipModule(module, {"x": x}, [f"blocks.{i}" for i in range(4)])
    before, route = x.clone(), torch.randint(0, 2, (6, 4))
    state = [tensor.clone() for tensor in module.state_dict().values()]
    for _ in range(2):
        y = before if module.weight is None else module.weight.expand(6, 4)
        for block, run in zip(module.blocks, route.t().unsqueeze(2), strict=True):
            y = torch.where(run == 1, block(y), y)
        torch.testing.assert_close(backbone(Named({"x": x}), route), y)
        route[:, 0] = 0  # what passes the first block by is still not ours
    assert torch.equal(x, before)
    assert all(map(torch.equal, module.state_dict().values(), state))


def test_inputs_by_name_are_taken_by_rows_not_one_by_one():
    """One number a row is none that has rows."""
    given = Named({"x": torch.randn(6, 5), "tag": torch.arange(6)})
    with pytest.raises(TypeError, match="not iterable"):
        iter(given)
    _, backbone = reader()
    assert backbone.regions(given, torch.ones(6, 3).long()) == [[]] * 6


@torch.no_grad()
def test_copies_and_merged_states_enter_the_module_anew(monkeypatch):
    _, backbone = reader()
    given, route = Named(tokens(6)), torch.randint(0, 2, (6, 3))
    wanted, entered = backbone(given, route), []
    at = Held.at
    monkeypatch.setattr(Held, "at", lambda *args: entered.append(args[1]) or at(*args))
    state = backbone.begin(given.clone())
    (state,) = backbone.advance(state, state.along(route))
    assert not entered
    twin, pickled = state.copy(), copy.deepcopy(state)
    assert state.held is not None and twin.held is None and pickled.held is None
    for each in (state, twin, pickled):
        while each.point != END:
            (each,) = backbone.advance(each, each.along(route))
        torch.testing.assert_close(backbone.output(each), wanted)
    assert entered == [1, 1]
    # Two slots begin again, and stand at one point with the others that did so later.
    state = backbone.begin(given.clone())
    walk, rows = state.walk, torch.tensor([4, 1])
    kept = state.where(torch.tensor([True, False, True, True, False, True]), 0)
    (state,) = merge([kept, backbone.begin(given[rows], walk, rows)]).values()
    while state.point != END:
        (state,) = backbone.advance(state, state.along(route))
    torch.testing.assert_close(walk.outputs, wanted)


@pytest.mark.parametrize(
    ("decision", "kind", "parts"), [("skip", SkipModule, BLOCKS), ("exit", ExitModule, BLOCKS[:2])]
)
def test_slots_that_begin_anew_walk_beside_the_others(decision, kind, parts, monkeypatch):
    _, backbone = reader(kind, parts)
    split = Split(Named(tokens(40)), torch.randint(3, (40,)))
    data = Dataset("tokens", 3, split, split, split, Augmentation())
    entered = []
    at = Held.at
    monkeypatch.setattr(Held, "at", lambda *args: entered.append(args[1]) or at(*args))
    make = vector_env(decision)
    together = make(num_envs=5, backbone=backbone, data=data, autoreset_mode="SameStep")
    alone = [make(num_envs=1, backbone=backbone, data=data, autoreset_mode="SameStep") for _ in range(5)]
    seen = together.reset_tensors(seed=3)
    torch.testing.assert_close(seen, torch.cat([env.reset_tensors(seed=3 + i) for i, env in enumerate(alone)]))
    for _ in range(8):
        actions = torch.randint(0, 2, (5,))
        seen, rewards, ended, _ = together.step_tensors(actions)
        steps = [env.step_tensors(action.unsqueeze(0)) for env, action in zip(alone, actions, strict=True)]
        for mine, theirs in zip((seen, rewards, ended), zip(*(step[:3] for step in steps), strict=True), strict=True):
            torch.testing.assert_close(mine, torch.cat(theirs), atol=1e-5, rtol=1e-5)
    assert not entered, "rows that stand at one point began together, so every forward goes on"


def test_several_threads_walk_at_once():
    module, backbone = reader()
    model, given = dynrl.plug(backbone, StaticPolicy(backbone.full_route)), [tokens(n + 2) for n in range(4)]
    found = [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = model(given[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for said, each in zip(found, given, strict=True):
            torch.testing.assert_close(said, module(**each)["logits"])


@torch.no_grad()
def test_what_nobody_goes_on_from_is_freed():
    _, backbone = reader()
    state = backbone.begin(tokens())
    (state,) = backbone.advance(state, torch.ones(ROWS, dtype=torch.int64))
    kept = weakref.ref(state.held._leaves[0])
    assert kept() is not None
    state = state.copy()
    assert kept() is None


class Frozen(Reader):
    def forward(self, x, mask=None):
        with torch.no_grad():
            return super().forward(x, mask)


def test_a_mode_of_the_modules_own_stays_its_own():
    backbone = SkipModule(Frozen(ids=True), tokens(2), BLOCKS)
    state = backbone.begin(tokens())
    assert torch.is_grad_enabled()
    (state,) = backbone.advance(state, torch.ones(ROWS, dtype=torch.int64))
    assert torch.is_grad_enabled() and not state.features.requires_grad


class Odd(nn.Module):
    """A chain that torch.fx cannot trace, odd in one way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(OddBlock(how) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        before = self.blocks[0](x, SimpleNamespace(**{"type": 1}) if self.how == "object" else None)
        first = before[0] if isinstance(before, tuple) else before["y"] if self.how == "dict" else before
        if self.how == "twice":
            first = self.blocks[0](first)
        after = self.blocks[1](x=first) if self.how != "order" else first
        after = after[0] if isinstance(after, tuple) else after["y"] if self.how == "dict" else after
        if self.how == "around":
            after = after + first
        return self.head(after.flatten(1) if self.how != "answer" else after) if self.how != "text" else "text"


class OddBlock(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.inner = how, nn.Linear(4, 4)

    def forward(self, x, more=None):
        y = x + self.inner(x)
        return (y, y.mean(1)) if self.how == "tuple" else {"y": y} if self.how == "dict" else y


@pytest.mark.parametrize(
    ("how", "names", "message"),
    [
        ("object", None, "'blocks.0' is given a SimpleNamespace at .*, whose rows cannot be cut down"),
        ("twice", None, "run 'blocks.0' once for an input, it does so 2 times"),
        ("order", None, "run 'blocks.1' once for an input, it does so 0 times"),
        ("", ["blocks.1", "blocks.0"], r"in the order in which Odd runs them: \['blocks\.0', 'blocks\.1'\]"),
        ("", ["blocks", "blocks.0"], "got 'blocks.0', which lies inside 'blocks'"),
        (
            "around",
            None,
            "needs something that was made before 'blocks.1' after it, too: such a part is no whole block",
        ),
        ("tuple", None, "'blocks.0' returns a Tensor of its own behind its features"),
        ("dict", None, "expected 'blocks.0' to return features, or a tuple that begins with them, got dict"),
        (
            "text",
            None,
            "expected Odd to return a tensor, a tuple that begins with one, or an object with `logits`, got str",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(how, names, message):
    with pytest.raises(ValueError, match=message):
        SkipModule(Odd(how), (4,), names or ["blocks.0", "blocks.1"])


class DynamicCache:
    pass


class Cached(Odd):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return self.head(self.blocks[1](self.blocks[0](x, more=DynamicCache())))


def test_caches_are_refused_by_name():
    message = r"'blocks\.0' is given a DynamicCache at .*'more'.*use_cache=False"
    with pytest.raises(ValueError, match=message):
        SkipModule(Cached(""), (4,), ["blocks.0", "blocks.1"])


class Folded(nn.Module):
    """Tokens are folded into rows: those of one input behind those of another, or the first of each before the others.

    Between the blocks there may be attention that wants the tokens first, and is given a mask with the rows first.
    """

    def __init__(self, tokens_first, attends=False):
        super().__init__()
        self.tokens_first, self.attends = tokens_first, attends
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x, mask=None):
        turned = x.transpose(0, 1) if self.tokens_first else x
        folded, shape = turned.reshape(-1, 4), turned.shape
        for block in self.blocks:
            folded = block(folded)
            if self.attends:
                y = folded.view(shape).transpose(0, 1)
                folded = folded + self.attention(y, y, y, key_padding_mask=mask)[0].transpose(0, 1).reshape(-1, 4)
        return self.head(folded.view(shape).mean(0 if self.tokens_first else 1))


@pytest.mark.parametrize("kind", [SkipModule, ExitModule])
@torch.no_grad()
def test_tokens_are_folded_into_rows_input_by_input(kind):
    torch.manual_seed(0)
    module, x, route = Folded(False).eval(), torch.randn(7, 5, 4), torch.randint(0, 2, (7, 3))
    backbone = kind(module, {"x": x}, BLOCKS)
    together = backbone({"x": x}, route)
    for row in range(7):
        mine = slice(row, row + 1)
        torch.testing.assert_close(backbone({"x": x[mine]}, route[mine]), together[mine])
    with pytest.raises(ValueError, match=r"Folded cannot be routed row by row.*rows first.*behind those of another"):
        kind(Folded(True), {"x": x}, BLOCKS)


def test_exits_before_a_layer_that_does_not_know_its_rows_are_refused():
    given = {"x": torch.randn(7, 5, 4), "mask": torch.zeros(7, 5, dtype=torch.bool)}
    SkipModule(Folded(False, attends=True), given, BLOCKS)
    with pytest.raises(ValueError, match=r"cannot be routed row by row.*\(AssertionError: .*key_padd.*rows first"):
        ExitModule(Folded(False, attends=True), given, BLOCKS)


class Strict(nn.MultiheadAttention):
    def forward(self, x, *_, key_padding_mask):
        if len(key_padding_mask) != x.shape[1]:
            raise ValueError("a mask for each row, please")
        return (x,)


def test_what_a_layer_says_of_rows_that_are_not_its_own_is_passed_on():
    module = Folded(False, attends=True)
    module.attention = Strict(4, 2)
    given = {"x": torch.randn(7, 5, 4), "mask": torch.zeros(7, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"cannot be routed row by row.*\(ValueError: a mask for each row, please\)"):
        ExitModule(module, given, BLOCKS)


class Silent(nn.Module):
    """No op tells whether its features are [n, C, L] or [n, T, C]."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Hardtanh(), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.block(x).flatten(1))


@torch.no_grad()
def test_channels_that_nothing_tells_are_asked_for():
    x = torch.randn(3, 4, 3)
    with pytest.raises(ValueError, match=r"features at 'block'.*say channels='first' .* or channels='last'"):
        SkipModule(Silent(), (4, 3), ["block"])
    for channels, places in (("first", 2), ("last", 1)):
        backbone = SkipModule(Silent(), (4, 3), ["block"], channels=channels)
        torch.testing.assert_close(backbone.observe(backbone.begin(x)), x.mean(places))
        assert backbone.config["channels"] == channels
    with pytest.raises(ValueError, match="expected channels='first' or 'last', or None, got 'middle'"):
        SkipModule(Silent(), (4, 3), ["block"], channels="middle")
