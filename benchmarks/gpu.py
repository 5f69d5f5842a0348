"""Checks a GPU in two runs of at most 280 seconds each: correctness (parity) and speed.

    python benchmarks/gpu.py --stage parity --out results     # build, doctor, tests, one time per op, compute-sanitizer
    python benchmarks/gpu.py --stage speed --out results      # loss, text tower, steps, whole runs, images

Every part is a separate process with a time limit; later parts run even if it fails or hangs. Nothing is written into
the checkout. Without a CUDA device, or with ``--dry-run``, small cases run on the CPU and the same files are written.
This file uses only Python's standard library, so that it can report missing packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bounded import FAILED, PASSED, UNSUPPORTED, Outcome, Part, adopt_orphans, last, run_part
from gpu_work import FOLDERS, tool
from records import read_tests
from report import BARS, cell, measurements, parts

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels",
           "mergetune")  # fmt: skip
LIMIT, TO_REPORT = 280.0, 10.0  # seconds of a stage; of these, seconds reserved for the report at the end
KERNEL_CALLS = ("lmc_loss, triton", "lmc_loss, triton, atomic", "prefix_attention, triton", "path_cross_entropy, cuda")
DRY_TESTS = "test_the_rows or test_the_check or (test_the_attention and float32) or test_the_atomic"


@dataclass
class Stage:
    """One run of this program: its folders, its deadline and the outcomes of its parts.

    Attributes:
        name: "parity" or "speed".
        out: folder of the three result files.
        work: folder of all other files; the second stage uses the build of the first stage in this folder.
        deadline: end of the stage on the clock of ``time.monotonic()``.
        dry: whether small cases run on the CPU.
        machine: facts from the part "machine".
        outcomes: outcomes of the finished parts.
    """

    name: str
    out: Path
    work: Path
    deadline: float
    dry: bool
    machine: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def site(self) -> Path:
        return self.work / "site"

    def run(self, part: Part) -> Outcome:
        print(f"{part.name} ...", flush=True)
        part = replace(part, env={**environment_of(self), **part.env})
        outcome = run_part(part, self.work / self.name, self.deadline)
        self.outcomes.append(outcome)
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.detail}", flush=True)
        self.write()
        return outcome

    def note(self, name: str, status: str, detail: str) -> None:
        self.outcomes.append(Outcome(name, status, 0.0, detail, {}, ""))

    def write(self) -> None:
        """Writes the result files. This happens after every part, so an interrupted run keeps its results."""
        infos = [info for o in self.outcomes for info in o.facts.get("benchmarks", ())]
        what = [{**asdict(o), "facts": {k: v for k, v in o.facts.items() if k != "benchmarks"}} for o in self.outcomes]
        results = {
            "stage": self.name,
            "dry_run": self.dry,
            "datetime": self.machine.get("datetime", ""),
            "machine_info": self.machine,
            "parts": what,
            "benchmarks": [{"extra_info": info, "fullname": ""} for info in infos],
        }
        replace_file(self.out / f"{self.name}.json", json.dumps(results, indent=1) + "\n")
        replace_file(self.out / f"{self.name}.md", markdown(results))
        folders = sorted((self.work / self.name).glob("*/"), key=lambda path: path.stat().st_mtime)
        logs = [f"== {f.name}/{n}\n{text}" for f in folders for n in ("out", "err") if (text := last(f / n, 100_000))]
        replace_file(self.out / f"{self.name}.log", "\n".join(logs) + "\n")


def replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def markdown(results: dict[str, Any]) -> str:
    """The results of a stage as Markdown: machine, parts, failures, measurements."""
    machine = results["machine_info"]
    cpu = machine.get("cpu", {})
    named = {"torch": machine.get("torch"), "triton": machine.get("triton"), "Python": machine.get("python_version")}
    versions = [f"{name} {value}" for name, value in named.items() if value]
    who = "; ".join(
        [machine.get("gpu") or "no CUDA device", f"{cpu.get('brand_raw')}, {cpu.get('count')} CPUs", *versions]
    )
    dry = "**Dry run on a CPU: no figure below is of a GPU.**\n\n" if results["dry_run"] else ""
    text = f"# {results['stage']}, {results['datetime'][:10]}\n\n{dry}{who}.\n\n{parts(results['parts'])}\n"
    for part in results["parts"]:
        failures = part["facts"].get("failures") or {}
        text += "".join(f"\n- `{test}`: {cell(why)}" for test, why in list(failures.items())[:40])
        text += "".join(f"\n- never ended: `{test}`" for test in part["facts"].get("never ended") or ())
        for line in part["facts"].get("ops") or ():
            text += f"\n- {line['op']}: " + (f"{line['ms']:.3g} ms" if "ms" in line else cell(line["error"]))
    infos = [bench["extra_info"] for bench in results["benchmarks"]]
    titles = {info["title"] for info in infos}
    text += f"\n\n{measurements(infos, bars=[bar for bar in BARS if bar.title in titles])}\n" if infos else ""
    counted = [info for info in infos if (info.get("launches") or {}).get("ours") is not None]
    if counted:
        text += "\nKernels launched per call:\n"
    for info in counted:
        text += f"\n- {info['title']}: " + ", ".join(f"{name} {count}" for name, count in info["launches"].items())
    return text + "\n"


# -- shared by all parts ----------------------------------------------------------------------------------------------


def environment_of(stage: Stage) -> dict[str, str]:
    """Environment of the parts: the stage's build first on the path, caches in the work folder, no network."""
    caches = stage.work / "caches"
    folders = [str(stage.site), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), *FOLDERS]
    return {
        "PYTHONPATH": os.pathsep.join(folders),
        "PATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",  # the checkout's mergetune has no native core and must not hide the built package
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "XDG_CACHE_HOME": str(caches),
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "TRITON_INTERPRET": "1" if stage.dry else "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(1 if stage.dry else min(8, os.cpu_count() or 1)),
        **({"MERGETUNE_BENCH_DRY": "1"} if stage.dry else {}),
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def last_json(folder: Path) -> dict[str, Any]:
    """The JSON object at the end of a command's output."""
    text = (folder / "out").read_text(errors="replace")
    for begin in (0, *(m.start() for m in re.finditer(r"^\{", text, re.M))):
        try:
            found = json.loads(text[begin:])
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise ValueError("no JSON object was printed")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


# -- parts of both stages ---------------------------------------------------------------------------------------------


def look(stage: Stage, asked_dry: bool) -> None:
    """Runs the part "machine"; without a CUDA device the stage becomes a dry run, and a message says so."""
    outcome = stage.run(Part("machine", python(str(BENCHMARKS / "gpu_work.py"), "machine"), 60, last_json))
    stage.machine = outcome.facts
    if not outcome.facts.get("gpu") and not asked_dry:
        print("No CUDA device: a dry run on the CPU.", flush=True)
    stage.dry = asked_dry or not outcome.facts.get("gpu")
    stage.machine["threads"] = int(environment_of(stage)["OMP_NUM_THREADS"])
    stage.write()


def install(stage: Stage, wheels: Path) -> None:
    """Installs the given wheels and builds mergetune for this GPU, unless an earlier stage built the same sources."""
    stamp = stage.work / "stamp"
    now = fingerprint(stage)
    if stamp.exists() and stamp.read_text() == now:
        stage.note("build", PASSED, "used the build of the earlier stage")
        return
    shutil.rmtree(stage.site, ignore_errors=True)
    into = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-cache-dir", "--upgrade", "--target")
    files = sorted(map(str, wheels.glob("*.whl")))
    if files:
        stage.run(Part("wheels", python(*into, str(stage.site), *files), 60))
    source = stage.work / "source"
    shutil.rmtree(source, ignore_errors=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        source.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            copy(ROOT / name, source / name)
    command = python(*into, str(stage.site), "--no-build-isolation", str(source))
    archs = {"MERGETUNE_CUDA_ARCHS": stage.machine.get("capability", "")}
    with_cuda = not stage.dry and "nvcc" in stage.machine.get("tools", {})
    built = stage.run(Part("build", command, 130, build_info, archs | {"MERGETUNE_CUDA": "1" if with_cuda else "0"}))
    if not built.good and with_cuda:
        built = stage.run(Part("build without CUDA", command, 100, build_info, {"MERGETUNE_CUDA": "0"}))
    if built.good:
        stamp.write_text(now)


def build_info(folder: Path) -> dict[str, Any]:
    site = folder.parent.parent / "site" / "mergetune"
    cores = [path.name for path in site.glob("_C*.so")]
    if not cores:
        raise FileNotFoundError(f"{site} has no native core")
    return {"core": cores[0]}


def fingerprint(stage: Stage) -> str:
    """Digest of the sources, the interpreter and the target of the build."""
    found = hashlib.sha256(f"{sys.executable} {stage.machine.get('capability')} {stage.dry}".encode())
    for name in SOURCES:
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


# -- parity -----------------------------------------------------------------------------------------------------------


def parity(stage: Stage) -> None:
    missing = stage.machine.get("missing modules", ())
    stage.run(
        Part(
            "doctor",
            python("-m", "mergetune", "doctor", "--kernels", "--json", "--limit", "40" if stage.dry else "70"),
            60 if stage.dry else 90,
            last_json,
            reserve=60 if stage.dry else 120,
        )
    )
    record = stage.work / "parity" / "tests" / "record.jsonl"
    workers = [] if "xdist" in missing else ["-n", "2" if stage.dry else str(min(12, os.cpu_count() or 1))]
    patience = [] if "pytest_timeout" in missing else ["--timeout", "90", "--timeout-method", "thread"]
    which = (
        [str(ROOT / "tests" / "ops" / "test_gpu.py"), "-k", DRY_TESTS]
        if stage.dry
        else [str(ROOT / "tests"), "-m", "gpu"]
    )
    command = python("-m", "pytest", *which, "-q", "-p", "recorder", "-p", "no:cacheprovider", "-c",
                     str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts=-ra --benchmark-disable",
                     *workers, *patience)  # fmt: skip
    tests = {"RECORD": str(record), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in every worker
    tests |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS promises the same bits in several streams with it alone
    read = lambda folder: read_tests(record)  # noqa: E731
    stage.run(Part("tests", command, 170, read, tests, judge_tests, reserve=25 if stage.dry else 70))
    stage.run(Part("timings", python(str(BENCHMARKS / "gpu_work.py"), "timings"), 45, op_times, judge=judge_ops))
    sanitizer = tool("compute-sanitizer")
    for check in ("memcheck", "racecheck"):
        if stage.dry or sanitizer is None:
            why = "a dry run" if stage.dry else "compute-sanitizer is not installed"
            stage.note(check, UNSUPPORTED, f"not supported on this machine: {why}")
            continue
        small = python(str(BENCHMARKS / "gpu_work.py"), "small", *small_calls(stage))
        stage.run(Part(check, [sanitizer, "--tool", check, *small], 60, sanitized, judge=judge_sanitizer))


def small_calls(stage: Stage) -> list[str]:
    """Names of the calls whose kernels ran in the part "timings"; the first call if none ran."""
    there = {line["op"] for outcome in stage.outcomes for line in outcome.facts.get("ops", ()) if "ms" in line}
    return [name for name in KERNEL_CALLS if name in there] or list(KERNEL_CALLS[:1])


def judge_tests(code: int, facts: dict[str, Any]) -> str:
    return FAILED if code or facts["failed"] or facts["never ended"] or not facts["passed"] else PASSED


def op_times(folder: Path) -> dict[str, Any]:
    return {"ops": json_lines(folder / "out")}


def judge_ops(code: int, facts: dict[str, Any]) -> str:
    return FAILED if code or not facts["ops"] or any("error" in line for line in facts["ops"]) else PASSED


def sanitized(folder: Path) -> dict[str, Any]:
    text = (folder / "out").read_text(errors="replace") + (folder / "err").read_text(errors="replace")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    unsupported = re.search(r".*(?:not supported|Failed to initialize|Unable to find).*", text)
    return {"errors": int(summaries[-1]) if summaries else None, "said": unsupported[0][:200] if unsupported else ""}


def judge_sanitizer(code: int, facts: dict[str, Any]) -> str:
    if facts["errors"] is None or (facts["said"] and code):
        return UNSUPPORTED if facts["said"] else FAILED
    return FAILED if facts["errors"] or code else PASSED


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(stage: Stage) -> None:
    """Runs the speed benchmarks, the loss first; every measurement is recorded immediately."""
    suites = [
        ("loss", "bench_gpu.py", "test_loss", 100.0, 90.0),
        ("text tower", "bench_gpu.py", "test_text_tower", 80.0, 60.0),
        ("whole runs", "bench_gpu.py", "test_fit", 70.0, 40.0),
        ("images", "bench_gpu.py", "test_encode_images", 60.0, 15.0),
    ]
    suites += [] if stage.dry else [("training step", "bench_fit_step.py", "test_step", 60.0, 0.0)]
    for name, file, tests, limit, reserve in suites:
        record = stage.work / "speed" / name.replace(" ", "-") / "record.jsonl"
        command = python("-m", "pytest", "-q", str(BENCHMARKS / file), "-k", tests, "-p", "no:cacheprovider", "-c",
                         str(BENCHMARKS / "pytest.ini"), "--rootdir", str(BENCHMARKS))  # fmt: skip
        read = lambda folder, record=record: {"benchmarks": json_lines(record)}  # noqa: E731
        stage.run(Part(name, command, limit, read, {"MERGETUNE_BENCH_RECORD": str(record)}, reserve=reserve))


STAGES = {"parity": parity, "speed": speed}


def main(arguments: Iterable[str] | None = None) -> int:
    """Runs a stage; the exit code is 0 if every part passed or is not supported on this machine, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT", "gpu-results"), help="folder of the results; default: $OUT"
    )
    parser.add_argument("--work", type=Path, help="folder of builds and caches; default: in the temporary folder")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".whl", help="folder of wheels to install before the build"
    )
    parser.add_argument("--prepared", type=Path, help="folder of Triton programs that launches.py compiled")
    parser.add_argument("--limit", type=float, default=LIMIT, help="time limit of the stage in seconds")
    parser.add_argument("--dry-run", action="store_true", help="run small cases on the CPU")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    began = time.monotonic()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception ends the running part as well
    work = options.work or Path(tempfile.gettempdir(), f"mergetune-gpu-{os.getuid()}")
    stage = Stage(options.stage, Path(options.out).resolve(), work.resolve(), began + options.limit - TO_REPORT, True)
    stage.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage.work / stage.name, ignore_errors=True)
    (stage.work / stage.name).mkdir(parents=True)
    look(stage, options.dry_run)
    try:
        if options.prepared:
            shutil.copytree(options.prepared, stage.work / "caches" / "triton", dirs_exist_ok=True)
        install(stage, options.wheels)
        STAGES[options.stage](stage)
    except Exception as error:  # an error of this program: earlier results are kept
        stage.note(options.stage, FAILED, f"{type(error).__name__}: {error}")
    stage.write()
    print(f"\n{(stage.out / f'{stage.name}.md').read_text()}\n{time.monotonic() - began:.0f} s in all.", flush=True)
    return 0 if all(outcome.good for outcome in stage.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
