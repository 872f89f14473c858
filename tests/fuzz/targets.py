"""What is fuzzed: for each kind of file whole ones, a way to read one, and the errors that may come of it."""

import io
import json
import shutil
import tarfile

import numpy as np
import simplejpeg
from node import trees
from PIL import Image

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.config import AugmentConfig, RunConfig
from knltrain.data import decode
from knltrain.data.augment import Box
from knltrain.data.convert import to_jpeg, to_square
from knltrain.data.datasets import open_folder
from knltrain.data.decode import DecodeError, EncodedImage, decoder_of_parts
from knltrain.data.journal import Journal
from knltrain.data.manifest import Manifest, Shard, encode_manifest
from knltrain.errors import KnltrainError
from knltrain.launch.placement import find_placement
from knltrain.models import model_of
from knltrain.node import plan_formats as drawing
from knltrain.node.affinity import plan_node
from knltrain.node.topology import read_node
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console
from knltrain.training.evaluate import evaluate_checkpoint
from knltrain.training.trainer import train


def picture(height=90, width=120):
    """Colours with edges, so that every coefficient is used."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / 5 + y / 7), (x * y) % 256, np.where((x // 9 + y // 11) % 2, 230, 20)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Jpeg:
    """The decoder of parts, the one of whole images, and both as training and preparing use them."""

    allowed = (DecodeError,)
    # Behind what is decoded: nothing may be written there.
    _MARGIN = 4096

    def corpus(self, folder):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = picture()
        plain, progressive = encoded(image, "JPEG"), encoded(image, "JPEG", progressive=True)
        # What no encoder here writes: the frame says arithmetic coding, lossless, or samples that fit no block.
        others = [plain.replace(b"\xff\xc0", kind, 1) for kind in (b"\xff\xc1", b"\xff\xc3", b"\xff\xc9")]
        others.append(progressive.replace(b"\xff\xc2", b"\xff\xca", 1))
        for data, marker in ((plain, b"\xff\xc0"), (progressive, b"\xff\xc2")):
            first = data.index(marker) + 11  # sampling factors of the first component, the second's 3 bytes behind it
            for factors in (0x41, 0x14, 0x44, 0x31, 0x13, 0x32):
                others += [data[:at] + bytes([factors]) + data[at + 1 :] for at in (first, first + 3)]
        return [
            *others,
            *(
                simplejpeg.encode_jpeg(np.asarray(image), colorsubsampling=s)
                for s in ("444", "422", "420", "440", "411")
            ),
            *(encoded(image, "JPEG", progressive=True, subsampling=s) for s in (0, 1, 2)),
            encoded(image, "JPEG", restart_marker_blocks=3),
            encoded(image.convert("L"), "JPEG"),
            encoded(image.convert("L"), "JPEG", progressive=True),
            encoded(image.convert("CMYK"), "JPEG"),
            encoded(image.convert("CMYK"), "JPEG", progressive=True),
            encoded(image.resize((1, 1)), "JPEG"),
            encoded(image.resize((7, 900)), "JPEG"),
            encoded(image, "JPEG", exif=exif),
            encoded(image, "JPEG", comment=b"x" * 900, icc_profile=b"y" * 70000),
        ]

    def attempt(self, data, folder):
        self._parts(data)
        image = EncodedImage(data)
        if image.height * image.width <= 1 << 24:
            image.around(Box(0.5, 0.25, image.width * 0.6 + 0.4, image.height * 0.7 + 0.3), 20)
            image.around(Box(0, 0, image.width, image.height), 8)
            image.pixels()
            to_square(data, 16)
            to_jpeg(data, 16)

    def _parts(self, data):
        native = decoder_of_parts()
        if native is None:
            return
        try:
            parts = native(data)
            if parts.height * parts.width > 1 << 22 or not parts.becomes_rgb:
                return
            for denominator in (1, 2, 8):
                height, width = -(-parts.height // denominator), -(-parts.width // denominator)
                for top, left, high, wide in (
                    (0, 0, height, width),
                    (height // 3, width // 3, max(1, height // 3), max(1, width // 3)),
                    (height - 1, width - 1, 1, 1),
                ):
                    *_, rows, columns = parts.begin(top, left, high, wide, denominator)
                    pixels = np.full(rows * columns * 3 + self._MARGIN, 77, np.uint8)
                    parts.read(pixels.ctypes.data)
                    assert (pixels[-self._MARGIN :] == 77).all(), "written behind the window"
        except ValueError:
            return


class WholeJpeg(Jpeg):
    """As where the native decoder is missing."""

    def attempt(self, data, folder):
        before, decode.decoder_of_parts = decode.decoder_of_parts, lambda: None
        try:
            super().attempt(data, folder)
        finally:
            decode.decoder_of_parts = before

    def _parts(self, data):
        """Not here."""


class Pictures(Jpeg):
    """Formats that Pillow decodes."""

    def corpus(self, folder):
        image = picture(30, 40)
        palette = image.convert("P")
        palette.info["transparency"] = 3
        return [
            encoded(image, "PNG"), encoded(image.convert("RGBA"), "PNG"), encoded(palette, "PNG"),
            encoded(image.convert("L"), "PNG"), encoded(image.convert("1"), "PNG"),
            encoded(image, "WEBP"), encoded(image, "WEBP", lossless=True), encoded(image, "BMP"),
            encoded(palette, "BMP"), encoded(image, "GIF"), encoded(image, "PPM"), encoded(image.convert("1"), "PPM"),
            *(encoded(image, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "packbits", "tiff_deflate")),
            encoded(image, "EPS"),
        ]  # fmt: skip

    def _parts(self, data):
        """Not of these."""


def shard(pictures=4):
    """A tar file as WebDataset has them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(pictures):
            data = simplejpeg.encode_jpeg(np.asarray(picture(16, 16)))
            for name, content in (
                (f"{'d' * 90 * number}/{number}.jpg", data),
                (f"{'d' * 90 * number}/{number}.cls", b"1"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if number == 2:
                    info.pax_headers = {"comment": "é" * 20, "mtime": "1.5"}
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read_some(dataset):
    """Opens the images of a data set; the same errors as those of a run."""
    for index in range(min(len(dataset), 5)):
        dataset.name(index)
        try:
            dataset.image(index).pixels()
        except (DecodeError, OSError) as error:
            raise dataset.bad(index, error) from None
    dataset.check(3)
    dataset.close()


class TarFile:
    """A shard without a manifest: its headers decide where images are."""

    allowed = (KnltrainError,)

    def corpus(self, folder):
        gnu = io.BytesIO()
        with tarfile.open(fileobj=gnu, mode="w", format=tarfile.GNU_FORMAT) as tar:
            info = tarfile.TarInfo("n" * 300 + ".jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
            tar.addfile(tarfile.TarInfo("n" * 300 + ".cls"))
        return [shard(), shard(1), gnu.getvalue()]

    def attempt(self, data, folder):
        root = folder / "tar"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "train-0.tar").write_bytes(data)
        read_some(open_folder(root, "train"))


class Index(TarFile):
    """The index that lies beside the shards."""

    def corpus(self, folder):
        self.root = folder / "indexed"
        self.root.mkdir()
        (self.root / "train-0.tar").write_bytes(shard())
        open_folder(self.root, "train")
        (self.path,) = self.root.glob("*.npz")
        return [self.path.read_bytes()]

    def attempt(self, data, folder):
        self.path.write_bytes(data)
        read_some(open_folder(self.root, "train"))


class Raw:
    """What prepare writes: a manifest, labels and a shard, one of them damaged."""

    allowed = (KnltrainError,)
    _FILES = ("meta.json", "train/labels.npy", "train/images-00000.npy")

    def corpus(self, folder):
        self.root = folder / "raw"
        (self.root / "train").mkdir(parents=True)
        np.save(self.root / self._FILES[1], np.array([0, 1, 2]))
        np.save(self.root / self._FILES[2], np.zeros((3, 8, 8, 3), np.uint8))
        size = (self.root / self._FILES[2]).stat().st_size
        shards = {"train": [Shard(self._FILES[2], 3, size, "0" * 64)]}
        manifest = Manifest(format="raw", size=8, classes=["a", "b", "c"], counts={"train": 3}, shards=shards)
        (self.root / self._FILES[0]).write_bytes(encode_manifest(manifest))
        self.whole = {name: (self.root / name).read_bytes() for name in self._FILES}
        return [bytes([number]) + data for number, data in enumerate(self.whole.values())]

    def attempt(self, data, folder):
        which = self._FILES[data[0] % 3] if data else self._FILES[0]
        (self.root / which).write_bytes(data[1:])
        try:
            read_some(open_folder(self.root, "train"))
        finally:
            (self.root / which).write_bytes(self.whole[which])


class Toml:
    """A configuration file, down to the configuration."""

    allowed = (KnltrainError,)

    def corpus(self, folder):
        fields = configuration.flatten(configuration.as_dict(RunConfig()))
        lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items() if value is not None]
        return [
            "\n".join(lines).encode(),
            b'recipe = "x"\ndata = "/a"\nglobal_batch = 0x40\n[optim]\nlr = 1e-3\n[schedule]\nmilestones = [1, 2.5]\n',
            b"[[optim]]\nlr = 1979-05-27T07:32:00Z\n[augment.name]\nx = {a = {b = [nan, inf]}}\n",
        ]

    def attempt(self, data, folder):
        path = folder / "run.toml"
        path.write_bytes(data)
        config = configuration.override(RunConfig(), configuration.read_toml(path))
        stored = json.loads(json.dumps(configuration.as_dict(config)))
        assert configuration.override(RunConfig(), configuration.flatten(stored)) == config


class PrepareJournal:
    """What an interrupted prepare goes on from."""

    allowed = (KnltrainError,)

    def corpus(self, folder):
        head = {"format": "raw", "size": 8, "source": "s", "images_a_shard": 5}
        line = {"file": "train/images-00000.npy", "images": 4, "bytes": 9, "sha256": "0", "rejected": [[3, "why"]]}
        return [(json.dumps(head) + "\n" + 3 * (json.dumps(line) + "\n")).encode()]

    def attempt(self, data, folder):
        (folder / "prepare.jsonl").write_bytes(data)
        with Journal(folder) as journal:
            journal.begin({"format": "raw", "size": 8, "source": "s"}, lambda: 5)
            for record in journal.records.values():
                assert sum(place for place, _ in record["rejected"]) + record["images"] + record["bytes"] >= 0


class Checkpoint:
    """What a run left, one of its files damaged, as it is evaluated and as training goes on from it."""

    allowed = (KnltrainError,)

    def corpus(self, folder):
        root, out = folder / "images", folder / "run"
        for part in ("train", "val"):
            for name in ("a", "b"):
                (root / part / name).mkdir(parents=True)
                (root / part / name / "0.jpg").write_bytes(simplejpeg.encode_jpeg(np.asarray(picture(16, 16))))
        self.config = RunConfig(
            data=str(root), out=str(out), model="alexnet_bn_small", image_size=16, global_batch=2, max_steps=1,
            workers=0, precision="fp32", engine="eager", augment=AugmentConfig(name="none", resize=16),
        )  # fmt: skip
        train(self.config, Console(silent=True))
        (self.folder,) = (out / "checkpoints").iterdir()
        self.whole = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        # Of tensors the beginning, where their header is.
        return [bytes([number]) + data[:4096] for number, data in enumerate(self.whole.values())]

    def attempt(self, data, folder):
        name = sorted(self.whole)[data[0] % len(self.whole)] if data else "state.json"
        (self.folder / name).write_bytes(data[1:] + self.whole[name][4096:])
        try:
            evaluate_checkpoint(self.folder, self.config, Console(silent=True), find_placement(strict=False))
            model = model_of(self.config, 2)
            checkpoint.load_optimizer(self.folder, build_optimizer(model, self.config.optim))
            assert checkpoint.progress_of(checkpoint.read_state(self.folder)).step >= 0
        finally:
            (self.folder / name).write_bytes(self.whole[name])


class Machine:
    """A copy of another node's sysfs and procfs, one file damaged."""

    allowed = (KnltrainError,)

    def corpus(self, folder):
        self.root = folder / "machine"
        cores = [(cpu, cpu + 4) for cpu in range(4)]
        trees.write_tree(self.root, cores=cores, domains=[(0, 1, 4, 5), (2, 3, 6, 7), ()], memory=[900, 900, 500],
                         flags=trees.SAPPHIRE_RAPIDS, caches=[(3, 3, tuple(range(8)))],
                         distances=[[10, 21, 17], [21, 10, 28], [17, 28, 10]])  # fmt: skip
        group = "0::/a/b\n4:memory:/a\n"
        trees.write(self.root, "proc/self/cgroup", group)
        for name, text in (("b/cpu.max", "200000 100000"), ("memory.max", "1073741824"), ("cpuset.cpus", "0-3")):
            trees.write(self.root, f"sys/fs/cgroup/a/{name}", text)
        self.files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return [number.to_bytes(2, "big") + path.read_bytes() for number, path in enumerate(self.files)]

    def attempt(self, data, folder):
        path = self.files[int.from_bytes(data[:2], "big") % len(self.files)]
        before = path.read_bytes()
        path.write_bytes(data[2:])
        try:
            node = read_node(self.root)
            plan = plan_node(node, environ={})
            json.dumps(drawing.as_dict(node, plan))
            drawing.as_text(node, plan)
            drawing.as_slurm(node, plan)
        finally:
            path.write_bytes(before)


TARGETS = {
    "checkpoint": Checkpoint,
    "config": Toml,
    "image": Pictures,
    "index": Index,
    "jpeg": Jpeg,
    "jpeg-whole": WholeJpeg,
    "journal": PrepareJournal,
    "machine": Machine,
    "raw": Raw,
    "tar": TarFile,
}
