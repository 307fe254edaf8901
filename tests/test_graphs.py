"""What a routed model runs, recorded as graphs: the same outputs, routes and errors as without."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from dynrl.backbones import Backbone, ExitModule, SkipModule, SkipResNet, SlimmableResNet
from dynrl.backbones.pieces import STEPS
from dynrl.data import Augmentation, Dataset, Split
from dynrl.deploy import RoutedModel
from dynrl.deploy.graphs import KEPT, WAYS, InPieces, Recording, Whole, plain
from dynrl.ops.backend import selects
from dynrl.ops.recorder import Told, recorder_for
from dynrl.policies import RandomPolicy
from tests.cases import BACKBONES, EXAMPLES, make_backbone, make_policy, trained, vector_env
from tests.devices import CallingRecorder, NoHostSync, TapeRecorder
from tests.toys import Convolutional, Transformer

ON_CPU = torch.device("cpu")
IN_PIECES = [name for name in BACKBONES if "pieces" in EXAMPLES[name].captures]
WHOLE = [(name, way) for name in BACKBONES for way in EXAMPLES[name].captures if way != "pieces"]
EITHER = [name for name in BACKBONES if {"kernels", "select"} <= {*EXAMPLES[name].captures}]


def routed(name: str | Backbone, seed: int = 0) -> RoutedModel:
    """A model that decides differently from row to row: its policy sees how features differ from their mean there."""
    torch.manual_seed(seed)
    backbone = make_backbone(name).eval() if isinstance(name, str) else name
    policy = make_policy(backbone)
    weight, width = policy.hidden.weight, backbone.feature_width

    def look(state):
        seen = policy.sight.see(backbone, state, 0.1)[:, :width]
        weight[:, :width] += torch.randn(len(weight), width) / (seen.std(0) + 1e-4)
        means.append((state.point, seen.mean(0)))
        return torch.ones_like(state.rows)

    with torch.no_grad():
        means: list[tuple[int, torch.Tensor]] = []
        weight.zero_()
        backbone.run(backbone.random_inputs(64), look)
        for point, mean in means:
            weight[:, width + point] = -weight[:, :width] @ mean
    nn.init.normal_(policy.head.weight, std=1.0)
    nn.init.zeros_(policy.head.bias)
    return RoutedModel(backbone, policy)


def recording(model: RoutedModel, inputs: torch.Tensor, recorder, *ways: str) -> Whole | InPieces:
    """A recording in pieces, or a whole one whose points run by the fastest of the ways."""
    given = model.backbone, model.chooser, inputs, recorder
    return InPieces(*given) if ways == ("pieces",) else Whole(*given, ways)


def same(model: RoutedModel, walk, inputs: torch.Tensor) -> set[str]:
    """Check a walk against the model's own, and return the routes in it."""
    expected = model.walk(inputs)
    for field in ("route", "macs", "steps", "last"):
        assert torch.equal(getattr(walk, field), getattr(expected, field)), field
    torch.testing.assert_close(walk.outputs, expected.outputs, atol=1e-5, rtol=1e-4)
    return {str(route) for route in walk.route.tolist()}


def test_the_families_that_are_recorded():
    assert {"skip", "exit", "skip in a network", "exits in a transformer", "exits at scales"} <= set(IN_PIECES)
    assert {"skip in place", "exits in place", "skip of paths"}.isdisjoint(IN_PIECES)
    assert all(way in WAYS for name in BACKBONES for way in EXAMPLES[name].captures)


@pytest.mark.parametrize("name", IN_PIECES)
def test_pieces_are_the_walk(name):
    model, routes = routed(name), set()
    inputs = model.backbone.random_inputs(7)
    with plain(ON_CPU):
        pieces = InPieces(model.backbone, model.chooser, inputs, TapeRecorder())
        for seed in range(3):
            drawn = model.backbone.random_inputs(7, torch.Generator().manual_seed(seed))
            inputs.copy_(drawn)
            assert pieces()
            routes |= same(model, pieces.walk, drawn)
            for point in range(len(model.backbone.points)):  # repeats are not counted
                running = int((pieces.walk.route[:, point] == 1).sum())
                assert pieces.pieces.running(point) == running
                if model.backbone.speaks and not running:
                    break
    assert len(routes) > 1, "the rows go one way only, so that nothing is tested"


