"""Commands that are killed at random moments end with the same bits when they are run again, and leave nothing behind.

Every command runs as a process of its own on tiny inputs and the embedded CLIP. Half of the kills come at a random time
between start and end; half come just before a random change of a file, between two renames for example, where a
random time would hardly ever fall. `python tests/slow/test_kills.py` prints the number of kills per command.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import write_miniature
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

SEED = os.environ.get("MERGETUNE_TEST_SEED", "0")
LEAST = 12  # kills per command that must hit a running process
REACH = (1.0, 0.6, 0.4)  # kills in one folder, and the share of a whole run in which each falls: later runs do less
ROUNDS = 10  # most folders per command
CLASSES = ("anchor", "apple", "bell", "book")
MODEL = ["--backbone", "icon-clip"]
TIMES = ("timings", "seconds", "milliseconds", "milliseconds_per_step", "started")  # fields that hold times

COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "ties", "{in}/a", "{in}/b", "--base", "{in}/base", "--out", "out"],
    "merge to a file": ["merge", "task_arithmetic", "{in}/a/model.safetensors", "--base", "{in}/base/model.safetensors",
                        "--out", "out.safetensors"],
    "compare": ["compare", "{in}/cache", *MODEL, "--out", "out", "--expert", "coop:1", "--seeds", "1", "--shots", "2",
                "--lam", "8", "--tau", "0.3", "--tune", "epochs=2", "--fit", "epochs=2"],
    "fit": ["fit", "{in}/images", *MODEL, "--out", "out", "--shots", "2", "--epochs", "2"],
    "reproduce": ["reproduce", "base-to-novel", "--root", "{in}/data", "--out", "out", *MODEL, "--datasets",
                  "oxford_pets", "--seeds", "1", "--shots", "2", "--epochs", "2"],
    "tune": ["tune", "--cache", "{in}/cache/train", *MODEL, "--out", "out", "--shots", "4", "--epochs", "6"],
    "cache": ["cache", "{in}/images", "--out", "out", *MODEL, "--shard-size", "8", "--batch-size", "4"],
}  # fmt: skip


class Zygote:
    """The process of ``zygote.py``."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], folder: Path, *, die_at: int | None = None) -> int:
        (folder / "tmp").mkdir(exist_ok=True)
        output = str(output_of(folder))
        return self.ask(do="start", arguments=arguments, folder=str(folder), output=output, die_at=die_at)["pid"]

    def end(self, pid: int, *, after: float | None = None) -> dict[str, Any]:
        return self.ask(do="end", pid=pid, after=after)

    def run(self, arguments: list[str], folder: Path) -> dict[str, Any]:
        """Runs a command to its end, which must be a good one."""
        found = self.end(self.start(arguments, folder))
        assert found["code"] == 0, said_in(folder)
        return found


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="module")
def inputs(zygote, tmp_path_factory) -> Path:
    """Images of four classes and their caches, three models, and a miniature benchmark."""
    folder = tmp_path_factory.mktemp("inputs")
    with as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        for kind in ("train", "test"):
            for name in CLASSES:
                here = [n for n in content.namelist() if n.split("/")[:2] == [kind, name] and n.endswith(".png")]
                content.extractall(folder / "images", sorted(here)[:8])
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        weights = {f"layer.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(6)}
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"hidden": 64}))
    write_miniature(folder / "data", "oxford_pets", images_per_class=8, classes=4, size=16)
    zygote.run(["cache", str(folder / "images"), "--out", str(folder / "cache"), *MODEL], folder)
    return folder


@pytest.fixture(scope="module")
def whole(zygote, inputs, tmp_path_factory):
    """Function of a command's name: what its unkilled run left, its seconds and its number of changes of files."""
    known: dict[str, tuple[dict[str, Any], float, int]] = {}

    def found(name: str) -> tuple[dict[str, Any], float, int]:
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            took = zygote.run(arguments(name, inputs), folder)
            known[name] = contents(folder), took["seconds"], took["changes"]
        return known[name]

    return found


def output_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.txt")


def said_in(folder: Path) -> str:
    """What the last command in a folder printed."""
    return output_of(folder).read_text()


def arguments(name: str, inputs: Path) -> list[str]:
    return [word.replace("{in}", str(inputs)) for word in COMMANDS[name]]


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder, hidden or not: path -> content without recorded times; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else content(path)
        for path in sorted(folder.rglob("*"))
    }


def content(path: Path) -> Any:
    if path.name == "checked.json":  # size, times and inode of a cache's file
        return sorted(json.loads(path.read_text()))
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".md":  # the last column but one holds seconds
        return [line.split("|")[:-3] + line.split("|")[-2:] for line in path.read_text().splitlines()]
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(inner) for name, inner in value.items() if name not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sorted(found) == sorted(wanted)
    assert not [path for path in wanted if found[path] != wanted[path]]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_commands_end_with_the_same_bits_and_leave_nothing_behind(zygote, inputs, whole, tmp_path, name):
    wanted, seconds, changes = whole(name)
    draw, hits, rounds = random.Random(f"{name} {SEED}"), 0, 0
    while hits < LEAST and rounds < ROUNDS:
        folder = tmp_path / str(rounds)
        folder.mkdir()
        for number, reach in enumerate(REACH):
            moment, at_change = reach * draw.random(), (rounds + number) % 2 == 0
            die_at = 1 + int(moment * changes) if at_change else None
            pid = zygote.start(arguments(name, inputs), folder, die_at=die_at)
            ended = zygote.end(pid, after=None if at_change else moment * seconds)
            assert ended["signal"] == signal.SIGKILL or ended["code"] == 0, said_in(folder)
            hits += ended["signal"] == signal.SIGKILL
        zygote.run(arguments(name, inputs), folder)
        assert_same(contents(folder), wanted)
        shutil.rmtree(folder)
        rounds += 1
    print(f"{name}: {hits} kills; {seconds:.1f} s and {changes} changes of files per run")
    assert hits >= LEAST


@pytest.mark.parametrize("name", COMMANDS)
def test_of_two_processes_at_once_one_is_refused_and_nothing_is_lost(zygote, inputs, whole, tmp_path, name):
    wanted = whole(name)[0]
    folder = tmp_path / "work"
    folder.mkdir()
    first = zygote.start(arguments(name, inputs), folder)
    lock = stopped_with_lock(first, folder)
    place = lock.parent if lock.name == ".mergetune.lock" else lock.with_name(lock.name[1 : -len(".lock")])
    second = zygote.end(zygote.start(arguments(name, inputs), folder))
    said = " ".join(said_in(folder).split())
    os.kill(first, signal.SIGCONT)
    ended = zygote.end(first)
    assert second["code"] not in (0, None), said
    assert re.search(
        rf"another process \(pid {first}\) (works in|writes) {place.relative_to(folder)}: wait until", said
    )
    assert ended["code"] == 0
    assert_same(contents(folder), wanted)


def stopped_with_lock(pid: int, folder: Path) -> Path:
    """Stops a process that holds the lock of a folder or file, but not the one with which it chooses its folder."""
    while True:
        for lock in folder.rglob(".*.lock"):
            if lock.name == ".runs.lock" or not lock.name.startswith("."):
                continue
            os.kill(pid, signal.SIGSTOP)
            with suppress(FileNotFoundError):
                choosing = any(path.name == ".runs.lock" for path in folder.rglob(".runs.lock"))
                if not choosing and lock.read_text().startswith(f"{pid} "):
                    return lock
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-m", "slow", "-s", "-q", "-n", "0"]))
