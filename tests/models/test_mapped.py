"""Files as arrays: what they hold, and that pages that were read do not stay in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from redraft.models import loader
from redraft.models.mapped import ENDS, Mapped
from redraft.weights.stored import AsStored
from tests import checkpoints
from tests.models.gguf import files

PAGES = 1 << 20  # bytes of a file that fills many pages


def resident(file: Path) -> int:
    """KiB of a file that count as memory of this process."""
    count, own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name:
            own = line.endswith(f" {file}")
        elif name == "Rss:" and own:
            count += int(line.split()[1])
    return count


def test_arrays_share_the_pages_of_a_file(tmp_path: Path) -> None:
    file, numbers = tmp_path / "numbers", np.arange(PAGES // 4, dtype=np.int32)
    file.write_bytes(b"head" + numbers.tobytes())
    mapped = Mapped(file)
    found = mapped.array(np.int32, (4, PAGES // 16), 4)
    assert (found.ravel() == numbers).all() and not found.flags.writeable
    assert resident(file) >= PAGES // 1024
    mapped.forget()
    assert resident(file) == 0
    assert (found.ravel() == numbers).all()
    with pytest.raises(ValueError, match="smaller"):
        mapped.array(np.int32, (PAGES,), 4)


def test_the_state_has_all_bytes_where_times_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose files have the times that its maker chose: the same ones, and another byte in the middle."""
    file, data = tmp_path / "numbers", bytearray(4 * ENDS)
    mounts = "22 1 {}:{} / / rw - {} /dev/vda rw\n"

    def state(kind: str) -> tuple[object, ...]:
        file.write_bytes(data)
        mapped = Mapped(file)
        mapped.status = first
        (tmp_path / "mounts").write_text(mounts.format(os.major(first.st_dev), os.minor(first.st_dev), kind))
        return mapped.state

    file.write_bytes(data)
    first = file.stat()
    monkeypatch.setattr("redraft.models.mapped.MOUNTS", tmp_path / "mounts")
    before = {kind: state(kind) for kind in ("ext4", "squashfs")}
    data[2 * ENDS] = 1
    assert state("ext4") == before["ext4"], "the time would tell"
    assert state("squashfs") != before["squashfs"]


def test_a_file_of_the_future_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(b"1")
    os.utime(file, (2e9, 2e9))
    mapped = Mapped(file)
    assert not mapped.settled(), "it changed just now"
    monkeypatch.setattr("redraft.models.mapped.SETTLED", -60)
    assert mapped.settled()


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        Mapped(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        Mapped(tmp_path / "none")


@pytest.mark.parametrize("quant", [None, AsStored()], ids=["decoded", "as stored"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_checkpoint_that_was_read_takes_no_memory(form: str, quant: AsStored | None, tmp_path: Path) -> None:
    path = folder = checkpoints.tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    if form == "file":
        path = files.write(folder, tmp_path / "model.gguf", Kind.Q8_0)
    checkpoint = loader.inspect(path, quant=quant)
    weights = loader.read(checkpoint, as_stored=quant is not None)
    assert weights.bytes > 0
    assert [resident(file) for file in checkpoint.tensors.files] == [0]