@pytest.mark.parametrize("name", ["exit", "exits in a network", "exits at scales", "skip in a network"])
def test_pieces_of_many_rows_may_follow_pieces_of_few(name):
    model, generator = routed(name), torch.Generator().manual_seed(0)
    inputs = model.backbone.random_inputs(9)
    with plain(ON_CPU):
        for _ in range(3):
            pieces = InPieces(model.backbone, model.chooser, inputs, TapeRecorder(drawn=generator))
            for _ in range(4):
                drawn = model.backbone.random_inputs(9, generator)
                inputs.copy_(drawn)
                assert pieces()
                same(model, pieces.walk, drawn)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a graph cannot be recorded here")
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("name", "way"), [(name, way) for name in BACKBONES for way in EXAMPLES[name].captures])
def test_a_device_replays_what_it_would_run(name, way):
    model = routed(name).cuda()
    inputs = model.backbone.random_inputs(9).cuda()
    with plain(inputs.device):
        ran = recording(model, inputs, recorder_for(inputs), way)
        for seed in range(4):
            drawn = model.backbone.random_inputs(9, torch.Generator().manual_seed(seed)).cuda()
            inputs.copy_(drawn)
            assert ran()
            same(model, ran.walk, drawn)
        inputs.fill_(torch.nan)
        assert not ran()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a graph cannot be recorded here")
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("name", [*EITHER, "skip in a network"])
def test_a_device_keeps_what_is_fastest_there(name):
    model = routed(name).cuda()
    inputs = model.backbone.random_inputs(9).cuda()
    recording = Recording(model, inputs, recorder_for(inputs))
    assert all(0 < took < 1000 for took in recording.milliseconds.values())
    for point in recording.report()["points"] if recording.way == "whole" else ():
        assert point["by"] == min(point["milliseconds"], key=point["milliseconds"].get, default=point["by"])
    for seed in range(3):
        drawn = model.backbone.random_inputs(9, torch.Generator().manual_seed(seed)).cuda()
        same(model, recording.walk(drawn), drawn)


@pytest.mark.parametrize(("name", "way"), WHOLE)
def test_a_whole_recording_is_the_walk(name, way):
    model, routes = routed(name, seed=4), set()
    inputs = model.backbone.random_inputs(5)
    with plain(ON_CPU):
        whole = recording(model, inputs, TapeRecorder(), way)
        assert {point["by"] for point in whole.report()} == {way}
        for seed in range(2):
            drawn = model.backbone.random_inputs(5, torch.Generator().manual_seed(seed))
            inputs.copy_(drawn)
            assert whole()
            routes |= same(model, whole.walk, drawn)
    assert len(routes) > 1


@pytest.mark.parametrize("name", EITHER)
def test_each_point_runs_by_the_way_that_is_fastest_there(name, monkeypatch):
    """What is tried at a point, and which way wins, changes neither the walk nor what is tried at the next one."""
    model, tried, runs = routed(name), set(), []
    inputs, run = model.backbone.random_inputs(5), model.backbone._run
    expected = model.walk(inputs.clone())

    def noted(state, action):
        runs.append((state.point, selects(), action.clone(), state.walk.macs.clone(), state.features.clone()))
        return run(state, action)

    monkeypatch.setattr(model.backbone, "_run", noted)
    with plain(ON_CPU):
        for seed in range(4):
            runs.clear()
            drawn = torch.Generator().manual_seed(seed)
            whole = recording(model, inputs, TapeRecorder(drawn=drawn), "kernels", "select")
            report, count = whole.report(), len(model.backbone.points)
            for point in report:
                assert point["by"] == min(("kernels", "select"), key=point["milliseconds"].__getitem__)
            taken = [point["by"] == "select" for point in report]
            assert [selected for _, selected, *_ in runs[-count:]] == taken  # in the graph
            tried.add(str(taken))
            first = {point: rest for point, _, *rest in reversed(runs[count:])}  # behind all rows on the full route
            for point, _, *rest in runs[count:]:
                assert torch.equal(rest[0], expected.route[:, point])
                assert all(map(torch.equal, rest, first[point])), "what was tried was not undone"
            assert len(runs) == count * (1 + 2 * 2 + 1 + 2)
            for other in range(2):
                given = model.backbone.random_inputs(5, torch.Generator().manual_seed(other))
                inputs.copy_(given)
                assert whole()
                with monkeypatch.context() as plainly:
                    plainly.setattr(model.backbone, "_run", run)
                    same(model, whole.walk, given)
            inputs.copy_(expected.inputs)
    assert len(tried) > 2


