"""What the measuring scripts share: their options, the training step they run, and where their results go."""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from knltrain.config import EngineName, Precision, RunConfig, override
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console

if TYPE_CHECKING:
    from knltrain.bench.step import StepTime, TrainingStep
    from knltrain.comm.gradients import GradientClock
    from knltrain.comm.group import Group
    from knltrain.training.engine import Engine

WARMUP_STEPS = 3
_SHUTDOWN_TIMEOUT_S = 10.0
# What the networks are published with, as `knltrain bench` has it.
_IMAGE_SIZE = {"alexnet": 227, "alexnet_bn": 227, "alexnet_bn_small": 32, "resnet20": 32}

Command = Callable[..., None]


def output_options(command: Command) -> Command:
    """The options that every script has: ``--out``, ``--json`` and ``--quick``; errors become one line."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KnltrainError as error:
            click.echo(f"{Path(sys.argv[0]).name}: {error}", err=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)

    wrapped = click.option(
        "--quick", is_flag=True, help="A small setting that takes seconds: shows that the script works, not how fast."
    )(wrapped)
    wrapped = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, people's text on stderr."
    )(wrapped)
    return click.option("--out", metavar="DIR", help="Folder for JSON and PNG; default SCRIPT-DATE-TIME here.")(wrapped)


def step_options(command: Command) -> Command:
    """The options that say which training step is run, as `knltrain bench` names them."""
    for option in (
        click.option("--steps", type=click.IntRange(min=1), help="Steps measured; default 5, with --quick 2."),
        click.option("--engine", type=click.Choice(get_args(EngineName)), default="auto", show_default=True),
        click.option("--precision", type=click.Choice(get_args(Precision)), default="auto", show_default=True),
        click.option("--image-size", type=click.IntRange(min=8), help="Pixels; default as knltrain bench."),
        click.option("--batch", type=click.IntRange(min=1), help="Images a step and rank; default 32, with --quick 8."),
        click.option("--model", help="Network; default resnet50, with --quick alexnet_bn_small."),
    ):
        command = option(command)
    return command


def step_config(
    *,
    model: str | None,
    batch: int | None,
    image_size: int | None,
    precision: str,
    engine: str,
    quick: bool,
    data: str | None = None,
) -> RunConfig:
    """The configuration of the step that the options ask for; ``--quick`` changes defaults only.

    Raises:
        ConfigError: a value that is not possible.
    """
    model = model or ("alexnet_bn_small" if quick else "resnet50")
    fields = {
        "model": model,
        "global_batch": batch or (8 if quick else 32),
        "image_size": image_size or _IMAGE_SIZE.get(model, 224),
        "precision": precision,
        "engine": engine,
        "data": data or "",
    }
    return override(RunConfig(), fields)


@dataclass
class RankStep:
    """The training step of `knltrain bench`, on one rank or on several, each with a batch of its own.

    Attributes:
        bench: the step.
        group: all ranks.
        clock: time of gradients on the wire.
    """

    bench: TrainingStep
    group: Group
    clock: GradientClock

    @property
    def engine(self) -> Engine:
        """Model and optimizer."""
        return self.bench.engine

    def __call__(self) -> StepTime:
        """Runs the step, as a region for a profiler, and returns its time."""
        from torch.profiler import record_function

        with record_function("step"):
            return self.bench()

    def close(self) -> None:
        """Stops the decoders and leaves the group, once the model no longer holds it."""
        self.bench.close()
        self.engine.model = getattr(self.engine.model, "module", self.engine.model)
        self.group.close()

    def describe(self) -> dict[str, Any]:
        """What was measured and where, for the JSON file."""
        from knltrain.runlog.provenance import provenance

        return {**self.bench.settings, "world_size": self.group.world_size, **provenance(self.bench.node)}

    def __str__(self) -> str:
        ranks, node = self.group.world_size, self.bench.node
        return f"{self.bench}{f', {ranks} ranks' if ranks > 1 else ''}; {node.cpu_model}, {node.isa}"


def build_step(config: RunConfig) -> RankStep:
    """Builds model, engine and input, and takes part in the group if a launcher started several ranks.

    Raises:
        ConfigError: the engine, precision or model cannot run here.
        KnltrainError: the rendezvous failed, or the data cannot be used.
    """
    from knltrain.bench.step import TrainingStep
    from knltrain.comm.gradients import data_parallel
    from knltrain.comm.group import Group
    from knltrain.launch.world import discover
    from knltrain.node.affinity import threads_per_rank
    from knltrain.node.topology import read_node

    ranks = discover()
    step = TrainingStep(config, threads_per_rank(read_node(), ranks.local_size))
    group = Group(ranks)
    engine = step.engine
    engine.model, clock = data_parallel(engine.model, config.comm, group, engine.optimizer.accumulated)
    return RankStep(step, group, clock)


def take_turns(
    serve: Callable[..., None],
    contestants: Mapping[str, tuple[Any, ...]],
    console: Console,
    *,
    rounds: int,
    count: int,
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Measures in processes of their own, one after the other, all of them in every round.

    Args:
        serve: what runs in a contestant's process, with one end of a pipe and its arguments: it sends None when it is
            ready, or why it does not run; then it answers each ``count`` that it receives.
        contestants: arguments by name.
        console: told who does not run.
        rounds: turns of each.
        count: sent at each turn.

    Returns:
        By name: the answers, and the reasons of those that do not run.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    reasons: dict[str, str] = {}
    try:
        for name, arguments in contestants.items():
            pipe, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs, *arguments))  # no daemon: it may have workers
            process.start()
            processes.append(process)
            theirs.close()
            try:
                reason = pipe.recv()
            except EOFError:
                process.join()
                reason = f"its process exited with {process.exitcode}"
            if reason is None:
                pipes[name] = pipe
            else:
                reasons[name] = reason
                console.warn(f"{name} does not run: {reason}")
        answers: dict[str, list[Any]] = {name: [] for name in pipes}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(count)
                answers[name].append(pipe.recv())
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(_SHUTDOWN_TIMEOUT_S)
            process.terminate()
    return answers, reasons


def out_folder(out: str | None) -> Path:
    """The folder for results, made: DIR as given, or one named after the script and the time."""
    folder = Path(out or f"{Path(sys.argv[0]).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from None
    return folder


def show(console: Console, *tables: Table) -> None:
    """Prints tables, in their full width where nobody's terminal bounds it."""
    if not console.rich.is_terminal:
        console.rich.width = 140
    for table in tables:
        console.rich.print(table, soft_wrap=False)


def finish(result: Mapping[str, Any], figure: Figure, folder: Path, console: Console, *, as_json: bool) -> None:
    """Writes SCRIPT.json and SCRIPT.png to the folder, says so, and prints the JSON where it was asked for."""
    path = folder / Path(sys.argv[0]).stem
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    console.line(f"{path}.json, {path.name}.png")
    if as_json:
        click.echo(json.dumps(result))
