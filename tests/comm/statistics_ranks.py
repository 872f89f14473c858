"""A rank of test_statistics.py: has running statistics of its own, lends their mean, and shows them to the first."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from knltrain.comm.group import Group
from knltrain.comm.statistics import averaged_running_statistics, gather_running_statistics
from knltrain.launch.world import discover


def main():
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    with Group(discover(), backend) as group:
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2, track_running_stats=False))
        # Thirds and sevenths: a mean that was put back from another would be another to the last bit.
        model[0].running_mean = torch.tensor([1.0, 2.0, 3.0]) / 3 * (group.rank + 1)
        model[0].running_var = torch.tensor([1.0, 2.0, 3.0]) / 7 * (group.rank + 1)
        own = [buffer.clone() for buffer in model.buffers()]
        with averaged_running_statistics(model, group):
            averaged = model[0].running_mean.tolist()
        rows = gather_running_statistics(model, group)
        result = {
            "averaged": averaged,
            "own again": all(map(torch.equal, own, model.buffers())),
            "rows": {name: tensor.tolist() for name, tensor in rows.items()},
            "text": group.broadcast_str(f"ü of rank {group.rank}"),
            "empty": group.broadcast_str("" if group.is_first else "not this"),
        }
        (folder / f"rank{group.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
