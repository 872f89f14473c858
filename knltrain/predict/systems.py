"""Descriptions of machines: TOML files in which every number stands beside its source."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from knltrain.config.schema import Count, CountFromZero, NotNegative, Positive
from knltrain.errors import ConfigError

T = TypeVar("T")
Text = Annotated[str, Meta(min_length=1)]


class Sourced(msgspec.Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    """A number and where it comes from."""

    value: T
    source: Text


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node.

    Attributes:
        cores: physical cores.
        ranks: ranks that the trainer starts on it.
        comm_cores: cores of the node that are kept for communication.
        fp32_gflop_per_s: ceiling of float32 arithmetic, all cores.
        bf16_gflop_per_s: ceiling of bf16 arithmetic; left out where the processor has none.
        memory_gb_per_s: of the memory that activations are in, read and written.
        efficiency: the part of these ceilings that a training step reaches, where no rate says it.
        watts: under load.
        usd_per_hour: price of a node-hour.
    """

    cores: Sourced[Count]
    ranks: Sourced[Count]
    comm_cores: Sourced[CountFromZero]
    fp32_gflop_per_s: Sourced[Positive]
    memory_gb_per_s: Sourced[Positive]
    bf16_gflop_per_s: Sourced[Positive] | None = None
    efficiency: Sourced[Positive] | None = None
    watts: Sourced[Positive] | None = None
    usd_per_hour: Sourced[Positive] | None = None


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network between ranks.

    Attributes:
        link_gb_per_s: of a node's link, each way.
        latency_us: of a message between nodes, software included.
        shared_gb_per_s: of a copy between two ranks of a node, for each rank.
        shared_latency_us: of a message between two ranks of a node.
        sum_gb_per_s: received bytes that a rank adds up in a second.
        call_us: what a call costs beside its messages.
        thread_gb_per_s: where no core is kept for communication, bytes that a communicating thread handles in a second
            of the computing threads' time.
        algorithm: of the all-reduce.
    """

    link_gb_per_s: Sourced[Positive]
    latency_us: Sourced[NotNegative]
    shared_gb_per_s: Sourced[Positive]
    shared_latency_us: Sourced[NotNegative]
    sum_gb_per_s: Sourced[Positive]
    call_us: Sourced[NotNegative]
    thread_gb_per_s: Sourced[Positive] | None = None
    algorithm: Literal["oneccl", "mpi", "ring", "direct", "halving-doubling", "recursive-doubling", "two-level"] = (
        "oneccl"
    )


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cost of reading images.

    Attributes:
        images_per_core_s: images that a core reads, decodes and augments in a second.
    """

    images_per_core_s: Sourced[Positive]


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much ranks differ.

    Attributes:
        spread: standard deviation of the time that a rank computes in a step, over its mean.
    """

    spread: Sourced[Annotated[float, Meta(ge=0, le=1)]]


class Storage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where checkpoints go.

    Attributes:
        write_gb_per_s: of one writer.
    """

    write_gb_per_s: Sourced[Positive]


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured training rate of a node.

    Attributes:
        models: networks it holds for, the measured one first.
        precision: bf16 or fp32.
        images_per_s: of the whole node, whole steps.
        batch: images a step, of the whole node.
        image_size: pixels.
        source: where it is from.
        cores: cores that computed, where not all did.
    """

    models: Annotated[tuple[Text, ...], Meta(min_length=1)]
    precision: Literal["bf16", "fp32"]
    images_per_s: Positive
    batch: Count
    image_size: Count
    source: Text
    cores: Count | None = None


class System(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine.

    Attributes:
        name: of the file.
        about: a line for people.
        fitted: what in it was fitted, and on which published run; empty where nothing was.
        node: one node of it.
        network: what is between its nodes.
        noise: how much its ranks differ.
        storage: where checkpoints go.
        input: what reading costs; None: nothing.
        rate: what a node was measured to train at.
    """

    name: Text
    about: Text
    node: Node
    network: Network
    noise: Noise
    storage: Storage
    fitted: str = ""
    input: Input | None = None
    rate: tuple[Rate, ...] = ()


def names() -> list[str]:
    """The systems that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load(name: str) -> System:
    """Reads a system that comes with the package, or a file.

    Args:
        name: of a system, or the path of a TOML file.

    Raises:
        ConfigError: there is no such system or file, or something in it is wrong; the message says what and where.
    """
    if name in names():
        return parse((_folder() / f"{name}.toml").read_text("utf-8"), name)
    path = Path(name)
    if not name or not (path.suffix == ".toml" or path.exists()):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise ConfigError(f"no system {name!r}; {hint} A path ends in .toml")
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--system {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--system {name}: not TOML") from None
    return parse(text, name)


def parse(text: str, name: str) -> System:
    """Reads a description.

    Args:
        text: TOML.
        name: what to call it in an error.

    Raises:
        ConfigError: no TOML, an unknown field (the nearest one is offered), a missing one, or a number out of bounds.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    _refuse_unknown(tree, System, name, "")
    try:
        system = msgspec.convert(tree, System)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        where = place.strip("`.") or "file"
        raise ConfigError(f"{name}: {where}: {message[:1].lower() + message[1:]}") from None
    if not system.rate and system.node.efficiency is None:
        raise ConfigError(f"{name}: neither [[rate]] nor node.efficiency says how fast a node trains; give one of them")
    if system.node.comm_cores.value >= system.node.cores.value:
        raise ConfigError(f"{name}: node.comm_cores leaves none of the {system.node.cores.value} cores to compute on")
    return system


def _folder() -> Any:
    return resources.files("knltrain.predict") / "systems"


def _refuse_unknown(tree: object, kind: Any, name: str, prefix: str) -> None:
    """Walks a tree beside the type it ought to have; the first unknown field is an error."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(tree, list):
        for index, item in enumerate(tree):
            _refuse_unknown(item, arguments[0], name, f"{prefix[:-1]}[{index}].")
        return
    candidates = [one for one in (kind, *arguments) if isinstance(typing.get_origin(one) or one, type)
                  and issubclass(typing.get_origin(one) or one, msgspec.Struct)]  # fmt: skip
    if not candidates or not isinstance(tree, Mapping):
        return
    struct = candidates[0]
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{name}: unknown field {prefix}{key}; {hint}")
        _refuse_unknown(value, known[key], name, f"{prefix}{key}.")
