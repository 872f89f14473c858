"""Where things made on first use are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KNLTRAIN_CACHE, or knltrain in the user's cache folder."""
    if "KNLTRAIN_CACHE" in os.environ:
        return Path(os.environ["KNLTRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knltrain"
