"""Folders as runs leave them, made without training."""

import json
import math


def run_folder(
    path, *, epochs=4, steps=12, batch=64, optimizer="lars", finished=True, config=None, ratios=None, first=1, **row
):
    """A run of ``steps`` steps with an evaluation after each epoch.

    Args:
        path: of the folder, which is made.
        epochs: passes over the images.
        steps: how many.
        batch: the global batch.
        optimizer: its name.
        finished: whether it has a summary.
        config: further fields.
        ratios: of trust_ratios.jsonl, by kind and name, the same at each step; by default there are none.
        first: the number of the first step.
        row: further fields of each step.
    """
    path.mkdir(parents=True)
    fields = {"model": "alexnet_bn_small", "data": "cifar10", "out": str(path), "global_batch": batch, "epochs": epochs,
              "optim": {"name": optimizer, "lr": 0.5}, **(config or {})}  # fmt: skip
    record = {"config": fields, "plan": {"world_size": 2, "engine": "fused"}, "cpu": "a processor",
              "versions": {"torch": "2.8.0"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(record))
    rows, ratio_rows = [], []
    for step in range(first, first + steps):
        epoch = step * epochs / steps
        rows.append({
            "step": step, "epoch": epoch, "loss": 2.3 * math.exp(-epoch), "lr": 0.1 * step, "grad_norm": 1.0,
            "images_per_s": batch / 0.5, "data_s": 0.05, "step_s": 0.5, "comm_s": 0.2, "exposed_comm_s": 0.1,
            "rss_mb": 800.0 + step, **row,
        })  # fmt: skip
        if step % (steps // epochs or 1) == 0:
            rows.append({"step": step, "epoch": epoch, "top1": 90 - 80 / step, "top5": 99.0, "val_loss": 1 / step})
        if ratios:
            ratio_rows.append({"step": step, "epoch": epoch, **ratios})
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    if ratios:
        (path / "trust_ratios.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ratio_rows))
    if finished:
        (path / "summary.json").write_text(json.dumps({"finished": True, "peak_rss_mb": 1234.5}))
    return path


RATIOS = {
    "weight": {f"layer{index}.weight": 0.001 * 2**index for index in range(5)},
    "norm": {"norm.weight": 0.5, "norm.bias": None},
    "bias": {"layer.bias": 0.01},
}