@pytest.mark.parametrize(("family", "seed", "times"), [
    (SkipResNet, 26, (1, 2, 2, 1, 1, 2)), (SlimmableResNet, 1, (2, 1, 1, 2, 2, 1))
])  # fmt: skip
def test_kernels_at_some_points_and_selections_at_others_are_the_walk(family, seed, times, kernel_case, monkeypatch):
    """By the kernels themselves, which overwrite features and leave sums of maps for the next point."""
    from dynrl.ops.kernels import decide

    read = list[str]()
    for kernel in (decide.pool, decide.pool_sums):
        noted = lambda *args, kernel=kernel: read.append(kernel.__name__) or kernel(*args)  # noqa: E731
        monkeypatch.setattr(decide, kernel.__name__, noted)
    torch.manual_seed(seed)
    model = routed(trained(family((1, 3, 3), layers=(3,), widths=(16,))), seed).to(kernel_case)
    inputs = model.backbone.random_inputs(3, torch.Generator().manual_seed(0)).to(kernel_case)
    expected = model.walk(inputs)
    assert all(len(column.unique()) > 1 for column in expected.route.t())
    with plain(inputs.device):
        whole = recording(model, inputs, CallingRecorder(*times), "kernels", "select")
        assert whole()
    first, other = ("kernels", "select") if times[0] == 1 else ("select", "kernels")
    assert [point["by"] for point in whole.report()] == [first, other, first]
    # Each way is tried twice, then one is taken. Only the selection of whole rows leaves no sums for the next point.
    selected = {SkipResNet: "pool", SlimmableResNet: "pool_sums"}[family]
    tries = ["pool_sums"] * 2 + [selected] * 2
    assert read[:11] == ["pool", *tries, "pool_sums", *tries, selected]
    for field in ("route", "macs", "steps", "last"):
        assert torch.equal(getattr(whole.walk, field), getattr(expected, field)), field
    torch.testing.assert_close(whole.walk.outputs, expected.outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", IN_PIECES)
@pytest.mark.parametrize("bias", [-1e6, 1e6])
def test_all_rows_or_none_run(name, bias):
    model = routed(name)
    with torch.no_grad():
        model.policy.head.bias.copy_(torch.tensor([0.0, bias]))
    model.set_price(0.02)  # another price, so that the policy's tables are made anew
    inputs = model.backbone.random_inputs(3)
    with plain(ON_CPU):
        pieces = InPieces(model.backbone, model.chooser, inputs, TapeRecorder())
        assert pieces()
        routes = same(model, pieces.walk, inputs.clone())
    assert len(routes) == 1


@pytest.mark.parametrize("size", [1, 19])
def test_capacities_hold_every_count(size):
    model = routed("skip in a network")
    inputs = model.backbone.random_inputs(size)
    with plain(ON_CPU):
        pieces = InPieces(model.backbone, model.chooser, inputs, TapeRecorder())
        for seed in range(4):
            inputs.copy_(model.backbone.random_inputs(size, torch.Generator().manual_seed(seed)))
            pieces()
            same(model, pieces.walk, inputs.clone())
    for point in pieces.report():
        capacities = list(point["computes"])
        assert capacities == sorted(capacities) and max(capacities, default=0) <= size
        assert len(capacities) <= STEPS + 1, "a piece for each count would never end"


@pytest.mark.parametrize("name", [name for name in IN_PIECES if not EXAMPLES[name].speaks])
@pytest.mark.parametrize("drawn", [False, True])
def test_rows_may_be_more_or_fewer_than_last_time(name, drawn):
    """A block starts for as many rows as ran last time, before the host knows how many do now."""
    backbone, generator = make_backbone(name).eval().for_inference(), torch.Generator().manual_seed(0)
    inputs, size = backbone.random_inputs(9, generator), 9
    route = torch.zeros(size, len(backbone.points), dtype=torch.int64)
    recorder = TapeRecorder(drawn=generator if drawn else None)
    with plain(ON_CPU):
        pieces = InPieces(backbone, lambda state: state.along(route), inputs, recorder)
        for rate in (0.5, 1.0, 0.2, 0.0, 0.0, 0.8, 0.1, 1.0, 0.0, 0.4):
            route.copy_(torch.rand(route.shape, generator=generator) < rate)
            inputs.copy_(backbone.random_inputs(size, generator))
            expected = backbone.run_route(inputs.clone(), route)
            assert pieces()
            assert torch.equal(pieces.walk.route, route)
            torch.testing.assert_close(pieces.walk.outputs, expected.outputs, atol=1e-5, rtol=1e-4)


def test_features_that_stay_where_they_are_are_not_moved():
    model = routed("skip in a transformer")
    pieces = InPieces(model.backbone, model.chooser, model.backbone.random_inputs(4), TapeRecorder())
    features = [pieces.pieces.state(point).features for point in range(len(model.backbone.points))]
    assert all(x is features[0] for x in features), "nothing lies between the blocks"


def test_rows_are_computed_as_few_as_is_faster():
    model, times = routed("skip in a transformer"), []
    inputs = model.backbone.random_inputs(8)

    class Timed(TapeRecorder):
        def milliseconds(self, replay, keep=()):
            super().milliseconds(replay, keep)
            times.append(1)
            return 2.0 if len(times) % 2 else 1.0 if fast else 3.0  # all rows are timed first

    for fast in (True, False):
        times.clear()
        with plain(ON_CPU):
            pieces = InPieces(model.backbone, model.chooser, inputs, Timed())
            pieces.pieces.go_on(0, 3)
        (point,) = (point for point in pieces.report() if point["computes"])
        assert point["computes"] == {3: 3 if fast else 8, 8: 8}


@pytest.mark.parametrize(("times", "way"), [([1.0] + 50 * [2.0], "whole"), ([9.0], "pieces")])
def test_the_fastest_way_is_kept(times, way):
    model = routed("skip in a transformer")
    inputs = model.backbone.random_inputs(4)
    recording = Recording(model, inputs, TapeRecorder(*times))
    assert recording.way == way
    assert [point["point"] for point in recording.report()["points"]] == [point.name for point in model.backbone.points]
    same(model, recording.walk(inputs), inputs)


@pytest.fixture
def recorders(monkeypatch):
    """Machines without CUDA record tapes; these are the recorders."""
    made: list[TapeRecorder] = []

    def recorder(inputs):
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setattr("dynrl.deploy.graphs.records", lambda inputs: isinstance(inputs, torch.Tensor))
    monkeypatch.setattr("dynrl.deploy.graphs.recorder_for", recorder)
    return made


def modules() -> list[RoutedModel]:
    torch.manual_seed(0)
    made = [
        SkipModule(Transformer(), (1, 8, 8), [f"blocks.{i}" for i in range(3)]),
        ExitModule(Convolutional(), (1, 8, 8), ["stage1.0", "stage2"]),
    ]
    return [RoutedModel(backbone.eval(), make_policy(backbone)) for backbone in made]


def test_a_size_is_recorded_when_it_comes_again(recorders):
    for model in modules():
        inputs, routes = torch.randn(6, 1, 8, 8), []
        first = model(inputs)
        assert not recorders
        for _ in range(3):
            torch.testing.assert_close(model(inputs), first, atol=1e-5, rtol=1e-4)
            routes.append(model.last_route)
        assert len(recorders) == 1 and recorders[0].replayed
        before = [route.macs.clone() for route in routes]
        outputs = model(torch.randn(6, 1, 8, 8))
        outputs += 1  # outputs are the caller's own
        assert all(torch.equal(route.macs, macs) for route, macs in zip(routes, before, strict=True))
        torch.testing.assert_close(model(inputs), first, atol=1e-5, rtol=1e-4)
        (report,) = model.graphs.report()
        assert report["inputs"] == (6, 1, 8, 8) and report["way"] in report["milliseconds"]
        recorders.clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_price(0.9), lambda m: m.set_limit(0.8), lambda m: m.policy.head.bias.neg_(),
        lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
        lambda m: m.backbone.load_state_dict({k: v * 1.5 for k, v in m.backbone.state_dict().items()}, assign=True),
        lambda m: m.backbone.load_state_dict({k: v * 1.5 for k, v in m.backbone.state_dict().items()}),
        lambda m: m.double(),
    ],
)  # fmt: skip
def test_a_model_that_has_changed_says_what_it_says_now(recorders, change):
    for model in modules():
        inputs = torch.randn(4, 1, 8, 8)
        for _ in range(2):
            model(inputs)
        change(model)
        inputs = inputs.to(next(model.backbone.parameters()).dtype)
        expected = copy.deepcopy(model).walk(inputs)
        for _ in range(3):
            torch.testing.assert_close(model(inputs), expected.outputs, atol=1e-5, rtol=1e-4)
            assert torch.equal(model.last_route.actions, expected.route)


