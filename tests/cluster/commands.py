"""A rank that trains again and again in one process group, of which the start takes longest, with faults or without.

``commands.py COMMANDS``, where COMMANDS is JSON: of each run the arguments of `knltrain train` and its faults, as
FAULTS of faults.py has them.
"""

import contextlib
import json
import sys

import pytest
from click.testing import CliRunner
from faults import inject_all

from knltrain.cli.main import main as knltrain
from knltrain.comm.group import Group
from knltrain.launch.placement import find_placement
from knltrain.training import setup


def main():
    place = find_placement(strict=False)
    with Group(place.ranks, "gloo") as group:
        setup.Group = lambda *_, **__: contextlib.nullcontext(group)
        for arguments, faults in json.loads(sys.argv[1]):
            with pytest.MonkeyPatch.context() as patch:
                inject_all(faults, patch=patch.setattr)
                result = CliRunner().invoke(knltrain, ["train", *arguments])
            if result.exit_code:
                sys.exit(f"{arguments}: {result.output}")


if __name__ == "__main__":
    main()
