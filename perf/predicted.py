"""Steps over several ranks beside what `knltrain predict` says of them, on hosts with links of a given speed (root).

    python perf/predicted.py --models resnet50,alexnet_bn --image-size 128 --hosts 2 --links 1,10 --bucket-mb 1,25

It takes the way that a user takes: `knltrain bench --profile` times the layers of each network, on all hosts at once,
as they will train; perf/allreduce.py measures each link; `knltrain predict --calibrate` makes a system of the two; the
step is predicted. Then all settings train in turns. Nothing is fitted to the steps that are measured.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
from _common import finish, out_folder, output_options, show
from _links import Hosts
from _turns import Setting, link_speed, list_of, train_in_turns
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import Precision, RunConfig, override
from knltrain.errors import ConfigError
from knltrain.node.topology import read_node
from knltrain.predict.calibrate import calibrate
from knltrain.predict.run import Job, Prediction, predict
from knltrain.predict.systems import System, parse
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance

_SIZES = "4096,1048576,16777216,67108864"
_CLOSE = 0.1
_ANY_GBIT = 1.0  # nothing is communicated while layers are timed
_PERF = Path(__file__).parent


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", metavar="NAME,...", callback=list_of(str), default="resnet50,alexnet_bn",
              show_default=True, help="Networks, as train names them.")  # fmt: skip
@click.option("--image-size", type=int, default=128, show_default=True, help="Pixels.")
@click.option("--local-batches", metavar="16,64", callback=list_of(int), default="16", show_default=True,
              help="Images a rank.")  # fmt: skip
@click.option("--hosts", metavar="2,4", callback=list_of(int), default="2", show_default=True, help="Hosts.")
@click.option("--links", metavar="1,10", callback=list_of(link_speed), default="1,10", show_default=True,
              help="Gbit/s between them.")  # fmt: skip
@click.option("--bucket-mb", metavar="1,25", callback=list_of(float), default="1,25", show_default=True,
              help="Sizes of buckets, MiB.")  # fmt: skip
@click.option("--dtypes", metavar="fp32,bf16", callback=list_of(str), default="fp32", show_default=True,
              help="Of gradients on the wire.")  # fmt: skip
@click.option("--precision", type=click.Choice(get_args(Precision)), default="auto", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Steps timed in a turn; default 5, with --quick 1.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each setting; default 2, with --quick 1.")
@output_options
def main(
    models: list[str], image_size: int, local_batches: list[int], hosts: list[int], links: list[float],
    bucket_mb: list[float], dtypes: list[str], precision: Precision, steps: int | None, rounds: int | None,
    out: str | None, as_json: bool, quick: bool,
) -> None:  # fmt: skip
    """Compare measured steps with predicted ones."""
    if quick:
        models, image_size = ["alexnet_bn_small"], 32
    if min(hosts) < 2:
        raise ConfigError(f"--hosts {min(hosts)}: nothing is communicated; give 2 or more")
    console, folder = Console(json=as_json), out_folder(out)
    rounds, steps = rounds or (1 if quick else 2), steps or (1 if quick else 5)
    settings = [
        Setting(count, 1, gbit, override(RunConfig(), {
            "model": model, "image_size": image_size, "global_batch": count * local, "data": "synthetic",
            "precision": precision, "comm.bucket_mb": bucket, "comm.dtype": dtype}))
        for count, model, local, gbit, bucket, dtype
        in itertools.product(hosts, models, local_batches, links, bucket_mb, dtypes)
    ]  # fmt: skip
    foreseen = _predict(settings, folder, console, steps=steps, repeats=2 if quick else 8)
    measured, carried = train_in_turns(settings, console, rounds=rounds, steps=steps)
    rows = [
        {"model": setting.config.model, **row, "predicted_s": prediction.step.seconds,
         "predicted_exposed_s": prediction.step.exposed_s, "deviation": prediction.step.seconds / row["step_s"] - 1}
        for setting, row, prediction in zip(settings, measured, foreseen, strict=True)
    ]  # fmt: skip
    result = {"image_size": image_size, "rounds": rounds, "steps": steps, "links_measured_gbit": carried,
              "within_10_percent": sum(abs(row["deviation"]) <= _CLOSE for row in rows), "settings": rows,
              **provenance(read_node())}  # fmt: skip
    show(console, _table(result))
    console.line(
        f"{result['within_10_percent']} of {len(rows)} predictions are within {_CLOSE:.0%} of the measured step"
    )
    finish(result, _figure(result), folder, console, as_json=as_json)


def _predict(
    settings: Sequence[Setting], folder: Path, console: Console, *, steps: int, repeats: int
) -> list[Prediction]:
    """Predicts the settings from what is measured without them: layers alone and links alone."""
    reduced: dict[tuple[int, float | None], Path] = {}
    profiles: dict[tuple[int, str, int], Path] = {}
    systems: dict[tuple[Path, Path], System] = {}
    predictions = []
    for setting in settings:
        config, gbit = setting.config, setting.gbit
        assert gbit is not None
        local = config.global_batch // setting.ranks
        if (link := (setting.ranks, gbit)) not in reduced:
            console.line(f"{setting.ranks} hosts, {gbit:g} Gbit/s: all-reduces")
            reduced[link] = _all_reduces(setting.ranks, gbit, folder, repeats)
        if (layers := (setting.ranks, config.model, local)) not in profiles:
            console.line(f"{setting.ranks} hosts: layers of {config.model}, {local} images")
            profiles[layers] = _profile(setting, folder, steps)
        if (pair := (profiles[layers], reduced[link])) not in systems:
            systems[pair] = _system(*pair, folder)
        profile = json.loads(profiles[layers].read_text("utf-8"))
        predictions.append(predict(Job(config=config, system=systems[pair], nodes=setting.ranks, profile=profile)))
    return predictions


def _all_reduces(count: int, gbit: float, folder: Path, repeats: int) -> Path:
    """Measures all-reduces between hosts; returns the file."""
    out = folder / f"{count}-hosts-{gbit:g}-gbit"
    hosts = Hosts(count, gbit)
    try:
        words = [str(_PERF / "allreduce.py"), "--dtypes", "fp32", "--sizes", _SIZES, "--out", str(out.absolute())]
        hosts.answers([*words, "--repeats", str(repeats)])
    finally:
        hosts.close()
    return out / "allreduce.json"


def _profile(setting: Setting, folder: Path, steps: int) -> Path:
    """Times the layers on all hosts at once; returns the file of the slowest, for which the others wait."""
    config, count = setting.config, setting.ranks
    local = config.global_batch // count
    hosts = Hosts(count, _ANY_GBIT)
    try:
        words = ["-m", "knltrain", "bench", "--profile", "--json", "--model", config.model, "--batch", str(local),
                 "--image-size", str(config.image_size), "--precision", config.precision]  # fmt: skip
        answers = hosts.answers([*words, "--steps", str(2 * steps)])
    finally:
        hosts.close()
    slowest = max(answers, key=lambda text: float(json.loads(text)["step_s"]["median"]))
    path = folder / f"{config.model}-{count}-hosts-{local}.json"
    path.write_text(slowest, "utf-8")
    return path


def _system(profile: Path, reduced: Path, folder: Path) -> System:
    """Makes a system of a host and its links, and writes it down."""
    name = f"{profile.stem}-{reduced.parent.name}"
    text = calibrate([profile], reduced, name)
    (folder / f"{name}.toml").write_text(text, "utf-8")
    return parse(text, name)


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['image_size']} pixels, one rank a host, images a rank, buckets in MiB",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model", no_wrap=True)
    for name in ("hosts", "images", "Gbit/s", "wire", "bucket", "step, ms", "lowest", "highest", "predicted",
                 "deviation", "exposed", "predicted"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["settings"]:
        table.add_row(
            row["model"], *(str(row[key]) for key in ("ranks", "local_batch")), f"{row['link_gbit']:g}", row["dtype"],
            f"{row['bucket_mb']:g}",
            *(f"{1e3 * row[key]:.0f}" for key in ("step_s", "fastest_step_s", "slowest_step_s", "predicted_s")),
            f"{row['deviation']:+.1%}",
            *(f"{1e3 * row[key]:.0f}" for key in ("exposed_comm_s", "predicted_exposed_s")),
        )  # fmt: skip
    return table


def _figure(result: dict[str, Any]) -> Figure:
    """Predicted against measured steps, with lines at a tenth more and less."""
    rows = result["settings"]
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.subplots()
    kinds = dict.fromkeys((row["model"], row["ranks"]) for row in rows)
    for index, kind in enumerate(kinds):
        mine = [row for row in rows if (row["model"], row["ranks"]) == kind]
        measured = [1e3 * row["step_s"] for row in mine]
        spread = [[1e3 * (row["step_s"] - row["fastest_step_s"]) for row in mine],
                  [1e3 * (row["slowest_step_s"] - row["step_s"]) for row in mine]]  # fmt: skip
        axes.errorbar(measured, [1e3 * row["predicted_s"] for row in mine], xerr=spread, fmt="osD^v"[index % 5], ms=5,
                      lw=0.8, label=f"{kind[0]}, {kind[1]} hosts")  # fmt: skip
    most = 1.1e3 * max(max(row["step_s"], row["predicted_s"]) for row in rows)
    for factor, style in ((1 - _CLOSE, ":"), (1, "-"), (1 + _CLOSE, ":")):
        axes.plot([0, most], [0, factor * most], style, color="0.5", lw=1, zorder=0)
    axes.set(xlabel="measured step, ms (median; lines from the fastest step to the slowest)",
             ylabel="predicted step, ms", xlim=(0, most), ylim=(0, most))  # fmt: skip
    axes.set_title(f"{result['image_size']} pixels; dotted: {_CLOSE:.0%} more and less", fontsize="medium")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
