"""Whole runs: what a measured rate gives back, what the parts add up to, and what is refused."""

import dataclasses
import math

import msgspec
import pytest
from foreseen import ALEXNET, GOOD, RESNET, job, replaced

from knltrain.config import CommConfig, RunConfig, override
from knltrain.config.schedule import make_schedule
from knltrain.errors import ConfigError
from knltrain.models import build_model
from knltrain.predict.accounting import accounting, accounting_by_phase
from knltrain.predict.layers import layers_of
from knltrain.predict.run import fabric_of, predict, share
from knltrain.predict.systems import Input, Sourced, load, parse
from knltrain.recipes import IMAGENET_IMAGES, RECIPES


@pytest.mark.parametrize("name, model", [("knl7250-opa", "alexnet"), ("knl7250-opa", "resnet50"),
                                         ("xeon8160-opa", "resnet50"), ("xeon8480-200g", "resnet50")])  # fmt: skip
def test_a_node_trains_at_the_rate_it_was_measured_at(name, model):
    system = load(name)
    (rate,) = [rate for rate in system.rate if model in rate.models]
    config = RunConfig(model=model, image_size=rate.image_size, global_batch=rate.batch, precision=rate.precision)
    if rate.cores is None:  # measured with all of them
        system = replaced(system, node={"comm_cores": 0})
    one = predict(job(config, replaced(system, node={"ranks": 1}), nodes=1))
    assert one.images_per_s == pytest.approx(rate.images_per_s, rel=1e-9)
    assert one.efficiency == pytest.approx(1)


