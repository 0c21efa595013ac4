"""Storing and loading compiled kernels, without a GPU. Compiling takes seconds, so the tests share one folder of kernels."""

import errno
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

from moe_backend_plugin.kernels import compile as kernels  # noqa: E402  must not be imported where CuTe DSL is missing
from moe_backend_plugin.kernels.gdn_decode import Variant  # noqa: E402

FAMILY = "gdn_decode"
HOPPER, BLACKWELL, ULTRA = kernels.ARCHITECTURES
PLAIN, OTHER = Variant(), Variant(heads_per_group=4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with one kernel, compiled for every architecture."""
    folder = tmp_path_factory.mktemp("kernels") / "not" / "there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.CACHE_VARIABLE, str(folder))
        for architecture in kernels.ARCHITECTURES:
            kernels.store(FAMILY, PLAIN, architecture)
    return folder


@pytest.fixture
def cache(stored, tmp_path, monkeypatch):
    """A copy of that folder, and a process that has loaded nothing yet."""
    folder = shutil.copytree(stored, tmp_path / "cache")
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(kernels, "_loaded", {})
    return folder


@pytest.fixture
def compiled(monkeypatch):
    """What has been compiled since the test began."""
    calls = []
    real = kernels.compile_for
    monkeypatch.setattr(kernels, "compile_for", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


def test_every_architecture_compiles_here(stored):
    files = sorted(path.name for path in stored.iterdir())
    assert [name.split("-")[1] for name in files] == [BLACKWELL, ULTRA, HOPPER] and {name.split("-")[0] for name in files} == {FAMILY}
    assert all((stored / name).read_bytes().startswith(b"\x7fELF") for name in files)


def test_another_process_loads_without_the_compiler(cache):
    script = f"""
        import cutlass.cute
        from moe_backend_plugin.kernels import compile as kernels
        from moe_backend_plugin.kernels.gdn_decode import Variant

        def unavailable(*args, **kwargs):
            raise AssertionError("the compiler was asked")

        cutlass.cute.compile = kernels.compile_for = unavailable
        for architecture in kernels.ARCHITECTURES:
            kernel = kernels.load("{FAMILY}", Variant(), architecture)
            assert callable(kernel) and kernels.load("{FAMILY}", Variant(), architecture) is kernel
        assert kernels.prepare("{FAMILY}", [Variant()] * 2, "{HOPPER}") == 0
    """
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.o")}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {path: path.stat().st_mtime_ns for path in cache.glob("*.o")}


@pytest.mark.parametrize("kept", [0, 100, -100], ids=["empty", "a few bytes", "the end is missing"])
def test_a_damaged_file_is_compiled_again(cache, caplog, monkeypatch, kept):
    """The compiler's part is played by the good file: this is about what happens around it."""
    file = kernels.object_file(FAMILY, PLAIN, HOPPER)
    good = file.read_bytes()
    file.write_bytes(good[:kept])
    asked = []

    class Compiled:
        def export_to_c(self, object_file_path, function_name):
            assert function_name == kernels.ENTRY
            Path(object_file_path).write_bytes(good)

    monkeypatch.setattr(kernels, "compile_for", lambda *args, **kwargs: asked.append(args) or Compiled())
    with caplog.at_level(logging.WARNING, logger="moe_backend_plugin"):
        assert callable(kernels.load(FAMILY, PLAIN, HOPPER))
    assert asked == [(FAMILY, PLAIN, HOPPER)] and file.read_bytes() == good
    (record,) = caplog.records
    assert str(file) in record.message and "compiling it again" in record.message


def test_what_is_compiled_here_can_be_called_and_is_stored(cache, compiled, caplog):
    file = kernels.object_file(FAMILY, PLAIN, HOPPER)
    file.write_bytes(b"garbage")
    assert kernels.prepare(FAMILY, [PLAIN], HOPPER) == 0  # it was there, though it was not good
    assert compiled == [(FAMILY, PLAIN, HOPPER)] and file.read_bytes().startswith(b"\x7fELF") and "garbage" not in caplog.text
    assert kernels.load(FAMILY, PLAIN, HOPPER) is kernels.load(FAMILY, PLAIN, HOPPER)
    assert len(compiled) == 1 and not list(cache.glob("*.part"))


def test_a_folder_that_cannot_be_written_warns_and_gives_a_kernel(tmp_path, monkeypatch, caplog):
    """A file stands where the folder should be: that stops the superuser too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(kernels, "_loaded", {})
    with caplog.at_level(logging.WARNING, logger="moe_backend_plugin"):
        kernel = kernels.load(FAMILY, PLAIN, HOPPER)
    assert callable(kernel) and kernels.load(FAMILY, PLAIN, HOPPER) is kernel
    assert "cannot be written" in caplog.text and str(tmp_path / "file") in caplog.text


def _store_together(folder, barrier):
    """In a process of its own: leave the compiler only when the other process does."""
    os.environ[kernels.CACHE_VARIABLE] = folder
    real = kernels.compile_for

    def compile_for(*args, **kwargs):
        result = real(*args, **kwargs)
        barrier.wait(240)
        return result

    kernels.compile_for = compile_for
    kernels.store(FAMILY, OTHER, HOPPER)


def test_two_processes_that_store_at_once(cache):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    before = set(cache.iterdir())
    processes = [context.Process(target=_store_together, args=(str(cache), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (file,) = set(cache.iterdir()) - before
    assert file.suffix == ".o" and callable(kernels._from_disk(file))


def test_a_failed_export_leaves_nothing(cache, monkeypatch):
    class Compiled:
        def export_to_c(self, object_file_path, function_name):
            Path(object_file_path).write_bytes(b"half")
            raise RuntimeError("no room")

    monkeypatch.setattr(kernels, "compile_for", lambda *args, **kwargs: Compiled())
    before = set(cache.iterdir())
    with pytest.raises(RuntimeError, match="no room"):
        kernels.store(FAMILY, OTHER, HOPPER)
    assert set(cache.iterdir()) == before


def test_the_name_changes_with_all_that_goes_in(cache, monkeypatch):
    def names():
        return [kernels.object_file(FAMILY, variant, arch) for variant in (PLAIN, OTHER) for arch in kernels.ARCHITECTURES]

    before = names()
    assert before == names() and before[0] == kernels.object_file(FAMILY, Variant(), HOPPER) and before[0].parent == cache
    monkeypatch.setattr(kernels, "source_hash", lambda family: "0" * 16)
    assert len({*before, *names()}) == 12


def test_the_source_hash_is_of_the_family(tmp_path, monkeypatch):
    folder = shutil.copytree(Path(kernels.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source, source_hash = folder / f"{FAMILY}.py", kernels.source_hash.__wrapped__
    here = source_hash(FAMILY)
    monkeypatch.setattr(kernels, "__file__", str(folder / "compile.py"))
    assert source_hash(FAMILY) == here
    source.write_text(source.read_text() + "\n")
    assert source_hash(FAMILY) != here


def test_without_locks_on_the_filesystem_kernels_are_prepared_all_the_same(cache, compiled, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(kernels.fcntl, "flock", flock)
    assert kernels.prepare(FAMILY, [PLAIN], HOPPER) == 0 and not compiled


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(tmp_path))
    assert kernels.cache_folder() == tmp_path
    kernels.use_cache_folder(str(tmp_path / "named"))
    assert kernels.cache_folder() == tmp_path / "named"
    kernels.use_cache_folder("~/kernels")
    assert kernels.cache_folder() == Path.home() / "kernels"
    kernels.use_cache_folder("")
    monkeypatch.delenv(kernels.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / "moe_backend_plugin" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernels.cache_folder() == Path.home() / ".cache" / "moe_backend_plugin" / "kernels"


@pytest.mark.parametrize("call", [kernels.compile_for, kernels.store, kernels.load])
def test_unknown_architectures_are_refused(cache, call):
    with pytest.raises(ValueError, match="architecture: found 'sm_80', allowed sm_90a, sm_100a, sm_103a"):
        call(FAMILY, PLAIN, "sm_80")
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("capability", "architecture", "refusals"),
    [
        ((9, 0), "sm_90a", {}),
        ((10, 0), "sm_100a", {("sm_90a",): "9.0"}),
        ((10, 3), "sm_103a", {("sm_90a",): "9.0"}),
        ((10, 1), None, {kernels.ARCHITECTURES: "9.0, 10.0 or 10.3", ("sm_90a",): "9.0"}),
        ((8, 9), None, {kernels.ARCHITECTURES: "9.0, 10.0 or 10.3", ("sm_90a",): "9.0"}),
    ],
)
def test_the_architecture_of_a_device(monkeypatch, capability, architecture, refusals):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    ask = kernels.device_architecture.__wrapped__
    assert {ask(3, a) for a in (kernels.ARCHITECTURES, ("sm_90a",)) if a not in refusals} <= {architecture}
    for allowed, text in refusals.items():
        with pytest.raises(RuntimeError) as error:
            ask(3, allowed)
        assert str(error.value) == f"device 3: compute capability {capability[0]}.{capability[1]}, allowed {text}"
