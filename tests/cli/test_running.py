"""How commands end: stopped by Ctrl-C or SIGTERM, with a reader that is gone, and well, with time and next step."""

import os
import signal
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import typer
from miniature import write_miniature
from typer.testing import CliRunner

from mergetune.cli.running import Commands, duration, suggest
from mergetune.cli.shared import print_json

STOPPED = "stopped; run the same command again to continue"

# Encodes images with two worker processes, and says when the work has begun.
CACHE = """
import sys, time
import mergetune as mt
from mergetune.cli import app

def encode_image(self, pixels):
    print("encoding", flush=True)
    time.sleep(60)

mt.FrozenClip.encode_image = encode_image
app(sys.argv[1:])
"""

# A pool of processes as `mergetune reproduce --processes 2` has it.
POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import typer

from mergetune.cli.running import Commands
from mergetune.io import end_workers, unaware_of_interrupts

app = typer.Typer(cls=Commands)

def work(number):
    print("working", flush=True)
    time.sleep(60)

@app.callback()
def main(): ...

@app.command()
def go():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        try:
            with unaware_of_interrupts():
                runs = [pool.submit(work, number) for number in range(6)]
            for run in runs:
                run.result()
        except BaseException:
            end_workers()
            raise

if __name__ == "__main__":
    app(["go"])
"""


def interrupt(arguments: list[str], number: signal.Signals = signal.SIGINT, *, everyone: bool = True, **environment):
    """Starts a program, waits for its first line, and signals its processes. Returns exit code, stdout and stderr."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, **environment},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        (os.killpg if everyone else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
    return process.returncode, first + out, err


@pytest.fixture(scope="module")
def caching(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_miniature(folder, "eurosat", images_per_class=8, classes=2, size=48)
    (folder / "cache.py").write_text(CACHE)
    with as_file(files("mergetune") / "assets" / "icon-clip") as model:
        yield [
            str(folder / "cache.py"), "cache", "EuroSAT", "--root", str(folder), "--out", str(folder / "cache"),
            "--backbone", f"local-dir:{model}", "--workers", "2", "--batch-size", "1",
        ]  # fmt: skip


def test_ctrl_c_is_one_line_also_with_worker_processes(caching):
    code, _, err = interrupt(caching)
    assert (code, err.strip()) == (130, STOPPED)
    code, _, err = interrupt(caching, RANK="1")
    assert (code, err.strip()) == (130, "")  # under torchrun, rank 0 says it


def test_sigterm_ends_a_command_in_the_same_way(caching):
    code, _, err = interrupt(caching, signal.SIGTERM, everyone=False)
    assert (code, err.strip()) == (143, STOPPED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pool_of_processes_ends_with_the_command(tmp_path, number):
    (tmp_path / "pool.py").write_text(POOL)
    code, _, err = interrupt([str(tmp_path / "pool.py")], number, everyone=number == signal.SIGINT)
    assert (code, err.strip()) == (128 + number, STOPPED)


@pytest.mark.parametrize("arguments", ["merge --list", "merge --list --json", "--help"])
def test_a_reader_that_is_gone_ends_a_command_in_silence(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "mergetune", *arguments.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) != 0


def ended(*words: object, as_json: bool = False, seconds: float = 0.0, code: int | None = None):
    """What a command prints to stderr at its end."""
    app, now = typer.Typer(cls=Commands), iter([0.0, seconds])

    @app.callback()
    def main(): ...

    @app.command()
    def work():
        if words:
            suggest(*words)
        if as_json:
            print_json({})
        if code is not None:
            raise typer.Exit(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergetune.cli.running.time.perf_counter", lambda: next(now))
        return CliRunner().invoke(app, ["work"]).stderr


def test_the_end_tells_the_time_and_the_next_step():
    solution = "eval", "--solution", Path("my runs"), ("--backbone", "RN50"), ("--pretrained", None)
    assert ended(*solution, seconds=12.4) == "Took 12 s. Next: mergetune eval --solution 'my runs' --backbone RN50\n"
    assert ended(seconds=125) == "Took 2 min 5 s.\n"
    assert ended("eval", seconds=0.5) == "Next: mergetune eval\n"
    assert ended(seconds=0.5) == ended("eval", seconds=12, as_json=True) == ""
    assert ended(seconds=3, code=0) == "Took 3 s.\n" and ended("x", seconds=3, code=2) == ""


def test_times_are_written_for_people():
    assert [duration(s) for s in (1.6, 59.4, 60, 3599)] == ["2 s", "59 s", "1 min 0 s", "59 min 59 s"]
    assert duration(7260) == "2 h 1 min"