def test_cores_for_communication_do_not_compute():
    system = replaced(load("cloud-25g"), node={"comm_cores": 0})
    halved = replaced(system, node={"comm_cores": system.node.cores.value // 2})
    assert predict(job(system=halved, nodes=1)).step.forward_s == pytest.approx(
        2 * predict(job(system=system, nodes=1)).step.forward_s
    )


def test_a_run_is_its_steps_evaluations_and_checkpoints():
    one = predict(job())
    assert one.steps == 3910
    assert one.total_s == pytest.approx(3910 * one.step.seconds + one.evaluation_s + one.checkpoint_s)
    assert one.images_per_s == pytest.approx(32768 / one.step.seconds)
    assert one.node_hours == pytest.approx(512 * one.total_s / 3600)
    node = one.job.system.node
    assert one.usd == pytest.approx(one.node_hours * node.usd_per_hour.value)
    assert one.kwh == pytest.approx(one.node_hours * node.watts.value / 1000)
    # 100 checkpoints of float32 weights and momentum, 99 passes over 50,000 images: 3,910 steps are 100.004 epochs
    assert one.checkpoint_s == pytest.approx(101 * 8 * one.gradient_bytes / 4 / 1e9)
    assert one.evaluation_s == pytest.approx(
        100 * math.ceil(50_000 / 512) * one.step.forward_s / 64 * (1 + one.step.straggler_s / _computing(one))
    )
    assert predict(job(dataclasses.replace(ALEXNET, max_steps=10))).steps == 10
    assert predict(job(images=1000)).steps == round(100 * 1000 / 32768)


def _computing(one):
    return one.step.forward_s + one.step.backward_s


def test_gradients_are_those_of_the_network():
    fp32, bf16 = (
        predict(job(dataclasses.replace(ALEXNET, comm=CommConfig(dtype=dtype)))) for dtype in ("fp32", "bf16")
    )
    assert bf16.gradient_bytes == fp32.gradient_bytes / 2
    assert bf16.step.on_wire_s < fp32.step.on_wire_s


def test_more_is_never_slower():
    base = predict(job()).total_s
    assert predict(job(network_factor=2.0)).total_s < base
    assert predict(job(network_factor=0.5)).total_s > base
    assert predict(job(overlap=False)).total_s > base
    assert predict(job(nodes=256)).total_s > base
    assert predict(job(system=replaced(load("knl7250-opa"), noise={"spread": 0.0}))).total_s < base
    assert predict(job(system=replaced(load("knl7250-opa"), network={"sum_gb_per_s": 5.0}))).total_s < base


def test_a_network_twice_as_fast_sends_twice_the_bytes_and_messages():
    fabric, faster = (fabric_of(job(network_factor=factor)) for factor in (1.0, 2.0))
    assert faster == fabric._replace(latency_s=fabric.latency_s / 2, link_bytes_per_s=2 * fabric.link_bytes_per_s)


def test_four_thousand_nodes():
    one = predict(job(nodes=4096))
    assert 0 < one.efficiency < predict(job(nodes=64)).efficiency <= 1


def test_reading_takes_from_computing():
    system = msgspec.structs.replace(load("knl7250-opa"), input=Input(images_per_core_s=Sourced(100.0, "test")))
    assert predict(job(system=system)).step.input_s == pytest.approx(64 / (100 * 68))


def test_a_profile_takes_the_place_of_the_ceilings():
    profile = {
        "model": "alexnet_bn", "image_size": 227, "batch": 64, "precision": "fp32",
        "step_s": {"median": 1.0}, "profiled_step_s": 1.0, "optimizer_s": 0.1,
        "other_s": 0.1, "layers": [{"layer": "fc", "kind": "linear", "forward_s": 0.3, "backward_s": 0.5,
                                    "gradient_bytes": 4_000_000}],
    }  # fmt: skip
    system = replaced(load("knl7250-opa"), node={"comm_cores": 0})
    one = predict(job(system=system, profile=profile))
    assert (one.step.forward_s, one.step.backward_s, one.step.optimizer_s) == pytest.approx((0.4, 0.5, 0.1))
    assert one.gradient_bytes == 4_000_000
    on_half_the_cores = predict(job(system=system, profile={**profile, "threads": 34}))
    assert on_half_the_cores.step.backward_s == pytest.approx(0.25)
    four_ranks = predict(job(system=replaced(system, node={"ranks": 4}), profile={**profile, "threads": 17}))
    assert four_ranks.step.backward_s == pytest.approx(0.5 / 4), "a quarter of the images on a quarter of the cores"
    config = dataclasses.replace(ALEXNET, model="torchvision:vgg16")
    other = {**profile, "model": "torchvision:vgg16"}
    assert predict(job(config, system=system, profile=other)).step.forward_s == pytest.approx(0.4)
    for change, words in (({}, "model of the profile is alexnet_bn, not torchvision:vgg16"),
                          ({"image_size": 224}, "image-size of the profile is 227, not 224"),
                          ({"precision": "bf16"}, "precision of the profile is fp32, not bf16")):  # fmt: skip
        wrong = dataclasses.replace(ALEXNET, **change) if change else config
        with pytest.raises(ConfigError, match=words):
            predict(job(wrong, system=system, profile=profile))
    with pytest.raises(ConfigError, match="--layers FILE"):
        predict(job(config))


def test_a_step_of_very_many_micro_batches_is_predicted_at_once():
    assert predict(job(dataclasses.replace(ALEXNET, global_batch=2**60), nodes=1)).accumulate == 2**51


def other_rate(**fields):
    system = load("knl7250-opa")
    return msgspec.structs.replace(system, rate=(msgspec.structs.replace(system.rate[0], **fields),))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nodes": 0}, "0 nodes: give 1 or more"),
        ({"nodes": -5}, "-5 nodes"),
        ({"network_factor": -2.0}, "network-factor -2"),
        ({"network_factor": math.nan}, "network-factor nan"),
        ({"network_factor": 1e-320}, "network-factor"),
        ({"config": dataclasses.replace(ALEXNET, epochs=1e300)}, "epochs 1e\\+300 of 1,281,167 images"),
        ({"system": replaced(load("knl7250-opa"), network={"link_gb_per_s": 1e-320})}, "a step never ends"),
        (
            {"system": replaced(load("knl7250-opa"), node={"memory_gb_per_s": 0.1})},
            "leave no time beside the optimizer",
        ),
        ({"system": other_rate(models=("vgg",))}, "a rate of it: model 'vgg'"),
        ({"nodes": 32769}, "smaller than the 32769 ranks of 32769 nodes; take 32769 or more"),
        ({"nodes": 1600}, "not a multiple of 1600 ranks; take 32000 or 33600"),
        ({"config": dataclasses.replace(ALEXNET, local_batch=48)}, "local-batch 48 does not divide the 64 images"),
        ({"config": dataclasses.replace(ALEXNET, precision="bf16")}, "knl7250-opa does not compute in it"),
        ({"algorithm": "magic"}, "there are oneccl"),
    ],
)
def test_nonsense_is_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        predict(dataclasses.replace(job(), **changes))
    assert "\n" not in str(caught.value)


def test_the_batch_is_divided_as_the_trainer_does():
    from knltrain.training.batching import rank_batch_of

    for config in (ALEXNET, RESNET):
        for nodes in (1, 4, 512, 2048):
            theirs = rank_batch_of(config, 0, nodes)
            assert share(job(config, nodes=nodes)) == (theirs.local_batch, theirs.accumulate)


@pytest.mark.parametrize("recipe, epochs", [("cifar-2k", 15), ("cifar-resnet20-2k", 30)])
def test_small_images_are_cifars(recipe, epochs):
    config = RECIPES[recipe].config()
    system = parse(GOOD, "two.toml")
    assert predict(job(config, system, nodes=1)).steps == round(epochs * 50_000 / 2048)


