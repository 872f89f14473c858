"""A rank of test_resume_together.py: trains again and again in one process group, of which the start takes longest."""

import contextlib
import json
import sys
from pathlib import Path

from small_networks import add_small_networks, whole_and_in_parts

from knltrain.comm.group import Group
from knltrain.launch.placement import find_placement
from knltrain.models import convolutions
from knltrain.runlog.console import Console
from knltrain.training import setup, trainer


def main():
    data, out, backend, cases = sys.argv[1:]
    add_small_networks()
    place = find_placement(strict=False)

    def measure(convolution, images, dtype):
        """Each rank finds something else to be faster: the first one's choice is that of all, when they resume too."""
        times = convolutions.Times(2 - place.ranks.rank, 1 + place.ranks.rank, images)
        return {result: times for result, there_is in convolution.native(dtype)._asdict().items() if there_is}

    convolutions.measure = measure
    with Group(place.ranks, backend) as group:
        setup.Group = lambda *_, **__: contextlib.nullcontext(group)
        for name, options in json.loads(cases).items():

            def run(config):
                trainer.train(config, Console(silent=True), place)

            whole_and_in_parts(run, data, Path(out) / name, {"comm.backend": backend, **options})


if __name__ == "__main__":
    main()
