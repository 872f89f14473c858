"""How first steps of training differ with how convolutions are computed: losses from the same weights and images."""

from __future__ import annotations

from typing import Any

import click
from _common import finish, out_folder, output_options, show, step_config
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import RunConfig, override
from knltrain.runlog.console import Console

_CLASSES = 10
_BATCHES = 8  # of noise, which the network learns by heart
# Engine, memory format and conv of each way. The first is what the others are compared with.
_WAYS = {
    "PyTorch, channels-last": ("eager", "channels_last", "direct"),
    "PyTorch, NCHW": ("eager", "contiguous_format", "direct"),
    "fused, direct": ("fused", "channels_last", "direct"),
    "fused, Winograd": ("fused", "channels_last", "winograd"),
    "fused, auto": ("fused", "channels_last", "auto"),
}


def train(config: RunConfig, steps: int, way: str) -> dict[str, Any]:
    """Trains from the weights of the configuration's seed, on a few batches of noise in turn.

    Returns:
        The losses, and how many convolutions have a result that native kernels computed.
    """
    import torch
    import torch.nn.functional as F

    from knltrain.models import model_of
    from knltrain.models.convolutions import choose
    from knltrain.node.topology import read_node
    from knltrain.optim import build_optimizer
    from knltrain.training.engine import build_engine

    engine_name, layout, conv = _WAYS[way]
    config = override(config, {"conv": conv})
    torch.manual_seed(config.seed)
    model = model_of(config, _CLASSES)
    model.to(memory_format=getattr(torch, layout))
    convolutions = choose(
        config, num_classes=_CLASSES, engine=engine_name, precision="fp32", node=read_node(),
        threads=torch.get_num_threads(), images=config.global_batch,
    )  # fmt: skip
    engine = build_engine(engine_name, "fp32", model, build_optimizer(model, config.optim), convolutions)
    random = torch.Generator().manual_seed(config.seed)
    shape = (_BATCHES, config.global_batch, 3, config.image_size, config.image_size)
    images = torch.randn(shape, generator=random)
    labels = torch.randint(_CLASSES, shape[:2], generator=random)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        engine.optimizer.zero_grad(set_to_none=True)
        batch = images[step % _BATCHES].to(memory_format=getattr(torch, layout))
        loss = F.cross_entropy(engine.model(batch), labels[step % _BATCHES])
        loss.backward()
        engine.optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "native_convolutions": len(convolutions)}


def compared(own: list[float], first: list[float]) -> dict[str, Any]:
    """The mean of the last ten losses, and the largest difference from the first way's in each fifth of the steps."""
    off = [abs(a - b) for a, b in zip(own, first, strict=True)]
    part = max(1, len(own) // 5)
    return {
        "last_losses": sum(own[-10:]) / len(own[-10:]),
        "largest_difference": [max(off[at : at + part]) for at in range(0, len(off), part)],
    }


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """A line for each way and seed."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("way", "seed", "mean of the last ten losses", "largest differences of losses, by fifths"):
        table.add_column(heading)
    for row in rows:
        off = ", ".join(f"{one:.1e}" for one in row["largest_difference"])
        table.add_row(row["way"], str(row["seed"]), f"{row['last_losses']:.3f}", off)
    return table


def drawing_of(rows: list[dict[str, Any]]) -> Figure:
    """The losses, one colour a way."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    colours = {way: f"C{at}" for at, way in enumerate(_WAYS)}
    for row in rows:
        label = row["way"] if row["seed"] == 0 else None
        axis.plot(range(1, len(row["losses"]) + 1), row["losses"], color=colours[row["way"]], label=label, linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.option("--model", help="Network; default resnet50, with --quick alexnet_bn_small.")
@click.option("--batch", type=click.IntRange(min=1), help="Images a step; default 32, with --quick 8.")
@click.option("--image-size", type=click.IntRange(min=8), help="Pixels; default as knltrain bench.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=0.01, show_default=True, help="SGD's.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps; default 50, with --quick 5.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds 0, 1, ...")
@output_options
def main(
    model: str | None, batch: int | None, image_size: int | None, lr: float, steps: int | None, seeds: int,
    out: str | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train from the same weights on the same noise, once with each way of computing convolutions, in float32.

    PyTorch differs from itself in another memory format. Rounding grows from step to step, whoever rounds.
    """
    import torch

    from knltrain.node.affinity import threads_per_rank
    from knltrain.node.memory import keep_freed_memory
    from knltrain.node.topology import read_node
    from knltrain.ops.native import isa
    from knltrain.runlog.provenance import provenance

    console, folder = Console(json=as_json), out_folder(out)
    config = step_config(model=model, batch=batch, image_size=image_size, precision="fp32", engine="fused", quick=quick)
    config = override(config, {"optim.name": "sgd", "optim.variant": "heavy-ball", "optim.lr": lr})
    steps = steps or (5 if quick else 50)
    keep_freed_memory()
    node = read_node()
    torch.set_num_threads(threads_per_rank(node, local_size=1))
    rows = []
    for seed in range(seeds):
        runs: dict[str, dict[str, Any]] = {}
        for way in _WAYS:
            console.line(f"{way}, seed {seed}")
            runs[way] = train(override(config, {"seed": seed}), steps, way)
        first = next(iter(runs.values()))["losses"]
        rows += [{"way": way, "seed": seed, **run, **compared(run["losses"], first)} for way, run in runs.items()]
    title = f"{config.model}, batch {config.global_batch}, {config.image_size} px, SGD at {lr:g}, kernels {isa()}"
    show(console, table_of(rows, title))
    result = {"model": config.model, "batch": config.global_batch, "image_size": config.image_size, "lr": lr,
              "steps": steps, "kernels": isa(), "rows": rows, **provenance(node)}  # fmt: skip
    finish(result, drawing_of(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