@pytest.mark.parametrize("recipe", ["cifar-2k", "cifar-resnet20-2k", "cifar-2k-resizing"])
def test_networks_for_small_images_have_cifars_classes(recipe):
    """Their last layer is much of what the ranks exchange."""
    config = RECIPES[recipe].config()
    model = build_model(config.model, num_classes=10, image_size=config.image_size)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert predict(job(config, parse(GOOD, "two.toml"), nodes=2)).gradient_bytes == 4 * elements
    rows = accounting(config.model, image_size=config.image_size, epochs=1, nodes=2, batches=[512], images=512)
    assert rows[0]["terabytes"] == pytest.approx(4 * elements / 1e12)
    layers = layers_of(config.model, image_size=config.image_size, num_classes=10)
    flops = sum(layer.forward_flops + layer.backward_flops for layer in layers)
    last = accounting_by_phase(config, nodes=2, images=50_000)[-1]
    assert last["flops"] == last["images"] * flops


def test_accounting_is_the_published_table():
    """Iterations of 100 epochs of AlexNet and 90 of ResNet-50, for every batch from 512 to 32K."""
    rows = accounting("alexnet", image_size=227, epochs=100, nodes=512)
    assert [row["iterations"] for row in rows][:7] == [250228, 125114, 62557, 31278, 15639, 7820, 3910]
    resnet = accounting("resnet50", image_size=224, epochs=90, nodes=512)
    assert [row["iterations"] for row in resnet][:7] == [225205, 112603, 56301, 28151, 14075, 7038, 3519]
    assert rows[1]["images_per_node"] == 2
    last = rows[6]
    assert last["messages"] == 3910 * 18
    assert last["terabytes"] == pytest.approx(3910 * 2 * 511 / 512 * 4 * 60_965_224 / 1e12)
    assert last["flops_per_byte"] == pytest.approx(64 * rows[0]["flops_per_byte"])
    alone = accounting("alexnet", image_size=227, epochs=1, nodes=1, batches=[512])[0]
    assert (alone["messages"], alone["terabytes"], alone["flops_per_byte"]) == (0, 0, None)
    with pytest.raises(ConfigError, match="0 nodes"):
        accounting("alexnet", image_size=227, epochs=1, nodes=0)


CHANGING = {
    "schedule.image_sizes": [128],
    "schedule.image_size_epochs": [30],
    "schedule.batches": [8192],
    "schedule.batch_epochs": [10],
}


def test_a_run_that_changes_takes_as_long_as_its_phases():
    plain = dataclasses.replace(RESNET, local_batch=8)
    changing = override(plain, CHANGING)
    whole = predict(job(changing, nodes=512))
    plan = make_schedule(changing, IMAGENET_IMAGES)
    assert [(phase.batch, phase.image_size) for phase in plan.phases] == [(8192, 128), (32768, 128), (32768, 224)]
    seconds = 0.0
    for phase in plan.phases:
        alike = override(plain, {"global_batch": phase.batch, "image_size": phase.image_size, "augment.resize": 256})
        seconds += (phase.last_step - phase.first_step) * predict(job(alike, nodes=512)).step.seconds
    assert whole.training_s == pytest.approx(seconds)
    assert whole.steps == plan.total_steps
    last = predict(job(plain, nodes=512))
    assert whole.step.seconds == last.step.seconds
    assert whole.images_per_s == last.images_per_s
    assert whole.total_s < last.total_s
    early = predict(job(override(changing, {"max_steps": plan.phases[0].last_step}), nodes=512))
    assert early.total_s < 0.3 * whole.total_s


def test_phases_are_counted_exactly():
    config = override(RESNET, CHANGING)
    rows, plan = accounting_by_phase(config, nodes=512), make_schedule(config, IMAGENET_IMAGES)
    assert [row["iterations"] for row in rows] == [phase.last_step - phase.first_step for phase in plan.phases]
    assert sum(row["images"] for row in rows) == plan.images(plan.total_steps)
    one = {size: sum(layer.forward_flops + layer.backward_flops for layer in layers_of("resnet50", image_size=size))
           for size in (128, 224)}  # fmt: skip
    assert [row["flops"] for row in rows] == [row["images"] * one[row["image_size"]] for row in rows]
    assert [row["messages"] for row in rows] == [18 * row["iterations"] for row in rows]


@pytest.mark.parametrize("fields", [{"ema_decay": 0.99}, {"optim.name": "lamb", "optim.eps": 1e-6}])
def test_what_an_update_moves_besides_takes_its_time(fields):
    plain, more = (predict(job(override(RESNET, changes), nodes=512)) for changes in ({}, fields))
    assert more.step.optimizer_s > 1.3 * plain.step.optimizer_s
    assert more.checkpoint_s == pytest.approx(1.5 * plain.checkpoint_s)


def test_a_batch_of_the_schedule_that_does_not_divide_is_one_line():
    with pytest.raises(ConfigError, match=r"schedule\.batches 1000 is not a multiple of 512 ranks"):
        predict(job(override(RESNET, {"schedule.batches": [1000], "schedule.batch_epochs": [1]}), nodes=512))
