"""`redraft doctor` with the library, without it, and on a busy machine. Figures are not checked, only that they are present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from rich.console import Console

from redraft.bench.parts import Part
from redraft.cli import doctor
from redraft.models import loader
from redraft.ops import library, pytorch
from tests import checkpoints
from tests.cli.conftest import Ran
from tests.models.gguf import files

native = pytest.mark.skipif(not library.PATH.exists() or library.load() is None, reason="no native library")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BUFFER", 4 << 20)
    monkeypatch.setattr(doctor, "ROUNDS", 2)
    monkeypatch.setenv("COLUMNS", "300")


@native
def test_it_says_what_serves_and_measures(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, _ = redraft("doctor", "--json", str(tmp_path / "facts.json"))
    assert code == 0
    loaded = library.load()
    assert loaded is not None
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["library"] == str(library.PATH) and facts["library_why_not"] is None
    assert (facts["isa"], facts["threads"]) == (loaded.isa, loaded.threads)
    assert [(one["dtype"], one["device"], one["backend"]) for one in facts["serves"][:2]] == [
        ("float32", "cpu", "native"),
        ("bfloat16", "cpu", "native"),
    ]
    assert facts["buffer_bytes"] == 4 << 20
    assert facts["tokens_per_second_limit"] == pytest.approx(facts["read_bytes_per_second"] / 2.48e9)
    assert list(facts["peaks"]) == ["float32", "bfloat16", "int8"]
    assert facts["peaks"]["float32"]["flops"] > 0
    assert 0 < facts["cpu_share"] <= 1
    for text in ("read bandwidth", "GB/s", "peak float32", "huge pages", "tokens/s without drafts", loaded.isa, facts["torch"] or ""):
        assert text in out


@native
def test_pytorch_is_named_only_if_it_is_installed(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version, threads, printed in (("2.5.1", 3, ["2.5.1", "3 of PyTorch"]), ("2.5.1", None, ["2.5.1"]), (None, None, [])):
        monkeypatch.setattr(pytorch, "facts", lambda: {"torch": version, "torch_threads": threads, "torch_isa": None})  # noqa: B023
        code, out, _ = redraft("doctor", "--json", str(tmp_path / "facts.json"))
        facts = json.loads((tmp_path / "facts.json").read_text())
        assert (code, facts["torch"], facts["torch_threads"]) == (0, version, threads)
        assert all(text in out for text in printed) and out.count("PyTorch") == len(printed), "its name stands beside both"


def test_without_the_library_it_says_why(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "it was not compiled"))
    code, out, _ = redraft("doctor", "--json", str(tmp_path / "facts.json"))
    assert code == 0
    assert "none: it was not compiled" in out
    other = "torch" if pytorch.version() else "numpy"
    assert f"{other}: it was not compiled" in out
    assert "not measured" in out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["library"] is None and facts["read_bytes_per_second"] is None
    assert {one["backend"] for one in facts["serves"]} == {other}


@native
def test_a_smaller_buffer_is_reported(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "all that memory allows" not in redraft("doctor")[1]
    monkeypatch.setattr("redraft.models.memory.limits", lambda *_: 5 << 20)
    assert "buffer of 2.0 MiB, all that memory allows" in redraft("doctor")[1]
    monkeypatch.setattr("redraft.models.memory.limits", lambda *_: 1 << 20)
    assert "there is no memory for a buffer" in redraft("doctor")[1]


@native
def test_a_busy_machine_is_reported(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if other processes had half of the time: the process's clock runs at half the speed of the wall clock."""
    clock = iter(range(1000))
    monkeypatch.setattr(doctor.time, "process_time", lambda: 0.5 * library.load().threads * next(clock))  # type: ignore[union-attr]
    wall = iter(range(1000))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: float(next(wall)))
    assert "50% of" in redraft("doctor")[1]
    monkeypatch.setattr(doctor, "BUSY", 0.4)
    assert "other processes" not in redraft("doctor")[1]


def test_a_file_that_cannot_be_written_is_refused_first(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, err = redraft("doctor", "--json", str(tmp_path / "none" / "facts.json"))
    assert (code, out) == (2, "")
    assert "no folder" in err


@pytest.mark.parametrize(("text", "found"), [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), ("", None)])
def test_huge_pages_are_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str | None) -> None:
    file = tmp_path / "kernel/mm/transparent_hugepage/enabled"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    monkeypatch.setattr(doctor, "SYS", tmp_path)
    assert doctor._huge_pages() == found
    monkeypatch.setattr(doctor, "SYS", tmp_path / "none")
    assert doctor._huge_pages() is None


@native
def test_a_wrong_instruction_set_is_a_finding_here_and_an_error_elsewhere(tiny: str, tmp_path: Path) -> None:
    small = "from redraft.cli import doctor, main; doctor.BUFFER, doctor.ROUNDS = 4 << 20, 2; raise SystemExit(main.run())"
    environment = {**os.environ, "REDRAFT_ISA": "sse9"}

    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", small, *arguments], env=environment, capture_output=True, text=True, check=False)

    done = ran("doctor", "--json", str(tmp_path / "facts.json"))
    assert done.returncode == 0, done.stderr
    assert "REDRAFT_ISA = sse9: allowed: avx2, avx512, avx512_vnni, avx512_bf16, amx" in done.stdout and "read bandwidth" in done.stdout
    facts, loaded = json.loads((tmp_path / "facts.json").read_text()), library.load()
    assert loaded is not None and facts["isa_refused"].startswith("REDRAFT_ISA = sse9")
    assert facts["isa"] in loaded.isas_compiled and facts["peaks"]["float32"]["flops"] > 0
    done = ran("generate", tiny, "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: REDRAFT_ISA = sse9: allowed: avx2")


def test_the_table_fits_80_columns(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = redraft("doctor", tiny)
    assert code == 0 and max(map(len, out.splitlines())) <= 80


@native
def test_a_model_is_shown_part_by_part(redraft: Callable[..., Ran], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Part("norms", "native"), Part("keep: one", "torch", "attention"), Part("read: two", "not tried", "no profile")]
    monkeypatch.setattr("redraft.bench.parts.parts", lambda _: iter(found))
    code, out, _ = redraft("doctor", tiny, "--json", str(tmp_path / "facts.json"))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert {"native norms", "keep: one torch: attention", "read: two not tried: no profile"} <= set(lines)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["model"]["parts"][1] == {"name": "keep: one", "backend": "torch", "why": "attention"}
    assert facts["tokens_per_second_limit"] == pytest.approx(facts["read_bytes_per_second"] / facts["model"]["bytes_per_token"])


def test_a_wrong_model_is_one_line(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, err = redraft("doctor", str(tmp_path / "none"))
    assert (code, out, err.count("\n")) == (1, "", 1)


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
def test_a_file_that_runs_as_it_is_stored_is_read_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.bench.parts.parts", lambda checkpoint: iter(()))
    read = {}
    for kind in (Kind.F16, Kind.Q8_0):
        file = files.write(
            checkpoints.tiny_llama(tmp_path / kind.name, hidden_size=64, intermediate_size=128), tmp_path / f"{kind.name}.gguf", kind
        )
        read[kind] = doctor._model("m", loader.inspect(file, "bfloat16"), Console(quiet=True))["bytes_per_token"]
    assert 0.5 < read[Kind.Q8_0] / read[Kind.F16] < 0.6, "8 bits and a scale for 32 numbers, instead of 16"
