"""Which classes are used and how they are numbered, in every format."""

import os
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_jpeg
from prepared import jpeg, prepare, webdataset

from knltrain.config import RunConfig
from knltrain.data.classes import ALL_CLASSES, ClassChoice, read_choice
from knltrain.data.datasets import open_data, open_folder, open_part, remarks_of
from knltrain.data.folder import DataError, Folder
from knltrain.data.identity import identity
from knltrain.data.sources import find_sources
from knltrain.errors import ConfigError

NUMBERS = [str(number) for number in range(12)]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Twelve classes, 0 … 11, each with one picture in train and one in val."""
    root = tmp_path_factory.mktemp("numbered")
    for part in ("train", "val"):
        for name in NUMBERS:
            write_jpeg(root / part / name / f"{name}.jpg", 40, 40, int(name))
    return root


@pytest.fixture(scope="module", params=["folder", "raw", "tar", "webdataset"])
def any_format(request, numbered, tmp_path_factory):
    """The twelve classes in every format; only tar files that are not prepared know them by number."""
    root = tmp_path_factory.mktemp("formats") / request.param
    if request.param == "folder":
        return numbered
    if request.param in ("raw", "tar"):
        prepare(numbered, root, format=request.param, workers=1)
    else:
        for part in ("train", "val"):
            files = [(f"{name}.{kind}", data) for name in NUMBERS
                     for kind, data in (("jpg", jpeg(int(name))), ("cls", name.encode()))]  # fmt: skip
            webdataset(root / f"{part}-0.tar", files)
    return root


def listed(path, names):
    path.write_text("\n".join(names) + "\n")
    return str(path)


def of(dataset):
    """The class of every image, by name."""
    return sorted(dataset.classes[label] for label in dataset.labels)


def mean_colours(dataset):
    """A picture of each class, by which it is recognised."""
    return {dataset.classes[label]: dataset.image(index).pixels().mean() for index, label in enumerate(dataset.labels)}


def test_only_the_classes_of_a_file(any_format, tmp_path):
    whole = open_folder(any_format, "train")
    config = RunConfig(data=str(any_format), image_size=24, classes=listed(tmp_path / "some", ["3", "11", "7"]))
    for part in open_data(config):
        assert sorted(part.classes) == ["11", "3", "7"]
        assert list(part.classes) == [name for name in whole.classes if name in part.classes]
        assert of(part) == ["11", "3", "7"]
    train = open_part(config, "train")
    assert mean_colours(train) == {name: mean for name, mean in mean_colours(whole).items() if name in train.classes}
    assert identity(train)["images"] == 3
    assert identity(train)["classes_sha256"] != identity(whole)["classes_sha256"]
    if hasattr(train, "addresses"):
        assert train.addresses(np.arange(3)).tolist() == [train.image(i).pixels().ctypes.data for i in range(3)]
        assert "image " in train.name(2)


@pytest.mark.parametrize("order", ["numeric", "name", "file"])
def test_an_order_numbers_the_same_pictures_otherwise(any_format, tmp_path, order):
    whole = mean_colours(open_folder(any_format, "train"))
    expected = {"numeric": NUMBERS, "name": sorted(NUMBERS), "file": NUMBERS[::-1]}[order]
    given = listed(tmp_path / "order", expected) if order == "file" else order
    config = RunConfig(data=str(any_format), image_size=24, class_order=given)
    for part in open_data(config):
        assert list(part.classes) == expected
    train = open_part(config, "train")
    if order == "file" and "webdataset" in str(any_format):  # the file names the numbers
        assert [train.classes[label] for label in train.labels] == expected
    else:
        assert mean_colours(train) == whole


def test_order_and_selection_together(any_format, tmp_path):
    if "webdataset" in str(any_format):
        pytest.skip("a file names its classes")
    config = RunConfig(
        data=str(any_format), image_size=24,
        classes=listed(tmp_path / "some", ["3", "11", "7"]), class_order=listed(tmp_path / "order", NUMBERS[::-1]),
    )  # fmt: skip
    train, _ = open_data(config)
    assert train.classes == ("11", "7", "3")
    assert of(train) == ["11", "3", "7"]


def test_a_file_names_the_classes_of_tar_files_that_have_numbers(tmp_path):
    for part in ("train", "val"):
        files = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("jpg", jpeg(n)), ("cls", b"%d" % n))]
        webdataset(tmp_path / f"{part}-0.tar", files)
    names = listed(tmp_path / "names", ["cat", "dog", "ant"])
    config = RunConfig(data=str(tmp_path), image_size=24, class_order=names)
    train, _ = open_data(config)
    assert train.classes == ("cat", "dog", "ant")
    assert train.labels.tolist() == [0, 1, 2]
    some = replace(config, classes=listed(tmp_path / "some", ["ant", "cat"]))
    train, _ = open_data(some)
    assert [train.classes[label] for label in train.labels] == ["cat", "ant"]
    with pytest.raises(
        ConfigError, match=r"classes .*some: not among .*: 'ant', 'cat'; there .* --class-order FILE gives"
    ):
        open_data(replace(some, class_order=""))
    listed(tmp_path / "names", ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"has 2 classes, and .* labels from 0 to 2"):
        open_data(config)


def test_a_folder_of_other_classes_is_not_even_looked_at(tmp_path):
    for part in ("train", "val"):
        write_jpeg(tmp_path / part / "a" / "0.jpg", 20, 20, 0)
        (tmp_path / part / "empty").mkdir()
    config = RunConfig(data=str(tmp_path), image_size=16, classes=listed(tmp_path / "some", ["a"]))
    assert open_data(config)[0].classes == ("a",)


def test_what_is_prepared_of_some_classes_keeps_them_and_their_order(numbered, tmp_path):
    choice = ClassChoice(order="numeric", only=frozenset(["2", "10", "9"]))
    prepare(numbered, tmp_path / "raw", workers=1, choice=choice)
    for part in open_data(RunConfig(data=str(tmp_path / "raw"), image_size=24)):
        assert part.classes == ("2", "9", "10")
        assert of(part) == ["10", "2", "9"]
    with pytest.raises(ConfigError, match="was made from other images"):
        prepare(numbered, tmp_path / "raw", workers=1)


def test_numbers_that_are_numbered_by_name_are_said_of_prepared_data_too(any_format):
    train = open_folder(any_format, "train")
    assert [("class 10 has label 2" in remark) for remark in train.remarks] == [True] * (train.classes[2] == "10")
    assert not open_folder(any_format, "train", ClassChoice(order="numeric")).remarks
    assert not open_folder(any_format, "train", ClassChoice(numbers=train.classes)).remarks


def test_numbers_that_are_numbered_by_name_are_said(numbered, tmp_path):
    train, val = open_data(RunConfig(data=str(numbered), image_size=24))
    assert train.classes[2] == "10"
    said = remarks_of(train, val)
    assert len(said) == 2
    assert "class 10 has label 2; --class-order numeric numbers them by value" in said[0]
    for asked in ("name", "numeric"):
        assert not remarks_of(*open_data(RunConfig(data=str(numbered), image_size=24, class_order=asked)))
    for name in ("00", "01"):
        write_jpeg(tmp_path / "train" / name / "0.jpg", 20, 20, 0)
    assert not open_folder(tmp_path, "train").remarks, "the same order"


def test_names_that_look_alike_are_said_and_are_two(tmp_path):
    for name in ("Cat", "cat", "dog"):
        write_jpeg(tmp_path / "train" / name / "0.jpg", 20, 20, 0)
    train = open_folder(tmp_path, "train")
    assert train.classes == ("Cat", "cat", "dog")
    assert [remark.partition(": ")[2] for remark in train.remarks] == [
        "the classes 'Cat' and 'cat' look alike and are two"
    ]


@pytest.mark.parametrize("train, val, said", [
    (["cat", "dog"], ["cat"], r"train has 2 classes, val 1; 'dog' is in train and not in val; --classes FILE"),
    (["a", "b", "c", "d", "e"], ["e"], r"'a', 'b', 'c' and 1 more are in train and not in val"),
    (["a"], ["a", "x"], r"'x' is in val and not in train"),
    (["é"], [unicodedata.normalize("NFD", "é")], r"'\\xe9' and 'e\\u0301' look alike: rename one"),
    (["Cat"], ["cat"], r"'Cat' and 'cat' look alike"), (["cat"], ["cat "], r"'cat' and 'cat ' look alike"),
])  # fmt: skip
def test_parts_of_different_classes(tmp_path, train, val, said):
    for part, names in (("train", train), ("val", val)):
        for name in names:
            write_jpeg(tmp_path / part / name / "0.jpg", 20, 20, 0)
    with pytest.raises(DataError, match=said):
        open_data(RunConfig(data=str(tmp_path), image_size=16))
    with pytest.raises(DataError, match=said):
        find_sources(tmp_path)


@pytest.mark.parametrize("content, said", [
    (b"", "no names in it"), (b"\xff\xfe", "not text in UTF-8"), (b"a\nb\na\n", "'a' is in it twice"),
    (b"a\nx\n", r"not among the classes of .*train: 'x'"),
    (b"A\n", r"('A'; 'A' is not 'a'|'a'; 'a' is not 'A'), which"),
    (b"a \n", r"('a '; 'a ' is not 'a'|'a'; 'a' is not 'a '), which"),
])  # fmt: skip
def test_files_of_names_that_are_none(folder, tmp_path, content, said):
    (tmp_path / "names").write_bytes(content)
    for given in ({"classes": str(tmp_path / "names")}, {"class_order": str(tmp_path / "names")}):
        with pytest.raises(ConfigError, match=f"{'-'.join(next(iter(given)).split('_'))} .*names.*{said}"):
            open_part(RunConfig(data=str(folder), image_size=16, **given), "train")


def test_files_of_names_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("nowhere", "pipe", "."):
        with pytest.raises(ConfigError, match="one class name a line"):
            read_choice("", str(tmp_path / path))
    with pytest.raises(ConfigError, match="it takes name, numeric or a file"):
        read_choice("numbers", "")


def test_lines_may_end_as_anybody_ends_them(tmp_path):
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfa\r\nb c\r\n\r\n")
    assert read_choice("", str(tmp_path / "names")).only == {"a", "b c"}
    assert read_choice(str(tmp_path / "names"), "").order == ("a", "b c")
    assert read_choice("", "") == ALL_CLASSES


def test_a_class_order_without_a_class_or_without_numbers(folder, tmp_path):
    write_jpeg(folder / "train" / "b" / "0.jpg", 20, 20, 0)
    order = listed(tmp_path / "order", ["a"])
    with pytest.raises(ConfigError, match=r"train: not among the classes of class-order .*order: 'b'"):
        open_part(RunConfig(data=str(folder), image_size=16, class_order=order), "train")
    with pytest.raises(ConfigError, match=r"class-order numeric: .* has classes that are no numbers: 'a', 'b'"):
        open_part(RunConfig(data=str(folder), image_size=16, class_order="numeric"), "train")
    with pytest.raises(ConfigError, match="no effect on synthetic data"):
        open_part(RunConfig(data="synthetic", class_order="name"), "train")


def test_a_network_is_evaluated_in_its_own_order(numbered, tmp_path):
    """On the classes that the data shares with it, if that is asked for, and else on all or on none."""
    network = ("x", *NUMBERS[::-1])
    choice = ClassChoice(numbers=network[1:], order_from="step-1")
    part = Folder(numbered / "val", choice)
    assert part.classes == network[1:]
    assert [os.path.basename(part.name(i)) for i in range(12)] == [f"{name}.jpg" for name in NUMBERS[::-1]]
    for numbers, said in ((network, "'x' fewer"), (network[2:], "'11' more")):
        with pytest.raises(DataError, match=f"has other classes than step-1 was trained on: {said}"):
            Folder(numbered / "val", replace(choice, numbers=numbers))


def test_a_network_is_evaluated_on_some_of_its_classes(any_format):
    network = ("x", *NUMBERS[::-1])
    choice = ClassChoice(numbers=network, only=frozenset(["7", "1"]))
    some = open_folder(any_format, "val", choice)
    assert (some.classes, of(some)) == (network, ["1", "7"])
