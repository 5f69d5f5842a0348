"""Locks: one process or thread writes a folder or file, the others are told who; a lock leaves nothing behind."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergetune.io import LOCK, locked, remove_parts, scratch_folder, write_atomically, writing_in, writing_to

HOLD = """
import sys, time
from pathlib import Path
from mergetune.io import scratch_folder, writing_in, writing_to
with {context}(Path(sys.argv[1])) as made:
    print(made, flush=True)
    time.sleep(600)
"""
PLACES = {"writing_in": writing_in, "writing_to": writing_to}


@pytest.fixture
def holder():
    """Starts processes that hold a place; the path that the process made is its first line."""
    started = []

    def start(context: str, place: Path) -> subprocess.Popen:
        code = HOLD.format(context=context)
        process = subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.made = Path(process.stdout.readline().strip())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", PLACES)
def test_the_second_process_is_told_the_place_the_first_one_and_the_way_on(holder, tmp_path, name):
    place = tmp_path / "out {0}"
    process = holder(name, place)
    kind, does = ("folder", "works in") if name == "writing_in" else ("file", "writes")
    said = f"another process (pid {process.pid}) {does} {place}: wait until it ends, then run the same command again, "
    with pytest.raises(RuntimeError) as caught, PLACES[name](place):
        pytest.fail("both hold the lock")
    assert str(caught.value) == f"{said}or choose another {kind}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with PLACES[name](place):  # the dead hold nothing
        pass
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith("lock")]


@pytest.mark.parametrize("name", PLACES)
def test_a_thread_may_lock_again_and_other_threads_may_not(tmp_path, name):
    place, hold = tmp_path / "out", PLACES[name]

    def other() -> None:
        with hold(place):
            pass

    with ThreadPoolExecutor() as threads, hold(place):
        with hold(place):
            pass
        with pytest.raises(RuntimeError, match="another thread of this process"):
            threads.submit(other).result()
    other()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_without_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing/a'$"), writing_to(tmp_path / "missing" / "a"):
        pytest.fail("there is no place for the lock")


def test_a_file_in_a_folder_that_is_locked_needs_no_lock(tmp_path):
    with writing_in(tmp_path), writing_to(tmp_path / "a"):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_who_waits_is_alone_although_the_file_of_the_lock_comes_and_goes(tmp_path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locked(tmp_path / "lock", busy="", wait=True):
                inside += 1
                most = max(most, inside)
                (tmp_path / "file").write_text("x")
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("name", PLACES)
def test_where_nothing_can_be_written_nothing_is_locked(tmp_path, monkeypatch, recwarn, name, code):
    def refuse(path, flags, *rest, **more):
        if os.fspath(path).endswith("lock"):
            raise OSError(code, os.strerror(code), path) if flags & os.O_CREAT else FileNotFoundError(path)
        return opened(path, flags, *rest, **more)

    opened = os.open
    monkeypatch.setattr("os.open", refuse)
    with PLACES[name](tmp_path / "out"):
        pass
    assert not recwarn.list


def test_the_lock_of_another_user_is_respected(holder, tmp_path, monkeypatch):
    process = holder("writing_in", tmp_path)

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *rest, **more)

    opened = os.open
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(RuntimeError, match=f"pid {process.pid}"), writing_in(tmp_path):
        pytest.fail("both hold the lock")


def test_an_empty_file_is_a_lock_all_the_same(tmp_path):
    (tmp_path / LOCK).touch()
    with writing_in(tmp_path):
        (tmp_path / LOCK).write_bytes(b"")
        with ThreadPoolExecutor() as threads, pytest.raises(RuntimeError, match="^another process works in"):
            threads.submit(writing_in(tmp_path).__enter__).result()


FOREIGN = {
    "a link": lambda lock, file: lock.symlink_to(file),
    "a file with a second name": lambda lock, file: lock.hardlink_to(file),
    "a folder": lambda lock, file: lock.mkdir(),
    "no regular file": lambda lock, file: os.mkfifo(lock),
    **{f"other content, {len(content)}": lambda lock, _, content=content: lock.write_bytes(content)
       for content in (b"12", b"x" * 5000, b"12 host\n34", b"\xff\x00 \n", b"my own notes\n")},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_lock_is_refused_and_stays_as_it_is(tmp_path, kind):
    theirs = tmp_path / "theirs"
    theirs.write_text("99999999 nowhere\n")  # a hard link to it looks like a lock
    for place, context in ((tmp_path / ".out.lock", writing_to), (tmp_path / LOCK, writing_in)):
        FOREIGN[kind](place, theirs)
        before = place.lstat()
        at = tmp_path / "out" if context is writing_to else tmp_path
        with (
            pytest.raises(ValueError, match=f"lock of mergetune, got {kind.partition(',')[0]}.*rename it"),
            context(at),
        ):
            pytest.fail("a file that is no lock was used")
        after = place.lstat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        assert theirs.read_text() == "99999999 nowhere\n"


def test_other_content_that_is_written_meanwhile_stays(tmp_path):
    with writing_to(tmp_path / "out"):
        (tmp_path / ".out.lock").write_text("my own notes")
    assert (tmp_path / ".out.lock").read_text() == "my own notes"


def test_locks_of_the_dead_are_removed_and_all_else_stays(holder, tmp_path):
    dead, living = (holder("writing_to", tmp_path / name) for name in ("dead", "living"))
    dead.kill()
    dead.wait()
    kept = {".living.lock"}
    for name, content in ((".empty.lock", ""), (".theirs.lock", "locked"), (".far.lock", f"{dead.pid} elsewhere\n")):
        (tmp_path / name).write_text(content)
        kept.add(name)
    (tmp_path / ".fifo.lock").symlink_to(tmp_path / ".dead.lock")
    before = {path.name for path in tmp_path.iterdir()}
    assert ".dead.lock" in before
    with writing_to(tmp_path / "new"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == kept | {".fifo.lock"} and living.poll() is None


# -- scratch folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["a scratch folder", "the file", "remove_parts"])
def test_what_a_killed_process_leaves_of_a_scratch_folder_is_removed_by_the_next(holder, tmp_path, then):
    file = tmp_path / "model.onnx"
    process = holder("scratch_folder", file)
    (process.made / "below").mkdir()
    (process.made / "below" / "weights").write_bytes(b"half")
    (process.made / "link").symlink_to(tmp_path)
    act = {
        "a scratch folder": lambda: scratch_folder(file).__enter__(),
        "the file": lambda: write_atomically(file, b""),
    }
    remove_parts(tmp_path, file.name)
    assert process.made.is_dir()  # the living keep theirs
    process.kill()
    process.wait()
    act.get(then, lambda: remove_parts(tmp_path, file.name))()
    assert not process.made.exists() and tmp_path.is_dir()


def test_folders_of_others_stay(tmp_path):
    ours = tmp_path / ".a.123-0123abcd.part"
    others = [tmp_path / name for name in (".b.123-0123abcd.part", ".c.part", ".d.123.part", "e.123-0123abcd.part")]
    for folder in (ours, *others[1:]):
        folder.mkdir(0o700)
    others[0].mkdir(0o755)  # not as this library makes its own
    (tmp_path / ".f.123-0123abcd.part").symlink_to(others[1])
    remove_parts(tmp_path, "a")
    assert not ours.exists() and all(folder.is_dir() for folder in others)
    assert (tmp_path / ".f.123-0123abcd.part").is_symlink()


def test_a_scratch_folder_is_private_and_goes_with_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyError), scratch_folder() as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        (folder / "a").mkdir()
        raise KeyError
    assert not list(tmp_path.iterdir())
