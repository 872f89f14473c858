"""What to run. Imports no torch."""

from knltrain.config.schema import *  # noqa: F403
