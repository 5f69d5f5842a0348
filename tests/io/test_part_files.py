"""Part files: a killed process leaves one, the next writer removes it; those of living processes stay."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mergetune.io import remove_parts, write_atomically, writing_atomically

WRITE = """
import sys, time
from pathlib import Path
from mergetune.io import writing_atomically
with writing_atomically(Path(sys.argv[1])) as stream:
    stream.write(b"x" * 100_000)
    stream.flush()
    print("writing", flush=True)
    time.sleep(600)
"""


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


@pytest.fixture
def writer(tmp_path):
    """Starts processes that write to a file and do not finish."""
    started = []

    def start(name: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", WRITE, tmp_path / name], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("then", ["same file", "another file", "remove_parts"])
def test_what_a_killed_process_leaves_is_removed_by_the_next(writer, tmp_path, by, then):
    process = writer("a[1].bin")
    process.send_signal(by)
    process.wait()
    assert len(parts(tmp_path)) == 1
    if then == "remove_parts":
        remove_parts(tmp_path, "a[1].bin")
    else:
        write_atomically(tmp_path / ("a[1].bin" if then == "same file" else "b"), b"new")
    assert not parts(tmp_path)


def test_a_living_process_keeps_its_part_file(writer, tmp_path):
    writer("a.bin")
    (kept,) = parts(tmp_path)
    write_atomically(tmp_path / "a.bin", b"mine")
    remove_parts(tmp_path, "a.bin")
    assert parts(tmp_path) == [kept] and (tmp_path / "a.bin").read_bytes() == b"mine"


def test_threads_that_write_one_file_do_not_mix(tmp_path):
    contents = [bytes([k]) * 200_000 for k in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_part_files_of_this_library_are_removed(tmp_path):
    others = [".movie.mp4.part", "movie.part", ".b.123.part", ".a.12-34.part", ".a.part"]
    for name in [*others, ".a.123.part", ".b.123-0123abcd.part"]:
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "a", b"")
    assert parts(tmp_path) == sorted(others)


def test_names_as_long_as_the_file_system_allows(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        write_atomically(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="disk"), writing_atomically(tmp_path / "a") as stream:
        stream.write(b"new")
        raise OSError(errno.ENOSPC, "disk full")
    assert (tmp_path / "a").read_bytes() == b"old" and not parts(tmp_path)


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="must be a file that can be written, got a folder.*folder"):
        write_atomically(tmp_path / "folder", b"")
    with pytest.raises(FileNotFoundError, match="missing"):
        write_atomically(tmp_path / "missing" / "a", b"")
    assert not os.path.exists(tmp_path / "missing")
