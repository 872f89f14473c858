"""Data that several tests read."""

import pytest
from conftest import write_jpeg
from prepared import prepare


@pytest.fixture(scope="session")
def raw(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / "out"
    prepare(image_folder, out)
    return out


@pytest.fixture(scope="session")
def shards(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tar") / "out"
    prepare(image_folder, out, format="tar")
    return out


@pytest.fixture
def folder(tmp_path):
    """One class with one good image."""
    write_jpeg(tmp_path / "train" / "a" / "0.jpg", 20, 20, 0)
    return tmp_path
