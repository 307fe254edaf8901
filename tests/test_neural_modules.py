"""Neural module networks: what each choice does to the stack, which are closed, what the parser lays out."""

from __future__ import annotations

import pytest
import torch

from dynrl.agents.ppo import ppo_config
from dynrl.agents.rllib import router_of
from dynrl.backbones import END, NeuralModules
from dynrl.data import Augmentation, Dataset, Split, load_dataset
from dynrl.data.shapes import _draw
from dynrl.deploy import RoutedModel
from dynrl.evaluation import score
from dynrl.evaluation.layouts import layouts
from dynrl.plans import plan
from dynrl.policies import PolicySpec

AND, ANSWER, ONE, LEFT, RIGHT, RED, BLUE = range(7)
ROWS = 40


def network(**settings):
    torch.manual_seed(0)
    given = dict(input_shape=(3, 6, 8), classes=3, properties=2, moves=2, cell=2, channels=4, width=5, depth=3, steps=8)
    return NeuralModules(**given | settings).eval()


def columns(backbone, layout):
    """The route of a layout, a list of choices in turn: a column is a visit of the number of maps that there are."""
    route, been, held = [0] * backbone.columns, [0] * len(backbone.points), 0
    for choice in layout:
        route[sum(point.visits for point in backbone.points[:held]) + been[held]] = choice
        been[held] += 1
        held += {AND: -1, RED: 1, BLUE: 1}.get(choice, 0)
    return route


def in_turn(backbone, route):
    """The choices of a row's route [columns], in turn."""
    found, been, held = [], [0] * len(backbone.points), 0
    while True:
        column = sum(point.visits for point in backbone.points[:held]) + been[held]
        found.append(int(route[column]))
        been[held] += 1
        if found[-1] in (ANSWER, ONE):
            return found
        held += {AND: -1, RED: 1, BLUE: 1}.get(found[-1], 0)


@torch.no_grad()
def by_hand(backbone, x, layout):
    """What one row gets, from a stack as a list."""
    cells, stack = backbone.stem(x[None, :-1]), []
    for choice in layout:
        if choice == ONE:
            return backbone.network(cells, x[-1].flatten()[None, :6])[0]
        if choice == ANSWER:
            (last,) = stack
            return backbone.answer(last)[0]
        if choice == AND:
            first, second = stack.pop(-2), stack.pop()
            stack.append(backbone.join(torch.cat([first, second], 1)))
        elif choice in (LEFT, RIGHT):
            stack.append(backbone.moves[choice - LEFT](stack.pop()))
        else:
            stack.append(backbone.finds[choice - RED](cells))
    raise AssertionError("a layout ends with an answer")


@torch.no_grad()
def test_each_row_gets_what_its_layout_makes_of_its_stack():
    backbone = network()
    inputs = backbone.random_inputs(ROWS)
    generator = torch.Generator().manual_seed(0)
    tried = set()
    for _ in range(6):
        route = torch.randint(0, backbone.num_choices, (ROWS, backbone.columns), generator=generator)
        walk = backbone.run_route(inputs, route)
        for x, output, ran, macs in zip(inputs, walk.outputs, walk.route, walk.macs, strict=True):
            layout = in_turn(backbone, ran)
            assert columns(backbone, layout) == ran.clamp_min(0).tolist() and len(layout) <= 8
            torch.testing.assert_close(output, by_hand(backbone, x, layout), atol=1e-5, rtol=1e-5)
            paid = {ANSWER: 3, AND: 0, LEFT: 12 * 9, RIGHT: 12 * 9, RED: 12 * 20, BLUE: 12 * 20}
            one = 12 * 9 * 5 * (4 + 5) + 6 * 20 + 5 * 12 * 5 + 3 * 5
            assert macs == 12 * (2 * 4 * 4 + 16) + sum(paid.get(choice, one) for choice in layout)
            tried |= set(layout)
    assert tried == set(range(7))


