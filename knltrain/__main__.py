"""``python -m knltrain``."""

from knltrain.cli import main

main(prog_name="knltrain")
