"""``python -m knltrain``."""

from knltrain.cli.main import main

main(prog_name="knltrain")