@torch.no_grad()
def test_what_the_stack_does_not_allow_is_closed_and_a_step_is_left_for_the_answer():
    backbone = network(depth=2, steps=6)
    state, shown = backbone.begin(backbone.random_inputs(3)), []
    for choice in (RED, RED, LEFT, LEFT, AND):
        shown.append(backbone.open_choices(state)[0].nonzero().flatten().tolist())
        (state,) = backbone.advance(state, torch.full((3,), choice))
    moves, finds = [LEFT, RIGHT], [RED, BLUE]
    assert shown == [[ONE, *finds], [ANSWER, *moves, *finds], [AND, *moves], [AND, *moves], [AND]]
    assert backbone.open_choices(state)[0].nonzero().flatten().tolist() == [ANSWER]
    (end,) = backbone.advance(state, torch.full((3,), RED))
    assert end.point == END and (end.walk.last == ANSWER + 1).all(), "the nearest open choice ran"


def test_a_question_is_laid_out_in_reverse_polish_notation():
    backbone = network()
    asked = {  # properties of the thing, sides, properties of the other
        (1, 0, 0, 0, 0, 0): [RED, ANSWER],
        (1, 1, 0, 0, 0, 0): [RED, BLUE, AND, ANSWER],
        (0, 1, 0, 1, 1, 0): [RED, RIGHT, BLUE, AND, ANSWER],
        (1, 0, 1, 0, 1, 1): [RED, BLUE, AND, LEFT, RED, AND, ANSWER],
        (1, 1, 1, 0, 0, 1): [BLUE, LEFT, RED, AND, BLUE, AND, ANSWER],
    }
    routes = backbone.layout(torch.tensor([*asked], dtype=torch.float32))
    assert routes.tolist() == [columns(backbone, layout) for layout in asked.values()]
    inputs = backbone.random_inputs(len(asked))
    inputs[:, -1].flatten(1)[:, :6] = torch.tensor([*asked]).float()
    walk = backbone.run_route(inputs, routes)
    assert [in_turn(backbone, ran) for ran in walk.route] == [*asked.values()], "all of it is open"


def words_after(asked, layout):
    """Which modules a question still names in each role [3, 7], and how many words of each role made each map."""
    thing, side, other = (set(asked[at].nonzero().flatten().tolist()) for at in (slice(2), slice(2, 4), slice(4, 6)))
    left, stack = [{RED + k for k in thing}, {LEFT + k for k in side}, {RED + k for k in other}], []
    for choice in layout:
        role = next((role for role in (2, 1, 0) if choice in left[role]), None)
        used = [int(role == k) for k in range(3)]
        if role is not None:
            left[role].remove(choice)
        takes = {AND: 2, LEFT: 1, RIGHT: 1}.get(choice, 0)
        stack, taken = stack[: len(stack) - takes], stack[len(stack) - takes :]
        stack.append([sum(counts) for counts in zip(used, *taken, strict=True)])
    return [[float(choice in names) for choice in range(7)] for names in left], stack


@torch.no_grad()
@pytest.mark.parametrize(
    "layout", [(), (RED,), (RED, RED), (BLUE, LEFT, RED), (RED, BLUE, AND, RIGHT), (RED, RED, AND, RED, BLUE)]
)
def test_policies_see_which_words_are_left_and_what_the_maps_are_made_of(layout):
    backbone = network()
    inputs = backbone.random_inputs(40)
    inputs[::2, -1].flatten(1)[:, 0] = 1  # so some questions name a module twice
    state, asked = backbone.begin(inputs), inputs[:, -1].flatten(1)[:, :6]
    assert torch.equal(backbone.question(inputs), asked)
    for choice in layout:
        (state,) = backbone.advance(state, torch.full((40,), choice))
    seen = backbone.observe(state)
    assert seen.shape == (40, backbone.feature_width)
    counts, maps, flags, odds = seen.split([3, 15, 21, 7], 1)
    for row, question in enumerate(asked):
        left, stack = words_after(question, layout)
        assert flags[row].view(3, 7).tolist() == left and counts[row].tolist() == [sum(names) for names in left]
        named = torch.tensor(left).amax(0)
        assert odds[row].tolist() == [6, 0, 0, *(6 * named[3:] - 3).tolist()]
        expected = torch.zeros(3, 5)
        for k, words in enumerate(reversed(stack)):
            numbers = state.features[1][row, len(stack) - 1 - k]
            expected[k] = torch.tensor([numbers.max(), numbers.mean(), *words])
        torch.testing.assert_close(maps[row].view(3, 5), expected)


