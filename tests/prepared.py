"""Small data sets in every format, for the tests of preparing and of reading them."""

import io
import tarfile

import numpy as np
from PIL import Image

from knltrain.data import prepare as preparing
from knltrain.runlog.console import Console

SIZE = 32


def prepare(src, dst, *, format="raw", size=SIZE, workers=2, on_bad="fail", **others):
    return preparing.prepare(src, dst, Console(), format=format, size=size, workers=workers, on_bad=on_bad, **others)


def webdataset(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(seed, size=40):
    out = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((size, size)))).save(
        out, "JPEG"
    )
    return out.getvalue()
