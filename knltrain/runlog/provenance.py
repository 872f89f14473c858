"""Provenance of a result: versions, processor, source revision, command. Part of every file of results."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import knltrain
from knltrain.node.topology import Node

_PACKAGES = ("torch", "numpy", "simplejpeg", "pillow", "intel-extension-for-pytorch", "torchvision")


def provenance(node: Node) -> dict[str, Any]:
    """Returns versions, processor, instruction set, source revision and command, as JSON types."""
    versions: dict[str, str] = {"python": platform.python_version(), "knltrain": knltrain.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    onednn = re.search(r"oneDNN\)? v([\d.]+)|MKL-DNN v([\d.]+)", torch.__config__.show())
    if onednn:
        versions["onednn"] = onednn[1] or onednn[2]
    return {
        "versions": versions,
        "revision": source_revision(),
        "cpu": node.cpu_model,
        "isa": node.isa,
        "cores": len(node.cores),
        "host": platform.node(),
        "kernel": platform.release(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def source_revision() -> str | None:
    """Returns the git revision of the source, with "+changes" if files differ from it; None outside a checkout."""
    folder = Path(__file__).parents[1]
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        tracked = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "."],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if tracked else head