@torch.no_grad()
def test_it_says_what_it_would_answer_now():
    backbone = network()
    state = backbone.begin(backbone.random_inputs(5))
    assert (backbone.output(state) == 0).all(), "no map says anything"
    for choice in (RED, LEFT, BLUE, BLUE):
        (state,) = backbone.advance(state, torch.full((5,), choice))
        end = state.copy()
        for rest in [AND] * (state.point - 1) + [ANSWER]:
            (end,) = backbone.advance(end, torch.full((5,), rest))
        assert end.point == END
        torch.testing.assert_close(backbone.output(end), backbone.output(state))


def test_modules_are_trained_on_the_parsers_layouts_and_the_one_network_alone():
    backbone = network().train()
    inputs = backbone.random_inputs(ROWS)
    rate = torch.zeros(ROWS)
    rate[:7] = 1
    ((answer,),) = backbone.training_outputs(inputs, rate)
    route = backbone.layout(backbone.question(inputs))
    torch.testing.assert_close(answer.output[:7], backbone(inputs)[:7])
    torch.testing.assert_close(answer.output[7:], backbone(inputs, route)[7:])
    ((answer,),) = backbone.training_outputs(inputs, None)
    answer.output.sum().backward()
    used = {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None}
    assert used == {"stem", "network"}


def maps_of(images):
    """Which of the 3x3 cells hold each property, by pixels: [n, 6, 3, 3] bool, red, green, blue, circle, square, triangle."""
    cells = images.unfold(2, 10, 10).unfold(3, 10, 10).flatten(4) > 0  # [n, 3, 3, 3, 100]
    count = cells.sum(4).amax(1, keepdim=True)
    sizes = (52, 64, 32)
    assert set(count.unique().tolist()) <= {0, *sizes}
    return torch.cat([cells.any(4), *(count == size for size in sizes)], 1)


@pytest.mark.parametrize("split", ["train", "validation", "test", "unseen"])
def test_exact_modules_in_the_parsers_layout_give_the_answers(split):
    data = load_dataset("shapes").split(split).head(300)
    backbone = NeuralModules((4, 30, 30), channels=4, width=4)
    routes, maps = backbone.layout(backbone.question(data.inputs)), maps_of(data.inputs[:, :3])
    for has, route, target, modules in zip(maps, routes, data.targets, data.difficulty["modules"], strict=True):
        stack, been, length = [], [0, 0, 0], 0
        while True:
            held = len(stack)
            choice = int(route[[0, 1, 10][held] + been[held]])
            been[held], length = been[held] + 1, length + 1
            if choice == 1:
                break
            if choice == 0:
                stack.append(stack.pop() & stack.pop())
            elif choice < 7:
                down, on = ((0, -1), (0, 1), (-1, 0), (1, 0))[choice - 3]
                moved = torch.zeros(5, 5, dtype=torch.bool)
                moved[1 + down : 4 + down, 1 + on : 4 + on] = stack.pop()
                stack.append(moved[1:4, 1:4])
            else:
                stack.append(has[choice - 7])
        assert bool(stack[0].any()) == bool(target) and length == modules and len(stack) == 1