def test_errors_are_those_of_a_model_that_is_not_recorded(recorders):
    for model in modules():
        inputs = torch.randn(4, 1, 8, 8)
        bad = inputs.clone()
        bad[1, 0, 3, 3] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            model(bad)
        with pytest.raises(ValueError, match="NaN or infinity"):
            model(bad)  # the second time it would be recorded
        expected = model.walk(inputs).outputs
        for _ in range(2):
            torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="NaN or infinity"):
            model(bad)
        torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-4)
        for wrong in (torch.randn(4, 1, 8, 9), torch.randn(0, 1, 8, 8), inputs.double()):
            for _ in range(2):
                with pytest.raises(ValueError, match="expected"):
                    model(wrong)


def test_what_cannot_be_recorded_runs_as_it_is(recorders, monkeypatch):
    def refuse(recorder, run, keep=()):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(TapeRecorder, "record", refuse)
    for model in modules():
        inputs = torch.randn(3, 1, 8, 8)
        expected = model(inputs)
        with pytest.warns(UserWarning, match="run without CUDA graphs: RuntimeError: operation not permitted"):
            torch.testing.assert_close(model(inputs), expected)
        count = len(recorders)
        torch.testing.assert_close(model(inputs), expected)
        assert len(recorders) == count, "it is not tried again"
        assert model.graphs.report() == [
            {"inputs": (3, 1, 8, 8), "why": "RuntimeError: operation not permitted when stream is capturing"}
        ]


