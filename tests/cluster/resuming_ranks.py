"""A rank of test_resume_together.py: trains again and again in one process group, of which the start takes longest."""

import contextlib
import json
import sys
from pathlib import Path

from small_networks import add_small_networks, whole_and_in_parts

from knltrain import train as trainer
from knltrain.comm.group import Group
from knltrain.console import Console
from knltrain.node.binding import find_place


def main():
    data, out, backend, cases = sys.argv[1:]
    add_small_networks()
    place = find_place(strict=False)
    with Group(place.ranks, backend) as group:
        trainer.Group = lambda *_: contextlib.nullcontext(group)
        for name, options in json.loads(cases).items():

            def run(config):
                trainer.train(config, Console(silent=True), place)

            whole_and_in_parts(run, data, Path(out) / name, {"comm.backend": backend, **options})


if __name__ == "__main__":
    main()
