"""What computes each convolution: what there is to choose, how it is chosen, and that a run keeps to it."""

import dataclasses
import json
import math

import pytest
import torch
from runs import assert_same_run
from small_networks import small_run

from knltrain import checkpoint
from knltrain.config import RunConfig, override
from knltrain.errors import ConfigError
from knltrain.models import convolutions, model_of
from knltrain.models.convolutions import RESULTS, Convolution, Times, choose, eligible, measure
from knltrain.models.fused import FusedConv2d
from knltrain.node.topology import read_node
from knltrain.node.tuning_cache import convolutions_file
from knltrain.ops import native
from knltrain.ops.convgrad import NONE, Geometry, Native
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console
from knltrain.training import trainer
from knltrain.training.engine import build_engine

CONFIG = RunConfig(model="alexnet_bn_small", image_size=32)


@pytest.fixture(autouse=True)
def needs_kernels(tmp_path, monkeypatch):
    if native.load_error():
        pytest.skip(native.load_error())
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch):
    """The clock says that the kernels are faster forward and slower for weights; gives what it was asked of."""
    asked = []

    def clock(convolution, images, dtype):
        asked.append((convolution, images))
        seconds = {"forward": (2.0, 1.0), "input": (1.0, 1.0), "weight": (1.0, 2.0)}
        native = convolution.native(dtype)._asdict()
        return {result: Times(*both, images) for result, both in seconds.items() if native[result]}

    monkeypatch.setattr(convolutions, "measure", clock)
    return asked


WITHOUT_AMX = dataclasses.replace(read_node(), flags=read_node().flags - {"amx_bf16"})


def chosen(config=CONFIG, *, engine="fused", precision="fp32", node=WITHOUT_AMX, images=8, keep=True):
    here = {"node": node, "threads": 1, "images": images, "keep": keep}
    return choose(config, num_classes=10, engine=engine, precision=precision, **here)


def test_what_there_is_to_choose():
    """By Winograd's algorithm, of ResNet-50, those of 3 x 3 that do not stride; of AlexNet, all but the first."""
    found = eligible(RunConfig(model="resnet50"), 10)
    assert len(found) == 53
    winograd = {path for path, one in found.items() if one.has_winograd()}
    assert len(winograd) == 13
    assert found["layer1.0.conv2"] == Convolution(64, 56, 56, (64, 64, 3, 3), Geometry((1, 1), (1, 1)))
    assert found["layer4.2.conv2"] == Convolution(512, 7, 7, (512, 512, 3, 3), Geometry((1, 1), (1, 1)))
    assert found["layer2.0.conv2"] == Convolution(128, 56, 56, (128, 128, 3, 3), Geometry((2, 2), (1, 1)))
    assert "layer2.0.conv2" not in winograd
    everything, weights = Native(True, True, True), Native(False, False, True)
    assert {path for path, one in found.items() if one.native() == weights} == {
        "conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"
    }  # fmt: skip
    assert {one.native() for one in found.values()} == {everything, weights}
    found = eligible(RunConfig(model="alexnet_bn", image_size=227), 10)
    winograd = [path.rpartition(".")[2] for path, one in found.items() if one.has_winograd()]
    assert winograd == ["conv2", "conv3", "conv4", "conv5"]
    assert found["features.conv2"] == Convolution(96, 27, 27, (256, 48, 5, 5), Geometry((1, 1), (2, 2), groups=2))
    assert found["features.conv1"].native() == weights


