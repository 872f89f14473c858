"""What lies in a data set and is no image of it. It is counted, so that nothing is left out in silence."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

# Image formats that people have, and that are not read.
NOT_READ = (
    ".arw", ".avif", ".cr2", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jxl", ".nef", ".pbm", ".pcx", ".pfm", ".pnm", ".psd", ".svg", ".tga", ".xcf",
)  # fmt: skip
# Folders and files that systems and programs leave behind, in lower case; all hidden ones are ignored too.
_LEFT_BEHIND = {
    "__macosx", "thumbs.db", "desktop.ini", "lost+found", "@eadir", "$recycle.bin", "system volume information",
}  # fmt: skip
_NUM_NAMED = 3


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or of a kind that systems and programs leave behind."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def ignored_in(path: str) -> str | None:
    """Returns the first name in a path for which :func:`is_ignored` holds; ``.`` and ``..`` are none."""
    return next((name for name in path.split("/") if name.strip(".") and is_ignored(name)), None)


class LeftOut:
    """Counts of what a part has left out.

    Attributes:
        strays: images that belong to no class.
        circles: links to folders that are being read already.
        without_image: samples of tar files that have a label and no image.
    """

    def __init__(self) -> None:
        self.strays = self.circles = self.without_image = 0
        self._ignored: Counter[str] = Counter()
        self._formats: Counter[str] = Counter()

    def ignore(self, name: str) -> None:
        """Counts a file or folder for which :func:`is_ignored` holds."""
        self._ignored["._*" if name.startswith("._") else name] += 1

    def see(self, name: str) -> bool:
        """Counts a file that is read by nobody if it is an image; returns whether it is one."""
        suffix = PurePath(name).suffix.lower()
        if suffix not in NOT_READ:
            return False
        self._formats[suffix] += 1
        return True

    def formats(self) -> str:
        """Returns the formats that are not read, with counts; empty if there is none."""
        return ", ".join(f"{count:,} {suffix}" for suffix, count in self._formats.most_common())

    def remarks(self, where: object) -> tuple[str, ...]:
        """Returns a sentence for each kind.

        Args:
            where: the part, for the sentences.
        """
        said = []
        if self._ignored:
            named = [f"{name} ({count:,})" for name, count in self._ignored.most_common(_NUM_NAMED)]
            more = [f"{len(self._ignored) - _NUM_NAMED} other names"] if len(self._ignored) > _NUM_NAMED else []
            said.append(
                f"{where}: ignored files and folders, which are hidden or left behind by programs: "
                f"{self._ignored.total():,}, of these {', '.join([*named, *more])}"
            )
        if self._formats:
            said.append(
                f"{where}: images left out, whose format is not read: {self.formats()}; convert them to JPEG or PNG"
            )
        if self.strays:
            said.append(f"{where}: images left out, which lie outside of the class folders: {self.strays:,}")
        if self.circles:
            said.append(
                f"{where}: links to folders not followed, since those are in the same class already, or hold the link: "
                f"{self.circles:,}"
            )
        if self.without_image:
            said.append(f"{where}: samples left out, which have a label and no image: {self.without_image:,}")
        return tuple(said)