def test_few_recordings_are_kept(recorders):
    model = modules()[0]
    for size in range(1, KEPT + 3):
        for _ in range(2):
            model(torch.randn(size, 1, 8, 8))
    assert [report["inputs"][0] for report in model.graphs.report()] == list(range(3, KEPT + 3))
    model.graphs.enabled = False
    count = sum(recorder.replayed for recorder in recorders)
    model(torch.randn(KEPT, 1, 8, 8))
    assert sum(recorder.replayed for recorder in recorders) == count
    model.graphs.clear()
    assert model.graphs.report() == []


def test_a_copy_has_recordings_of_its_own(recorders):
    model = modules()[0]
    inputs = torch.randn(4, 1, 8, 8)
    expected = model(inputs)
    model(inputs)
    twin = copy.deepcopy(model)
    assert model.graphs.report() and not twin.graphs.report()
    with torch.no_grad():
        twin.backbone.module.head.weight.mul_(2)
    for _ in range(3):
        twin(inputs)
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-4)


def test_threads_get_their_own_answers(recorders):
    model = modules()[1]
    inputs = [torch.randn(5, 1, 8, 8) for _ in range(4)]
    expected, wrong = [model.walk(given) for given in inputs], []

    def ask(k: int) -> None:
        for _ in range(5):
            outputs, macs = model(inputs[k]), model.last_route.macs
            if not torch.allclose(outputs, expected[k].outputs, atol=1e-5) or not torch.equal(macs, expected[k].macs):
                wrong.append(k)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(recorders) == 1


