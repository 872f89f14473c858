"""Races knltrain against what else trains these networks on CPUs, all in one run.

    python perf/vs_peers.py                                         everything: hours
    python perf/vs_peers.py --models resnet50 --batches 32 --precisions bf16
    python perf/vs_peers.py --quick                                 does it work at all: seconds

Each contestant is a process of its own that is started once, warmed up, and asleep while the others measure. A round
gives each its turn of a few steps, in an order that moves on by one each round, so that what disturbs the machine
disturbs all of them. A step is forward pass, loss, backward pass and optimizer on one batch of noise.
``bash run/peers.sh`` installs what the contestants need. ``--python`` adds those of another PyTorch, in an environment
as ``bash run/test.sh --torch 2.14.1`` makes it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
from _common import out_folder, output_options
from peers.launcher import clean_environment, launcher_environment
from peers.report import present, title, write
from peers.runner import Runner

from knltrain.errors import ConfigError, KnltrainError
from knltrain.node.topology import Node, read_node
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance


@dataclass(frozen=True)
class Contestant:
    """Who races: a recipe of :mod:`peers.steps`, an optimizer, and in which environment.

    Attributes:
        tuned: torch's fused SGD instead of its plain one, and the environment of Intel's launcher.
        python: the interpreter; empty: this one.
    """

    recipe: str
    optimizer: str
    tuned: bool
    about: str
    python: str = ""


CONTESTANTS = {
    "stock": Contestant("stock", "sgd", False, "PyTorch eager, after torchvision's reference training"),
    "stock+launcher": Contestant("stock", "sgd", True, "the same, Intel's launcher, fused SGD"),
    "nchw": Contestant("nchw", "sgd", False, "PyTorch eager without channels-last, as most people run it"),
    "nchw+launcher": Contestant("nchw", "sgd", True, "the same, Intel's launcher, fused SGD"),
    "bf16-products+launcher": Contestant(
        "bf16-products", "sgd", True, "stock+launcher in float32, products of convolutions and dense layers in bf16"
    ),
    "ipex": Contestant("ipex", "sgd", False, "ipex.optimize"),
    "ipex+launcher": Contestant("ipex", "sgd", True, "ipex.optimize, Intel's launcher"),
    "compile+launcher": Contestant("compile", "sgd", True, "torch.compile, Intel's launcher, fused SGD"),
    "timm": Contestant("timm", "sgd", False, "timm's networks, step and optimizer factory, whose sgd is Nesterov's"),
    "timm+launcher": Contestant("timm", "sgd", True, "the same, Intel's launcher, fused SGD"),
    "timm-lars+launcher": Contestant("timm", "lars", True, "timm's LARS, Intel's launcher"),
    "knltrain": Contestant("knltrain", "sgd", False, "what `knltrain bench` measures, with the peers' SGD"),
    "knltrain-lars": Contestant("knltrain", "lars", False, "the same with LARS"),
}
BATCHES = {"resnet50": (32, 64), "alexnet_bn": (128, 256), "alexnet": (128, 256), "torchvision:vgg16": (16,)}
IMAGE_SIZES = {"alexnet": 227, "alexnet_bn": 227, "alexnet_bn_small": 32}


# What another interpreter's PyTorch is raced in.
_OF_PYTORCH = ("stock", "nchw", "bf16-products", "compile")


def of_other_interpreters(names: Sequence[str], pythons: Sequence[str]) -> dict[str, Contestant]:
    """The contestants, and those of PyTorch alone once more for each interpreter, named by its release.

    Raises:
        ConfigError: an interpreter does not run, or has no torch or no knltrain.
    """
    contestants = {name: CONTESTANTS[name] for name in names}
    for python in pythons:
        code = "import knltrain, torch; print(torch.__version__.partition('+')[0])"
        try:
            asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
        except OSError as error:
            raise ConfigError(f"--python {python}: {error.strerror}") from None
        if asked.returncode:
            said = asked.stderr.strip().splitlines() or [f"ended with {asked.returncode}"]
            raise ConfigError(f"--python {python}: {said[-1]}")
        contestants |= {
            f"{name}, torch {asked.stdout.strip()}": replace(CONTESTANTS[name], python=python)
            for name in names
            if CONTESTANTS[name].recipe in _OF_PYTORCH
        }
    return contestants


def race(  # noqa: C901
    entry: dict[str, Any],
    contestants: Mapping[str, Contestant],
    node: Node,
    console: Console,
    *,
    rounds: int,
    steps: int,
    engine: str,
    deadline: float,
) -> dict[str, Any]:
    """Races all contestants at one model, batch and precision.

    Args:
        entry: ``model``, ``batch``, ``image_size``, ``precision``.
        contestants: by name.
        node: the machine.
        console: where to speak.
        rounds: turns that each contestant gets.
        steps: timed steps in a turn; two more before them are not timed.
        engine: of knltrain.
        deadline: on time.monotonic()'s clock; after it no third or later round is begun.

    Returns:
        ``entry`` with its ``contestants``: for each its images/s by round, or the reason why it did not run.
    """
    results: dict[str, dict[str, Any]] = {name: {"name": name, **asdict(one)} for name, one in contestants.items()}
    order = list(contestants)
    runners: dict[str, Runner] = {}
    try:
        for name in contestants:
            console.line(f"  warming up {name}")
            try:
                runners[name] = _start(contestants[name], entry, engine, node)
            except KnltrainError as error:
                _drop(results[name], error, console)
            else:
                results[name] |= {**runners[name].start, "rounds": [], "other_cores": []}
        for number in range(rounds):
            if not runners:
                break
            if number >= 2 and time.monotonic() > deadline:
                console.warn(f"its share of the budget is spent after {number} of {rounds} rounds")
                break
            shift = number % len(contestants)
            for name in [name for name in (*order[shift:], *order[:shift]) if name in runners]:
                try:
                    turn = runners[name].measure(steps)
                except KnltrainError as error:
                    _drop(results[name], error, console)
                    del runners[name]
                else:
                    results[name]["rounds"].append(entry["batch"] / statistics.median(turn["seconds"]))
                    results[name]["other_cores"].append(turn["other_cores"])
                    results[name] |= {key: turn[key] for key in ("last_loss", "peak_mib")}
            rates = ", ".join(f"{name} {results[name]['rounds'][-1]:.1f}" for name in contestants if name in runners)
            console.line(f"  round {number + 1}: {rates}")
    finally:
        for runner in runners.values():
            runner.close()
    return {**entry, "contestants": list(results.values())}


def _start(contestant: Contestant, entry: dict[str, Any], engine: str, node: Node) -> Runner:
    environ = clean_environment()
    job = {**entry, **asdict(contestant), "engine": engine, "cpus": None}
    if contestant.tuned:
        environ |= launcher_environment(node)
        job["cpus"] = [threads[0] for threads in node.cores]
    return Runner(job, environ, contestant.python or sys.executable)


def _drop(result: dict[str, Any], error: KnltrainError, console: Console) -> None:
    result["reason"] = str(error)
    console.warn(f"{result['name']} does not run: {error}")


def compare(raced: dict[str, Any], memory_mib: float = float("inf")) -> dict[str, Any]:
    """Adds to each contestant median and quartiles of its rounds, its ratios, and what is odd about it.

    Ratios are medians over the rounds of the ratio within a round. The best peer is the one with the highest median of
    all that are not knltrain.

    Args:
        raced: of :func:`race`.
        memory_mib: of the machine. Contestants that do not fit in it side by side slow each other down.
    """
    finished = [one for one in raced["contestants"] if "reason" not in one]
    for one in finished:
        quartiles = statistics.quantiles(one["rounds"], n=4, method="inclusive") if len(one["rounds"]) > 1 else None
        one["images_per_s"] = statistics.median(one["rounds"])
        one["quartile1"], one["quartile3"] = (quartiles[0], quartiles[2]) if quartiles else (one["rounds"][0],) * 2
    peers = [one for one in finished if one["recipe"] != "knltrain"]
    stock = next((one for one in peers if one["name"] == "stock"), None)
    best = max(peers, key=lambda one: one["images_per_s"], default=None)
    together_mib = sum(one["peak_mib"] for one in finished)
    usual_loss = statistics.median([one["first_loss"] for one in finished]) if finished else 0.0
    for one in finished:
        for key, other in (("ratio_to_stock", stock), ("ratio_to_best_peer", best)):
            if other:
                pairs = zip(one["rounds"], other["rounds"], strict=True)
                one[key] = statistics.median([mine / theirs for mine, theirs in pairs])
        one["odd"] = []
        if not one["last_loss"] < one["first_loss"]:
            one["odd"].append(f"its loss went from {one['first_loss']:.3f} to {one['last_loss']:.3f}")
        if abs(one["first_loss"] - usual_loss) > 0.05 * usual_loss:
            one["odd"].append(f"its first loss is {one['first_loss']:.3f}, that of the others {usual_loss:.3f}")
        if statistics.median(one["other_cores"]) > 0.1:
            one["odd"].append(f"{statistics.median(one['other_cores']):.2f} cores worked for others during its turns")
        if together_mib > memory_mib:
            one["odd"].append(f"all contestants together take {together_mib:,.0f} MiB of {memory_mib:,.0f}; race fewer")
    return {**raced, "best_peer": best and best["name"]}


@click.command(context_settings={"max_content_width": 110})
@click.option("--models", help=f"Comma-separated; default {','.join(BATCHES)}.")
@click.option("--batches", help="Comma-separated, for every model; default " + "; ".join(
    f"{model} {','.join(map(str, sizes))}" for model, sizes in BATCHES.items()) + ".")  # fmt: skip
@click.option("--precisions", help="Comma-separated; default bf16, where the processor computes in it, and fp32.")
@click.option("--contestants", help=f"Comma-separated; default {','.join(CONTESTANTS)}.")
@click.option("--python", "pythons", metavar="PATH", multiple=True,
              help="Interpreter of an environment with knltrain and another PyTorch, whose contestants race too; "
                   "may be given again.")  # fmt: skip
@click.option("--engine", default="auto", show_default=True, help="knltrain's engine.")
@click.option("--rounds", type=click.IntRange(1), help="Turns of each contestant; default 5, with --quick 2.")
@click.option("--steps", type=click.IntRange(1), help="Timed steps in a turn; default 3, with --quick 2.")
@click.option("--budget-minutes", type=click.FloatRange(0, min_open=True),
              help="Begin no third or later round when this long is over, and no other network.")  # fmt: skip
@output_options
def main(
    models: str | None,
    batches: str | None,
    precisions: str | None,
    contestants: str | None,
    pythons: tuple[str, ...],
    engine: str,
    rounds: int | None,
    steps: int | None,
    budget_minutes: float | None,
    out: str | None,
    quick: bool,
    as_json: bool,
) -> None:
    """Race knltrain against stock PyTorch, IPEX, torch.compile and timm; --quick: a small network, two contestants."""
    console, node = Console(json=as_json), read_node()
    names = _listed(contestants, list(CONTESTANTS)) or (["stock", "knltrain"] if quick else list(CONTESTANTS))
    racing = of_other_interpreters(names, pythons)
    chosen = _listed(models) or (["alexnet_bn_small"] if quick else list(BATCHES))
    sizes = [int(size) for size in _listed(batches)] or ([16] if quick else [])
    types = _listed(precisions, ["bf16", "fp32"]) or (["bf16", "fp32"] if node.computes_bf16 else ["fp32"])[: 2 - quick]
    rounds, steps = rounds or (2 if quick else 5), steps or (2 if quick else 3)
    entries = [
        {"model": model, "batch": batch, "image_size": IMAGE_SIZES.get(model, 224), "precision": precision}
        for model in chosen
        for precision in types
        for batch in sizes or BATCHES.get(model, (32,))
    ]
    folder = out_folder(out)

    result: dict[str, Any] = {"rounds": rounds, "steps": steps, "races": [], "not_run": [], **provenance(node)}
    end = time.monotonic() + 60 * budget_minutes if budget_minutes else float("inf")
    for number, entry in enumerate(entries):
        now = time.monotonic()
        if now > end:
            result["not_run"].append(entry)
            write(result, folder)
            continue
        console.line(title(entry))
        raced = race(entry, racing, node, console, rounds=rounds, steps=steps, engine=engine,
                     deadline=now + (end - now) / (len(entries) - number))  # fmt: skip
        result["races"].append(compare(raced, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20))
        present(result["races"][-1], console)
        write(result, folder)  # after every race, so that an interrupted run leaves what it has
    if all("reason" in one for raced in result["races"] for one in raced["contestants"]):
        raise KnltrainError("none of the contestants runs; the reasons are above")
    console.line(f"{folder}/vs_peers.md, .json and .png")
    if as_json:
        click.echo(json.dumps(result))


def _listed(value: str | None, known: Sequence[str] = ()) -> list[str]:
    """The items of a comma-separated option; none if it was not given."""
    items = value.split(",") if value else []
    for item in items:
        if known and item not in known:
            raise ConfigError(f"no {item!r}; there are {', '.join(known)}")
    return items


if __name__ == "__main__":
    main()
