"""Which classes of a data set are used, and how they are numbered: the fields ``classes`` and ``class_order``."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from knltrain.errors import ConfigError, DataError
from knltrain.files import open_regular

_NUM_NAMED = 3
# A name of a folder has 255 bytes at most, and a data set a million classes.
_MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class ClassChoice:
    """The classes that are wanted of a data set.

    Attributes:
        order: how they are numbered: ``name``, ``numeric``, names in the order of their numbers, or empty: as the data
            have them, which is by name for folders.
        only: the names that are used; None for all.
        numbers: a network's classes in the order of its outputs, where it is to be evaluated: they are the data's,
            even if ``only`` leaves some without an image.
        order_from: what names ``order``, for messages.
        only_from: what names ``only``, for messages.
    """

    order: str | tuple[str, ...] = ""
    only: frozenset[str] | None = None
    numbers: tuple[str, ...] | None = None
    order_from: str = field(default="", compare=False)
    only_from: str = field(default="", compare=False)

    def arrange(self, found: Sequence[str], where: object) -> tuple[str, ...]:
        """Returns the class names in the order of their numbers.

        Args:
            found: names of the data's classes, as the data have them.
            where: the data, for messages.

        Raises:
            ConfigError: a class that is named is not there; one that is there has no number.
        """
        wanted = list(found)
        if self.only is not None:
            self._require(self.only, found, self.only_from, where)
            wanted = [name for name in found if self.reads(name)]
        if self.numbers is not None:
            self._refuse_others(self.numbers, wanted, where)
            return self.numbers
        if isinstance(self.order, tuple):
            self._require(wanted, self.order, f"{where}", self.order_from)
            needed = [name for name in self.order if self.reads(name)]
            self._require(needed, found, self.order_from, where)
            chosen = set(wanted)
            return tuple(name for name in self.order if name in chosen)
        if self.order == "numeric":
            if words := [name for name in wanted if not _is_number(name)]:
                raise ConfigError(f"class-order numeric: {where} has classes that are no numbers: {some(words)}")
            return tuple(sorted(wanted, key=_number))
        return tuple(sorted(wanted) if self.order == "name" else wanted)

    @property
    def says_no_order(self) -> bool:
        """Whether the data decide how classes are numbered."""
        return self.order == "" and self.numbers is None

    def reads(self, name: str) -> bool:
        """Whether images of this class are used."""
        return self.only is None or name in self.only

    def renumber(
        self, found: Sequence[str], labels: NDArray[np.int64], names: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers the classes of images as they are arranged.

        Args:
            found: class names as ``labels`` number them.
            labels: class number of every image.
            names: the arranged ones.

        Returns:
            Indices of the images that are used, and their new labels.
        """
        numbers = {name: number for number, name in enumerate(names) if self.reads(name)}
        new = np.array([numbers.get(name, -1) for name in found], np.int64)[labels]
        kept = np.flatnonzero(new >= 0)
        return kept, new[kept]

    def name(self, count: int, where: object) -> tuple[str, ...]:
        """Returns names of classes that have only numbers, 0 … count-1: those that ``order`` lists, or the numbers.

        Raises:
            ConfigError: ``order`` lists fewer.
        """
        if not isinstance(self.order, tuple):
            return tuple(str(number) for number in range(count))
        if len(self.order) < count:
            raise ConfigError(
                f"{self.order_from} has {len(self.order):,} classes, and {where} labels from 0 to {count - 1:,}"
            )
        return self.order

    def _refuse_others(self, numbers: Sequence[str], wanted: Sequence[str], where: object) -> None:
        more, fewer = sorted({*wanted} - {*numbers}), sorted({*numbers} - {*wanted})
        if self.only is not None:  # some were left out on purpose
            fewer = []
        if more or fewer:
            some_of = [f"{some(names)} {verb}" for names, verb in ((more, "more"), (fewer, "fewer")) if names]
            raise DataError(
                f"{where} has other classes than {self.order_from} was trained on: {' and '.join(some_of)}; --classes "
                "FILE restricts the data to the classes that it lists"
            )

    @staticmethod
    def _require(wanted: Iterable[str], found: Sequence[str], wanted_by: str, where: object) -> None:
        there = set(found)
        if missing := [name for name in wanted if name not in there]:
            like = {look(name): name for name in found}
            near = next(((name, like[look(name)]) for name in sorted(missing) if look(name) in like), None)
            hint = f"; {near[0]!a} is not {near[1]!a}, which is there" if near else ""
            if all(map(_is_number, found)) and not any(map(_is_number, missing)):
                hint = "; there classes are numbers, which --class-order FILE gives names to"
            raise ConfigError(f"{wanted_by}: not among the classes of {where}: {some(sorted(missing))}{hint}")


ALL_CLASSES = ClassChoice()


def read_choice(order: str, only: str) -> ClassChoice:
    """Reads the fields ``class_order`` and ``classes``.

    Args:
        order: ``name``, ``numeric``, a file of names, or empty.
        only: a file of names, or empty.

    Raises:
        ConfigError: a file cannot be read, or is no list of names.
    """
    listed = order not in ("", "name", "numeric")
    return ClassChoice(
        order=_read_names("class-order", order) if listed else order,
        only=frozenset(_read_names("classes", only)) if only else None,
        order_from=f"class-order {order}",
        only_from=f"classes {only}",
    )


def remarks_on(names: Sequence[str], where: object, *, by_name: bool) -> tuple[str, ...]:
    """Returns sentences about names that may not be what was meant.

    Args:
        names: of the classes, in the order of their numbers.
        where: the data, for the sentences.
        by_name: whether nobody has asked for their order.
    """
    said = []
    numeric = sorted(names, key=_number) if all(map(_is_number, names)) else list(names)
    if by_name and list(names) == sorted(names) != numeric:
        place = next(place for place, name in enumerate(names) if name != numeric[place])
        said.append(
            f"{where}: the classes are numbers, and numbered in the order of their names, as torchvision's ImageFolder "
            f"does: class {names[place]} has label {place}; --class-order numeric numbers them by value"
        )
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(look(name), name)) != name:
            said.append(f"{where}: the classes {other!a} and {name!a} look alike and are two")
    return tuple(said)


def look(name: str) -> str:
    """Returns what names have in common that differ in case, in blanks around them, or in how letters are encoded."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def some(names: Collection[str]) -> str:
    """Returns the first few names for a message, and how many more there are."""
    first = ", ".join(repr(name) for name in list(names)[:_NUM_NAMED])
    return f"{first} and {len(names) - _NUM_NAMED:,} more" if len(names) > _NUM_NAMED else first


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _number(name: str) -> tuple[int, str, str]:
    """Sorts as the number does; ``int`` takes no more than 4,300 digits."""
    digits = name.lstrip("0")
    return len(digits), digits, name


def _read_names(field: str, path: str) -> tuple[str, ...]:
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        choices = "name, numeric or a file" if field == "class-order" else "a file"
        raise ConfigError(f"{field} {path}: {error.strerror}; it takes {choices} with one class name a line") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field} {path}: not text in UTF-8; it takes one class name a line") from None
    names = [name for line in text.split("\n") if (name := line.rstrip("\r"))]
    if not names:
        raise ConfigError(f"{field} {path}: no names in it; it takes one class name a line")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        double = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ConfigError(f"{field} {path}: {double!r} is in it twice")
    return tuple(names)