def test_other_policies_and_networks_run_as_they_are(recorders):
    backbone = SkipResNet((1, 8, 8), layers=(2, 2), widths=(4, 8)).eval()
    given = RoutedModel(backbone, RandomPolicy(backbone.thrift, 0.5))
    in_place = RoutedModel(make_backbone("skip in place"), make_policy(EXAMPLES["skip in place"]))
    for model in (given, in_place):
        for _ in range(3):
            model(model.backbone.random_inputs(2))
    assert not recorders


def noise(backbone: Backbone) -> Dataset:
    """Random inputs of one class or another."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        classes = backbone(backbone.random_inputs(1)).shape[1]
    split = Split(backbone.random_inputs(40, drawn), torch.randint(0, classes, (40,), generator=drawn))
    return Dataset("noise", classes, split, split, split, Augmentation())


def environments(name: str, recorder: Callable[[], Any] | None, monkeypatch, count: int = 6, **settings: Any):
    """Some environments of a case, which have begun; they record their steps if there is a recorder."""
    monkeypatch.setattr("dynrl.envs.steps.records", lambda inputs: recorder is not None)
    monkeypatch.setattr("dynrl.envs.steps.recorder_for", lambda inputs: recorder())
    torch.manual_seed(0)
    backbone = make_backbone(name)
    envs = vector_env(backbone.decision)(count, backbone=backbone, data=noise(backbone), **settings)
    assert (envs.graphs, envs._recorded) == (True, None)
    envs.reset_tensors(7)
    return envs


def heard_of(envs, steps: int = 20, before: Callable[[], None] = lambda: None) -> list[torch.Tensor | str]:
    """What some steps of random actions return and record, and resets of all rows and of some, wherever these stand."""
    drawn, heard, ends = torch.Generator().manual_seed(1), [envs.reset_tensors(7)], 0
    for _ in range(steps):
        before()
        actions = (torch.rand(envs.num_envs, generator=drawn) < 0.7).long().to(envs.device)
        observed, rewards, ended, info = envs.step_tensors(actions)
        heard += [observed, rewards, ended, *(info[name] for name in sorted(info))]
        heard += [written.clone() for written in envs._walk.records]
        if envs.render_mode is not None:
            heard += envs.render()
        if envs.autoreset_mode is AutoresetMode.DISABLED and ended.any():
            ends += 1
            if ends % 3 == 0:
                heard.append(envs.reset_tensors())
            else:
                ended[ends % 2] = True
                for rows in ended.nonzero().squeeze(1).split(2):
                    heard.append(envs.reset_tensors(rows=rows))
    return heard


def check_heard(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for mine, other in zip(got, wanted, strict=True):
        if isinstance(mine, str):
            assert mine == other
        else:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


STEPPED = ["skip", "exit", "exits in a network", "exits at scales"]
TIMES = {"start": 1.0, "choices": [[0.5, 2.0], [0.25, 3.0]]}


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("name", STEPPED)
def test_recorded_environments_are_the_environments(name, mode, monkeypatch):
    recorded, plainly = (
        environments(name, recorder, monkeypatch, autoreset_mode=mode) for recorder in (TapeRecorder, None)
    )
    assert recorded._recorded is not None and plainly._recorded is None
    check_heard(heard_of(recorded), heard_of(plainly))


@pytest.mark.parametrize(
    "settings",
    [
        {"price": 0.1}, {"group": 3}, {"reward": "gain"}, {"times": TIMES}, {"dtype": "float16"}, {"count": 1},
        {"count": 19}, {"render_mode": "ansi", "price": 0.1}, {"autoreset_mode": "NextStep", "reward": "gain"},
        {"autoreset_mode": "NextStep", "render_mode": "ansi", "group": 2},
    ],
)  # fmt: skip
def test_recorded_environments_whatever_they_are_asked(settings, monkeypatch):
    recorded, plainly = (
        environments("exits in a network", recorder, monkeypatch, **{"autoreset_mode": "SameStep"} | settings)
        for recorder in (TapeRecorder, None)
    )
    check_heard(heard_of(recorded), heard_of(plainly))


@pytest.mark.parametrize("name", ["exit", "exits at scales"])
def test_rows_that_do_not_stand_at_a_point_take_no_part_there(name, monkeypatch):
    """What lies in their places is NaN, and pieces of more rows than there are run, too."""
    fickle = partial(TapeRecorder, drawn=torch.Generator().manual_seed(0))
    recorded, plainly = (
        environments(name, recorder, monkeypatch, count=9, autoreset_mode="SameStep") for recorder in (fickle, None)
    )

    def spoil() -> None:
        standing = {point: state.rows for point, state in recorded._states.items()}
        for point, place in recorded._recorded._pieces._places.items():
            for features in place.features if isinstance(place.features, tuple) else (place.features,):
                if features is not None:
                    away = torch.ones(9, dtype=torch.bool)
                    away[standing.get(point, [])] = False
                    features[away] = torch.nan

    check_heard(heard_of(recorded, before=spoil), heard_of(plainly))
    ways = [place.ways for place in recorded._recorded._pieces._places.values()]
    assert any(ran > held for way in ways for held, (_, ran, _) in way.items()), "no piece has run repeats"


def test_rows_of_a_chain_that_have_parted_may_be_recorded_again(monkeypatch):
    """All run everything, so that nothing has to be recorded anew, which would hide what is left of the rest."""
    heard = []
    for recorder in (TapeRecorder, None):
        envs, said = environments("skip in a network", recorder, monkeypatch, autoreset_mode="Disabled"), []
        for rows in ([0, 2], None):
            for _ in envs.backbone.points:
                said += envs.step_tensors(torch.ones(6, dtype=torch.int64))[:3]
            said.append(envs.reset_tensors(rows=None if rows is None else torch.tensor(rows)))
            if rows is not None:
                said.append(envs.reset_tensors(rows=torch.tensor([1, 3, 4, 5])))
        for _ in envs.backbone.points:
            said += envs.step_tensors(torch.ones(6, dtype=torch.int64))[:3]
        heard.append(said)
    check_heard(*heard)


def test_a_step_waits_once_for_the_device(monkeypatch):
    """For all points together, and for what begins anew; nothing else asks for values."""
    monkeypatch.setattr("dynrl.envs.rewards._is_waited_for", lambda x: True)  # as on a CUDA device
    envs = environments(
        "exits in a network", TapeRecorder, monkeypatch, autoreset_mode="SameStep", price=0.1, reward="correct"
    )
    heard_of(envs)  # all of it is recorded
    reads, read = [], Told.read
    monkeypatch.setattr(Told, "read", lambda told: [reads.append(told), read(told)][1])
    began = 0
    for seed in range(10):
        actions = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(seed))
        with NoHostSync():
            _, _, ended, _ = envs.step_tensors(actions)
        began += int(ended.any() and not ended.all())
        assert len(reads) == seed + 1
    assert began


@pytest.mark.parametrize("name", ["skip", "exit"])
def test_environments_that_cannot_be_recorded_run_as_they_are(name, monkeypatch):
    class Refusing(TapeRecorder):
        def record(self, run, keep=()):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.warns(UserWarning, match="environments run without CUDA graphs: RuntimeError: operation not permitted"):
        refused = environments(name, Refusing, monkeypatch, price=0.1)
    assert refused._recorded is None and not refused.graphs
    check_heard(heard_of(refused, 4), heard_of(environments(name, None, monkeypatch, price=0.1), 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a graph cannot be recorded here")
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_device_replays_the_steps_that_it_would_run(name, mode):
    backbone = make_backbone(name)
    replayed, plainly = (
        vector_env(backbone.decision)(4, backbone=backbone, data=noise(backbone), autoreset_mode=mode, device="cuda")
        for _ in range(2)
    )
    plainly.graphs = False
    check_heard(heard_of(replayed), heard_of(plainly))
    assert replayed._recorded is not None and plainly._recorded is None