def test_questions_for_the_same_pair_of_things_stand_in_one_split_only():
    data, pairs = load_dataset("shapes"), {}
    for name in ("train", "validation", "test"):
        split = data.split(name)
        asked = split.inputs[:, 3, 0, :16].long()
        relative = asked[asked[:, 6:10].any(1)]
        pairs[name] = {tuple(row) for row in relative[:, [*range(6), *range(10, 16)]].tolist()}
        assert split.targets.float().mean() == pytest.approx(0.5, abs=0.03)
        assert (len(relative) == len(asked)) == (name != "train")
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"] and len(pairs["test"]) > 60
    again, other = (_draw(0, 50, seed).inputs for seed in (0, 1))
    assert torch.equal(again, _draw(0, 50, 0).inputs) and not torch.equal(again, other)


def test_the_rules_are_the_parsers_layout_and_layouts_by_chance():
    backbone, data = network(), network().random_inputs(200)
    split = Split(data, torch.zeros(200, dtype=torch.int64))
    rules = {name: fit(backbone, split) for name, fit in layouts(backbone).items()}
    assert set(rules) == {"expert layout", "random layout"}
    expert = rules["expert layout"](1.0)
    assert torch.equal(expert.route(data), backbone.layout(backbone.question(data)))
    least = score(RoutedModel(backbone, expert), split).macs_fraction
    assert rules["expert layout"](least + 1e-6) is expert and rules["expert layout"](least - 1e-6) is None
    routes = backbone.run_route(data, rules["random layout"](1.0).route(data)).route
    assert set(routes[routes >= 0].tolist()) == {*range(7)} - {ONE}, "never the one network"
    assert len({tuple(in_turn(backbone, route)) for route in routes}) > 100


def test_gates_are_refused():
    with pytest.raises(ValueError, match="NeuralModules has no gates"):
        plan("branch", "shapes", agent="gate")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"input_shape": (1, 6, 8)}, "a channel of at least 6 numbers"), ({"cell": 7}, "at least one cell of 7x7"),
        ({"input_shape": (3, 2, 2)}, "a channel of at least 6 numbers"), ({"depth": 1}, "depth of at least 2"),
        ({"steps": 5}, "steps of at least 6"), ({"properties": 0}, "properties of at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        network(**settings)


@torch.no_grad()
def exact():
    """Modules made by hand on images of six cells: a property is a channel. Questions are for one of two properties."""
    backbone = NeuralModules((3, 2, 3), properties=2, moves=1, cell=1, channels=2, width=2, steps=4).eval()
    for layer in (backbone.stem[0], backbone.stem[2], *(find[0] for find in backbone.finds)):
        layer.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        layer.bias.zero_()
    for k, find in enumerate(backbone.finds):
        find[2].weight.copy_(10 * torch.eye(2)[k].view(1, 2, 1, 1))
        find[2].bias.fill_(-5)
    for parameter in backbone.network.parameters():
        parameter.zero_()
    inputs = torch.zeros(128, 3, 2, 3)
    asked, shown = torch.arange(128) % 2, torch.arange(128) // 2 % 2
    inputs[torch.arange(128), shown, 1, torch.arange(128) % 3] = 1
    inputs[torch.arange(128), 2, 0, asked] = 1
    split = Split(inputs, (asked == shown).long())
    return backbone, Dataset("exact", 2, split, split, split, Augmentation()), asked


@pytest.mark.usefixtures("ray_local")
def test_a_policy_finds_out_which_module_a_question_needs():
    backbone, data, asked = exact()
    spec = PolicySpec.of("sequential", backbone, (0.1, 0.2), hidden=0)
    env = {"backbone": backbone, "data": data, "price_range": [0.1, 0.2], "reward": "probability"}
    settings = {"num_envs": 64, "rollout": 8, "learning_rate": 2e-2, "total_steps": 20_000}
    algorithm = ppo_config("dynrl/Branch-v0", env, spec, **settings).build_algo()
    for _ in range(15):
        algorithm.train()
    model = RoutedModel(backbone, router_of(algorithm))
    algorithm.stop()
    model.set_price(0.2)
    outputs = model(data.test.inputs)
    assert torch.equal(outputs.argmax(1), data.test.targets)
    finds = torch.tensor([4, 5])[asked]
    assert torch.equal(model.last_route.actions[:, 0], finds) and (model.last_route.actions[:, 1] == 1).all()
