"""Each model is made once, appears whole or not at all, and is made again when damaged."""

import subprocess
import sys

import pytest
from filelock import FileLock

from antiphon.errors import ConfigError
from antiphon.workers.model_cache import cached_folder


class Maker:
    """Writes one file and counts how often."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, folder):
        self.num_calls += 1
        (folder / "weights").write_bytes(b"0123456789")


def test_made_once_then_found(tmp_path):
    make = Maker()
    folder = cached_folder(tmp_path, "model", make)
    assert cached_folder(tmp_path, "model", make) == folder == tmp_path / "model"
    assert (folder / "weights").read_bytes() == b"0123456789"
    assert make.num_calls == 1


def _truncate(folder):
    (folder / "weights").write_bytes(b"01234")


def _lose_file(folder):
    (folder / "weights").unlink()


def _lose_manifest(folder):
    (folder / "manifest.json").unlink()


def _break_manifest(folder):
    (folder / "manifest.json").write_text('{"weights"')


def _empty_manifest(folder):
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [_truncate, _lose_file, _lose_manifest, _break_manifest, _empty_manifest]
)
def test_a_damaged_folder_is_made_again(tmp_path, damage):
    make = Maker()
    folder = cached_folder(tmp_path, "model", make)
    damage(folder)
    assert cached_folder(tmp_path, "model", make) == folder
    assert (folder / "weights").read_bytes() == b"0123456789"
    assert make.num_calls == 2


def test_a_failed_make_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "weights").write_bytes(b"0")
        raise ConfigError("cannot")

    with pytest.raises(ConfigError, match="cannot"):
        cached_folder(tmp_path, "model", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_maker_left_is_cleared(tmp_path):
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "half").write_bytes(b"0")
    folder = cached_folder(tmp_path, "model", Maker())
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "weights"]
    assert not (tmp_path / "model.part").exists()


def test_processes_that_want_the_same_model_make_it_once(tmp_path):
    code = f"""
import os, pathlib, sys
from antiphon.workers.model_cache import cached_folder
root = pathlib.Path({str(tmp_path)!r})
def make(folder):
    (root / f"made-by-{{os.getpid()}}").touch()
    (folder / "weights").write_bytes(b"x" * 1_000_000)
sys.stdin.read(1)
folder = cached_folder(root / "cache", "model", make)
assert (folder / "weights").stat().st_size == 1_000_000
"""
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("made-by-*"))) == 1


def test_the_wait_for_another_process_is_bounded(tmp_path):
    with (
        FileLock(tmp_path / "model.lock"),
        pytest.raises(ConfigError, match="another process has been making it"),
    ):
        cached_folder(tmp_path, "model", Maker(), lock_timeout_seconds=0.05)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.model: the model cache cannot be written"):
        cached_folder(tmp_path / "file", "model", Maker())
