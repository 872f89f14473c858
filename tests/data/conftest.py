"""The images of ``image_folder``, prepared."""

import pytest
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
