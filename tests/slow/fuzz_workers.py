"""Readers of small files tried on damaged copies, in forked workers with limits of time and memory per case."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path

import torch
from fuzz_damage import damages_of, flip_bits

SECONDS = 10.0  # longest processor time of a case
PATIENCE = 120.0  # longest time of a case by the clock: a reader may wait for something; the machine may be shared
MEMORY = 256 << 20  # most bytes of a case: tensors may have 64 MiB, and twice that on the way
ADDRESSES = 3 << 30  # most addresses of a worker beyond those at its start: what is asked for, used or not
LONGEST = 800  # characters of a message, beside four times the path of the folder
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # categories of characters that no message has
DOCUMENTED = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
FOREIGN = (
    "Traceback", "weights_only", "pydantic", "input_value", "Input should", "Expecting value", "MemoryError",
    "allocate memory", "std::", "site-packages", "docs/stable", "0x7f", "Error(",
)  # fmt: skip


CLOCK = struct.Struct("qdd")  # number of the case of a worker, time and processor time at its start


@dataclass(frozen=True)
class Reader:
    """A public reader, and a small valid input for it.

    Attributes:
        name: name in messages, and for ``FUZZ_ONLY``.
        make: writes the input into an empty folder.
        files: patterns of the files that are damaged.
        read: reads the input of a folder.
        mend: brings the checksums of a folder up to date, so that the damage reaches the readers behind them.
        share: how often the reader is tried; slow readers have less.
        also: further exceptions that the reader documents.
        refuses: whether some damage is an error. `runs` lists damaged runs with their errors, and any line is a path.
    """

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    mend: Callable[[Path], object] | None = None
    share: int = 4
    also: tuple[type[Exception], ...] = ()
    refuses: bool = True


@dataclass
class Found:
    """What a campaign found.

    Attributes:
        outcomes: (reader, "read", "refused" or "failed") -> number of cases.
        failures: one text per failed case, which names the case.
        seconds: how long the campaign took.
    """

    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.outcomes.total()


def prepare(readers: Sequence[Reader], root: Path) -> None:
    """Writes the valid inputs below ``root`` and reads each of them."""
    for reader in readers:
        folder = root / reader.name
        folder.mkdir(parents=True)
        reader.make(folder)
        work = shutil.copytree(folder, root / "work" / reader.name)
        reader.read(work)
        shutil.rmtree(work)


# -- one case ----------------------------------------------------------------------------------------------------------


def spoil(reader: Reader, seed: str, work: Path) -> tuple[str, str]:
    """Damages one file of a copy of the input; returns what was done, and the name of the file."""
    dice = random.Random(seed)
    file = dice.choice(sorted({file for pattern in reader.files for file in work.glob(pattern)}))
    content = file.read_bytes()
    damage = dice.choice(damages_of(content))
    try:
        damaged = damage(content, dice)
    except Exception:  # not every damage fits every content
        damage, damaged = flip_bits, flip_bits(content, dice)
    file.write_bytes(damaged)
    if reader.mend is not None and dice.random() < 0.8:
        reader.mend(work)
    return f"{damage.__name__} of {file.relative_to(work)}", file.name


def fault_of(error: BaseException, also: tuple[type[Exception], ...], work: Path, file: str) -> str | None:
    """Why an exception is not the documented sentence; None if it is."""
    said = str(error)
    short = said.replace(str(work), "")
    ours = type(error).__module__.startswith("mergetune.") and isinstance(error, DOCUMENTED)
    if not ours and type(error) not in (*DOCUMENTED, *also):
        where = traceback.extract_tb(error.__traceback__)[-3:]
        return f"{type(error).__name__}: {said[:300]!r} from {[f'{Path(f.filename).name}:{f.lineno}' for f in where]}"
    if len(said) > LONGEST + 4 * len(str(work)):
        return f"a message of {len(short):,} characters: {short[:200]!r}...{short[-100:]!r}"
    if any(unicodedata.category(character) in CONTROL for character in said):
        return f"a message with control characters: {short!r}"
    if str(work) not in said and file not in said:
        return f"a message without its file: {short!r}"
    if found := [word for word in FOREIGN if word in said]:
        return f"a message that is not ours ({found[0]}): {short!r}"
    return None


def judge(reader: Reader, work: Path, file: str) -> tuple[str, str]:
    """The outcome of reading the damaged input, and what is wrong with it."""
    before, peak = _resident(), _peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(work)
        outcome, wrong = "read", None
    except Exception as error:
        outcome, wrong = "refused", fault_of(error, reader.also, work, file)
    if wrong is None and peak < _peak() > before + MEMORY:
        wrong = f"{_peak() - before:,} bytes of memory"
    return (outcome, "") if wrong is None else ("failed", wrong)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_case(readers: Sequence[Reader], root: Path, seed: int, number: int, work: Path) -> tuple[Reader, str, str]:
    """Runs the case of a number: reader, outcome and what is wrong."""
    reader = schedule(readers)[number % len(schedule(readers))]
    shutil.rmtree(work, ignore_errors=True)
    folder = shutil.copytree(root / reader.name, work / reader.name)
    try:
        done, file = spoil(reader, f"{seed} {number}", folder)
        outcome, wrong = judge(reader, folder, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return reader, outcome, wrong and f"case {number}: {reader.name}, {done}: {wrong}"


def schedule(readers: Sequence[Reader]) -> list[Reader]:
    """The readers in the order of the cases, each as often as its share says."""
    return [reader for turn in range(max(r.share for r in readers)) for reader in readers if turn < reader.share]


# -- workers -----------------------------------------------------------------------------------------------------------


def campaign(
    readers: Sequence[Reader], root: Path, *, seed: int, cases: Sequence[int], workers: int, patience: int = 25
) -> Found:
    """Runs cases in forked workers. A case that hangs or ends its worker is a failure, and a new worker goes on.

    Args:
        readers: all readers, prepared below ``root``.
        root: folder of the valid inputs, and of the workers' copies.
        seed: seed of the damages.
        cases: numbers of the cases.
        workers: number of processes.
        patience: failures after which the campaign ends.
    """
    found, began = Found(), time.monotonic()
    clocks = mmap(-1, CLOCK.size * workers)
    queues = [list(cases[k::workers])[::-1] for k in range(workers)]
    running: dict[int, int] = {}
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared with the workers
    try:
        while running or (any(queues) and len(found.failures) < patience):
            for k in range(workers):
                if k not in running and queues[k] and len(found.failures) < patience:
                    CLOCK.pack_into(clocks, CLOCK.size * k, -1, time.monotonic(), 0.0)
                    running[k] = _fork(readers, root, seed, queues[k], clocks, k)
            time.sleep(0.05)
            for k, process in list(running.items()):
                number, since, used = CLOCK.unpack_from(clocks, CLOCK.size * k)
                ended, status = os.waitpid(process, os.WNOHANG)
                waited = time.monotonic() - since
                late = not ended and waited > SECONDS and (waited > PATIENCE or _processor(process) - used > SECONDS)
                if late:  # the worker may have been writing its clock
                    time.sleep(0.01)
                    late = CLOCK.unpack_from(clocks, CLOCK.size * k) == (number, since, used)
                if late:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                if ended or late or len(found.failures) >= patience:
                    if not (ended or late):
                        os.kill(process, signal.SIGKILL)
                        os.waitpid(process, 0)
                    del running[k]
                    done = _collect(root / f"outcomes-{k}", found)
                    queues[k] = [n for n in queues[k] if n not in done]
                    if late or (ended and status):
                        queues[k] = [n for n in queues[k] if n != number]
                        name = schedule(readers)[number % len(schedule(readers))].name
                        why = (
                            f"more than {SECONDS:.0f} s of processor time, or {PATIENCE:.0f} s"
                            if late
                            else f"its process ended with status {status}"
                        )
                        found.outcomes[name, "failed"] += 1
                        found.failures.append(f"case {number}: {name}: {why}")
    finally:
        for process in running.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        gc.unfreeze()
    found.seconds = time.monotonic() - began
    return found


def _processor(process: int) -> float:
    """Processor time of a process in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _collect(file: Path, found: Found) -> set[int]:
    done = set()
    for line in file.read_text().splitlines() if file.exists() else ():
        number, name, outcome, wrong = json.loads(line)
        done.add(number)
        found.outcomes[name, outcome] += 1
        if wrong:
            found.failures.append(wrong)
    file.unlink(missing_ok=True)
    return done


def _fork(readers: Sequence[Reader], root: Path, seed: int, queue: list[int], clocks: mmap, k: int) -> int:
    process = os.fork()
    if process:
        return process
    try:
        _work(readers, root, seed, queue, clocks, k)
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def _work(readers: Sequence[Reader], root: Path, seed: int, queue: list[int], clocks: mmap, k: int) -> None:
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)  # libraries in C print warnings about damaged pictures
    for stream in (1, 2):
        os.dup2(quiet, stream)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (root / f"outcomes-{k}").open("w", buffering=1) as outcomes:
        for number in reversed(queue):
            CLOCK.pack_into(clocks, CLOCK.size * k, number, time.monotonic(), time.process_time())
            reader, outcome, wrong = run_case(readers, root, seed, number, root / f"work-{k}")
            outcomes.write(f"{json.dumps([number, reader.name, outcome, wrong])}\n")