def test_finding_them_draws_no_numbers():
    before = torch.get_rng_state()
    eligible(CONFIG, 10)
    measure(Convolution(16, 8, 8, (16, 16, 3, 3), Geometry(padding=(1, 1))), images=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_arithmetic_is_counted():
    one = Convolution(64, 56, 56, (128, 32, 3, 3), Geometry(padding=(1, 1), groups=2))
    assert one.gflop(10) == pytest.approx(2e-9 * 10 * 56 * 56 * 128 * 32 * 9)
    one = Convolution(16, 9, 7, (16, 16, 5, 5), Geometry(padding=(0, 2)))
    assert one.gflop(1) == pytest.approx(2e-9 * 5 * 7 * 16 * 16 * 25)
    one = Convolution(16, 9, 8, (16, 16, 3, 1), Geometry((2, 3), (0, 0), (2, 1)))
    assert one.gflop(1) == pytest.approx(2e-9 * 3 * 3 * 16 * 16 * 3)


@pytest.mark.parametrize(
    "convolution, results",
    [
        (Convolution(32, 8, 8, (32, 16, 5, 5), Geometry(padding=(2, 2), groups=2)), RESULTS),
        (Convolution(32, 8, 8, (48, 32, 1, 1), Geometry((2, 2))), RESULTS),
        (Convolution(3, 9, 9, (16, 3, 3, 3), Geometry((2, 2))), ("weight",)),
    ],
    ids=str,
)
def test_each_result_is_timed_both_ways(convolution, results):
    times = measure(convolution, images=4)
    assert tuple(times) == results
    for one in times.values():
        assert 0 < one.direct < 10
        assert 0 < one.native < 10


def test_a_large_convolution_is_measured_on_fewer_images(monkeypatch):
    taken = []
    original = convolutions.convgrad.forward
    monkeypatch.setattr(
        convolutions.convgrad, "forward", lambda x, *rest: taken.append(x.shape[0]) or original(x, *rest)
    )
    large = Convolution(64, 56, 56, (64, 64, 3, 3), Geometry(padding=(1, 1)))
    measure(large, images=1000)
    assert set(taken) == {math.ceil(1 / large.gflop(1))}


def test_auto_takes_what_is_faster_and_measures_once(measured):
    paths = eligible(CONFIG, 10)
    forward = {path: ["forward"] for path, one in paths.items() if one.native().forward}
    assert chosen() == forward
    assert {convolution for convolution, _ in measured} == set(paths.values())
    assert len(measured) == len(set(paths.values()))
    assert {images for _, images in measured} == {8}
    measured.clear()
    assert chosen() == forward
    assert not measured
    assert chosen(images=9)
    assert measured


def test_ranks_beside_the_first_of_a_node_store_nothing(measured):
    assert chosen(keep=False)
    assert not convolutions_file().exists()


@pytest.mark.parametrize("found", ["[", "{}", '[{"settings": {}}]', '[{"settings": {}, "native": 5}]'])
def test_a_file_that_something_else_wrote_is_measured_anew(measured, found):
    convolutions_file().parent.mkdir(parents=True)
    convolutions_file().write_text(found)
    with pytest.warns(UserWarning, match=r"convolutions.json: .*ignored"):
        assert chosen()
    assert measured
    assert json.loads(convolutions_file().read_text())[-1]["native"]


def test_what_a_later_version_knows_is_measured_anew(measured):
    chosen()
    (entry,) = json.loads(convolutions_file().read_text())
    entry["native"] = {key: ["forward", "bias"] for key in entry["native"]}
    convolutions_file().write_text(json.dumps([entry]))
    measured.clear()
    assert all(results == ["forward"] for results in chosen().values())
    assert measured


def test_a_cache_that_cannot_be_written_is_done_without(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Not a directory") as said:
        assert chosen()
    assert "again at each start" in str(said[-1].message)


def test_a_folder_in_the_files_place_is_done_without_and_leaves_nothing(measured):
    convolutions_file().mkdir(parents=True)
    with pytest.warns(UserWarning, match="Is a directory"):
        assert chosen()
    assert list(convolutions_file().parent.iterdir()) == [convolutions_file()]


def test_asked_for_it_is_all_or_nothing(measured):
    assert chosen(override(CONFIG, {"conv": "direct"})) == {}
    assert chosen(override(CONFIG, {"conv": "winograd"})) == {
        path: list(RESULTS) for path, one in eligible(CONFIG, 10).items() if one.has_winograd()
    }
    assert not measured


def test_by_another_engine_there_is_no_choice(measured):
    assert chosen(engine="eager") == {}
    with pytest.raises(ConfigError, match=r"conv winograd.*--engine fused"):
        chosen(override(CONFIG, {"conv": "winograd"}), engine="eager")


def test_in_bf16_winograds_are_measured_unless_there_is_amx(measured):
    winograds = {path for path, one in eligible(CONFIG, 10).items() if one.has_winograd()}
    assert chosen(precision="bf16") == {path: ["forward"] for path in winograds}
    assert len(measured) == len({eligible(CONFIG, 10)[path] for path in winograds})
    measured.clear()
    chosen()
    assert measured  # float32's times are others
    with_amx = dataclasses.replace(WITHOUT_AMX, flags=WITHOUT_AMX.flags | {"amx_bf16"})
    assert chosen(precision="bf16", node=with_amx) == {}


def test_a_network_without_any_is_refused_where_they_are_asked_for():
    config = RunConfig(model="torchvision:squeezenet1_0", conv="winograd")
    pytest.importorskip("torchvision")
    if not any(one.has_winograd() for one in eligible(config, 10).values()):
        with pytest.raises(ConfigError, match="has no convolution"):
            chosen(config)


def test_the_engine_does_as_was_chosen():
    config = override(CONFIG, {"conv": "winograd"})
    model = model_of(config, 10)
    paths = eligible(config, 10)
    first = next(iter(paths))
    engine = build_engine("fused", "fp32", model, build_optimizer(model, config.optim), {first: ["input", "weight"]})
    assert engine.model.get_submodule(first).by == Native(forward=False, input=True, weight=True)
    others = [m.by for path, m in engine.model.named_modules() if isinstance(m, FusedConv2d) and path != first]
    assert others
    assert set(others) == {NONE}


def run(config, **changes):
    allow = frozenset(changes.pop("allow", ()))
    return trainer.train(override(config, changes), Console(silent=True), allow_change=allow)


@pytest.fixture
def config(image_folder, tmp_path):
    return dataclasses.replace(small_run(image_folder, tmp_path / "run"), engine="fused", precision="fp32")


def test_a_run_that_resumes_keeps_to_its_choice(config, tmp_path, monkeypatch, measured):
    whole = override(config, {"out": str(tmp_path / "whole")})
    run(whole)
    plan = json.loads((tmp_path / "whole" / "config.json").read_text())["plan"]
    assert plan["convolutions"]
    assert all(results == ["forward"] for results in plan["convolutions"].values())
    run(config, max_steps=4)
    convolutions_file().unlink()
    monkeypatch.setattr(convolutions, "measure", lambda *_: pytest.fail("measured again"))
    run(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["plan"]["convolutions"] == plan["convolutions"]
    assert_same_run(tmp_path / "run", tmp_path / "whole", evaluations=False)


def test_a_run_from_before_there_was_a_choice_goes_on_without(config, tmp_path, monkeypatch, measured):
    run(config, max_steps=4, conv="direct")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["config"]["conv"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))

    def older(folder):
        state = read(folder)
        state["config"].pop("conv", None)
        assert "convolutions" not in state["made"]
        return state

    read = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", older)
    run(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["plan"]["convolutions"] == {}
    assert not measured


def test_a_change_that_was_killed_before_its_checkpoint_is_not_forgotten(config, tmp_path, measured):
    """OUT/config.json has it by then, and the checkpoint has not."""
    run(config, max_steps=4, conv="winograd")
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    record["config"]["conv"] = "direct"
    path.write_text(json.dumps(record))
    run(config, max_steps=5, conv="direct")
    assert json.loads(path.read_text())["plan"]["convolutions"] == {}
    record = json.loads(path.read_text())
    record["config"]["conv"] = "auto"
    path.write_text(json.dumps(record))
    run(config, conv="auto")
    assert set(map(tuple, json.loads(path.read_text())["plan"]["convolutions"].values())) == {("forward",)}


def test_another_engine_does_not_claim_them(config, tmp_path):
    run(config, max_steps=4, conv="winograd")
    with pytest.raises(ConfigError, match="add --engine fused"):
        run(config, max_steps=5, conv="winograd", engine="eager")


def test_another_algorithm_is_another_run_unless_that_is_allowed(config, tmp_path, measured):
    run(config, max_steps=4, conv="direct")
    with pytest.raises(ConfigError, match="conv: direct -> winograd"):
        run(config, conv="winograd")
    run(config, conv="winograd", allow=["conv"])
    plan = json.loads((tmp_path / "run" / "config.json").read_text())["plan"]
    assert set(map(tuple, plan["convolutions"].values())) == {RESULTS}
