"""What an install contains, with and without a compiler: wheels built from a copy of the tree, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]
PACKAGES = "redraft", "redraft_train"
LIBRARY = "redraft/ops/cpu/_kernels.so"
TOOLS = ("cmake", "ninja")

pytestmark = [
    pytest.mark.install,
    pytest.mark.skipif(find_spec("scikit_build_core") is None, reason="needs scikit-build-core: the dev requirements"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files of a wheel. The weights are a few bytes, because only their names matter here."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(TREE / name, copy / name)
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors", "_kernels.so")
    for package in PACKAGES:
        shutil.copytree(TREE / package, copy / package, ignore=left_out)
    for weights in (TREE / "redraft" / "embedded").rglob("*.safetensors"):
        (copy / weights.relative_to(TREE)).write_bytes(b"weights")
    (copy / LIBRARY).write_bytes(b"left over from an editable install")
    return copy


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with the build tools, but no compiler."""
    folder = tmp_path_factory.mktemp("bin")
    for tool in TOOLS:
        found = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if found is None:
            pytest.skip(f"needs {tool}: the dev requirements")
        (folder / tool).symlink_to(found)
    return folder


def wheel(tree: Path, out: Path, **environment: str) -> tuple[set[str], str]:
    """The files of a wheel built from the tree, and its name."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--no-cache-dir",
        "-w",
        str(out),
        str(tree),
    ]
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS", "CMAKE_GENERATOR", "CMAKE_ARGS")}
    run = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        if LIBRARY in archive.namelist():
            assert archive.read(LIBRARY).startswith(b"\x7fELF") or sys.platform != "linux"  # compiled, not found in the tree
        return set(archive.namelist()), built.name


def expected() -> set[str]:
    """Every Python file, and the data that the code opens."""
    package = TREE / "redraft"
    data = [
        package / "py.typed",
        package / "draft/prior.json",
        *(package / "serve/page").glob("*"),
        *(package / "embedded").glob("*/*"),
        *(package / "bench/suites").glob("*.jsonl"),
    ]
    code = [path for package in PACKAGES for path in (TREE / package).rglob("*.py")]
    return {path.relative_to(TREE).as_posix() for path in [*code, *data]}


def of_packages(files: set[str]) -> set[str]:
    return {name for name in files if name.startswith(tuple(f"{package}/" for package in PACKAGES))}


@pytest.mark.parametrize("how", ["none on PATH", "CXX names nothing"])
def test_without_a_compiler_the_install_succeeds(tree: Path, tools: Path, tmp_path: Path, how: str) -> None:
    environment = {"PATH": str(tools)} if how == "none on PATH" else {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    files, _ = wheel(tree, tmp_path, **environment)
    assert of_packages(files) == expected()
    assert any(name.endswith("entry_points.txt") for name in files)
    assert any(name.endswith("licenses/LICENSE") for name in files)


def quick_compiler(folder: Path) -> Path:
    """The compiler, to which every source of the kernels is empty: the tests of the kernels compile them."""
    (empty := folder / "empty.cpp").touch()
    (made := folder / "c++").write_text(
        "#!/bin/sh\nfor word do\n  shift\n"
        f'  case "$word" in */redraft/*.cpp) word={empty} ;; esac\n'
        f'  set -- "$@" "$word"\ndone\nexec {shutil.which("c++")} "$@"\n'
    )
    made.chmod(0o755)
    return made


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_with_a_compiler_the_library_is_in_the_wheel(tree: Path, tmp_path: Path) -> None:
    files, name = wheel(tree, tmp_path, CXX=str(quick_compiler(tmp_path)))
    assert of_packages(files) - expected() == {LIBRARY}
    assert expected() <= files
    assert name.startswith("redraft-") and "-py3-none-" in name and not name.endswith("-any.whl")
