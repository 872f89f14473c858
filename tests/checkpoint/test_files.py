"""Files as safetensors reads them, with the checksum that zlib has of them."""

import zlib

import pytest
import torch
from disk import Told, record
from safetensors import safe_open
from safetensors.torch import load_file

from knltrain.checkpoint import files
from knltrain.errors import KnltrainError

TENSORS = {
    "z": torch.randn(3, 5),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 7).t(),
    "counter": torch.tensor(7),
    "a half": torch.randn(3).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
    "wide": torch.randn(2, dtype=torch.float64),
}


def test_safetensors_reads_what_was_written(tmp_path):
    packed = files.PackedTensors(TENSORS)
    packed.copy(TENSORS)
    path = tmp_path / "a.safetensors"
    written = files.write_file(path, packed.parts())
    content = path.read_bytes()
    assert written == files.Sum(len(content), f"{zlib.crc32(content):08x}")
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    files.check_file(path, written)


def test_memory_is_used_again(tmp_path):
    packed = files.PackedTensors(TENSORS)
    packed.copy(TENSORS)
    others = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
    assert packed.fits(others)
    packed.copy(others)
    files.write_file(tmp_path / "a", packed.parts())
    assert torch.equal(load_file(tmp_path / "a")["z"], torch.ones(3, 5))
    assert not packed.fits({**others, "z": torch.ones(5, 3)})
    assert not packed.fits({"z": others["z"]})


def test_a_file_of_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    tensors = {"a": torch.randn(12345)}
    packed = files.PackedTensors(tensors)
    packed.copy(tensors)
    files.check_file(tmp_path / "a", files.write_file(tmp_path / "a", packed.parts()))
    assert torch.equal(load_file(tmp_path / "a")["a"], tensors["a"])


def test_a_file_is_synced_when_it_is_whole(tmp_path, monkeypatch):
    told = record(monkeypatch)
    files.write_file(tmp_path / "a", [memoryview(b"two "), memoryview(b"parts")])
    assert told == [Told("sync", tmp_path / "a", b"two parts")]


def test_no_file_is_overwritten(tmp_path):
    (tmp_path / "a").write_text("here before")
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "a", [memoryview(b"new")])


def test_a_sealed_object_comes_back_and_a_changed_one_does_not(tmp_path):
    path = tmp_path / "state.json"
    state = {"a": 1, "b": [0.1, None], "ü": "é"}
    path.write_text(files.seal(state))
    assert files.unseal(path) == state
    path.write_text(files.seal(state).replace("0.1", "0.2"))
    with pytest.raises(KnltrainError, match="does not match its checksum"):
        files.unseal(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_sealed_object_is_one_line(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(KnltrainError, match=r"^state\.json (is not JSON|does not match its checksum)"):
        files.unseal(path)
