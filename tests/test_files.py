"""Files that take their name when they are whole."""

import errno
import io
import os
from pathlib import Path

import pytest
from disk import record

from knltrain.errors import ConfigError
from knltrain.files import cache_folder, naming, replacing, replacing_path, resolved, says_absent, sync_folder


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def test_the_old_content_stays_until_the_new_is_whole(path):
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_folder_that_is_set_to_nothing_is_the_users_own(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("KNLTRAIN_CACHE", "")
    assert cache_folder() == Path("/caches/knltrain")
    monkeypatch.setenv("KNLTRAIN_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_a_cache_that_any_account_can_have_filled_is_refused(tmp_path, monkeypatch):
    """What is in it decides labels."""
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True)
    monkeypatch.setenv("KNLTRAIN_CACHE", str(folder))
    assert cache_folder() == folder
    folder.chmod(0o1777)
    with pytest.raises(ConfigError, match=r"can have been filled by any account .*; set KNLTRAIN_CACHE to a folder"):
        cache_folder()
    folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        assert cache_folder() == folder, "as a home folder that a container sees as root"
        folder.parent.chmod(0o1777)
        with pytest.raises(ConfigError, match="owner 12345"):
            cache_folder()


def test_an_error_leaves_the_old_content_alone(path):
    with pytest.raises(OSError), replacing(path) as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_names_the_file_that_was_asked_for_and_what_is_needed(path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as raised, replacing(path) as file, naming(file.name, needed=3 << 20):
        Full().write(b"new")
    assert str(raised.value) == f"[Errno 28] No space left on device for 3.0 MiB: '{path}'"
    assert path.read_bytes() == b"old"


def test_every_spelling_of_a_path_is_one(path, monkeypatch):
    (path.parent / "link").symlink_to(path)
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    for spelling in ("file", "./file", "link", f"{path.parent}/../{path.parent.name}/file", "~/file", f"{path}/"):
        assert resolved(spelling) == path.resolve()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_what_cannot_be_read_now_is_not_absent(number):
    assert not says_absent(OSError(number, os.strerror(number)))
    assert says_absent(OSError(errno.ENOENT, os.strerror(errno.ENOENT)))


def test_what_a_killed_process_left_is_written_over(path):
    aside = path.with_name("file.part")
    aside.write_bytes(b"half of something longer")
    with replacing(path, aside=aside) as file:
        assert aside.exists()
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert not aside.exists()


@pytest.mark.parametrize("sync", [True, False])
def test_content_is_synced_before_the_name_and_the_name_after_it(path, monkeypatch, sync):
    told = record(monkeypatch)
    with replacing_path(path, sync=sync) as aside:
        aside.write_bytes(b"new")
    synced = [("sync", aside, b"new")], [("sync", path.parent, {"file"})]
    before, after = synced if sync else ([], [])
    assert told == [*before, ("name", path, b"new"), *after]


@pytest.mark.parametrize("number, raised", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_does_not_sync_folders_is_no_failure(tmp_path, monkeypatch, number, raised):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raised:
        with pytest.raises(OSError):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
