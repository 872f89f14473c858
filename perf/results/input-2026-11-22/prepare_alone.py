"""Decoding, scaling and encoding alone on all cores, in turns with knltrain prepare: python prepare_alone.py FOLDER."""

import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

from knltrain.data.convert import to_jpeg, to_square


def raw(path):
    """Decodes and scales."""
    to_square(Path(path).read_bytes(), 256)


def tar(path):
    """Decodes, scales and encodes."""
    to_jpeg(Path(path).read_bytes(), 256)


if __name__ == "__main__":
    files = [str(path) for path in sorted(Path(sys.argv[1]).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    rows = []
    for _ in range(3):
        for name, work in (("raw", raw), ("tar", tar)):
            with Pool() as pool:
                pool.map(raw, files[:64])
                start = time.perf_counter()
                pool.map(work, files, chunksize=25)
                alone = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as folder:
                command = ["knltrain", "prepare", sys.argv[1], f"{folder}/out", "--format", name]
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                whole = time.perf_counter() - start
            rows.append({"format": name, "images": len(files), "alone_s": alone, "prepare_s": whole})
    result = {"command": sys.argv, "cpus": os.cpu_count(), "rounds": rows}
    Path("prepare.json").write_text(json.dumps(result, indent=1) + "\n")
