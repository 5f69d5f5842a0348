"""The benchmarks' own machinery: parts that hang, crash or print nonsense; ratios that got worse; what a run leaves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bounded  # noqa: E402
import gpu  # noqa: E402
import launches  # noqa: E402
import ratios  # noqa: E402
import records  # noqa: E402
from bounded import Part, run_part  # noqa: E402

CANDIDATE, FLOOR, LOOP = "loss, B 8", "its GEMMs", "a loop"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, code: str, *, limit: float = 60.0, left: float = 60.0, **options) -> bounded.Outcome:
    return run_part(Part("one part", python(code), limit, **options), tmp_path, time.monotonic() + left)


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("print('{\"a\": 1}')", "passed", ""),
        ("import sys; print('{}'); print('the reason', file=sys.stderr); sys.exit(3)", "failed", "exit code 3"),
        ("import os; print('{}', flush=True); os.abort()", "crashed", "ended by signal 6"),
        ("print('Segmentation [fault')", "unreadable", "ValueError: no JSON object was printed"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", "unreadable", "ValueError: no JSON object"),
        ("raise SystemExit('No such option: --kernels')", "failed", "exit code 1; ValueError: no JSON object"),
    ],
)
def test_what_a_part_can_do(tmp_path, code, status, detail):
    outcome = run(tmp_path, code, read=gpu.last_json)
    assert outcome.status == status
    assert outcome.detail.startswith(detail)
    assert outcome.good == (status == "passed")
    assert ("the reason" in outcome.tail) == ("the reason" in code)


def test_the_last_object_counts(tmp_path):
    outcome = run(tmp_path, """print('warning: {"a": 1}'); print('{\\n"b": [2]\\n}')""", read=gpu.last_json)
    assert outcome.facts == {"b": [2]}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_part_that_hangs_is_ended_with_all_its_children(tmp_path):
    """One child in a session of its own, and nobody listens to SIGTERM."""
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)'],"
        "start_new_session=True, stdout=subprocess.PIPE); child.stdout.readline();"
        "print('{\"pids\": [%d, %d]}' % (os.getpid(), child.pid), flush=True); time.sleep(600)"
    )
    began = time.monotonic()
    outcome = run(tmp_path, code, limit=9.0, read=gpu.last_json)  # long enough to start two Pythons on a busy machine
    assert time.monotonic() - began < 9.0 + 4 * bounded.GRACE
    assert outcome.status == "timed out"
    assert len(outcome.facts["pids"]) == 2  # what was printed before is kept
    until = time.monotonic() + 10  # what was killed is gone when the system has come to it
    while any(map(running, outcome.facts["pids"])) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, outcome.facts["pids"]))


def test_the_limit_of_the_stage_comes_first(tmp_path):
    assert run(tmp_path, "print()", left=bounded.LEAST).status == "no time left"
    assert run(tmp_path, "print()", left=60.0, reserve=55.0).status == "no time left"
    outcome = run(tmp_path, "import time; time.sleep(60)", left=bounded.LEAST + 2 * bounded.GRACE + 0.5)
    assert outcome.status == "timed out"
    assert outcome.seconds < 60


def test_a_program_that_is_not_there(tmp_path):
    outcome = run_part(Part("absent", ["/no/such/program"], 9.0), tmp_path, time.monotonic() + 60)
    assert (outcome.status, outcome.good) == ("not started", False)
    assert "/no/such/program" in outcome.detail


# -- a stage ----------------------------------------------------------------------------------------------------------


def stage_of(tmp_path: Path) -> gpu.Stage:
    (tmp_path / "work" / "speed").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return gpu.Stage("speed", tmp_path / "out", tmp_path / "work", time.monotonic() + 60, dry=True)


def info(own: float, floor: float = 1.0, title: str = CANDIDATE) -> dict:
    return {
        "title": title,
        "seconds": {title: own, FLOOR: floor, LOOP: 10.0},
        "baselines": [LOOP],
        "floors": [FLOOR],
        "other_cpus": 0.25,
        "peak_bytes": {},
    }


def test_a_stage_goes_on_and_leaves_few_files(tmp_path):
    """Parts that fail in every way; then one that measures, and is stopped in the middle of a line."""
    stage = stage_of(tmp_path)
    stage.machine = {"datetime": "2026-01-02T03:04", "cpu": {"brand_raw": "A CPU", "count": 2}, "torch": "2.0"}
    stage.run(Part("crash", python("import os; os.abort()"), 30))
    stage.run(Part("noise", python("print('nonsense')"), 30, gpu.last_json))
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps(info(2.0)) + '\n{"title": "cut o')
    read = lambda folder: {"benchmarks": gpu.json_lines(record)}  # noqa: E731
    stage.run(Part("hang", python("import time; time.sleep(60)"), 4, read))
    assert [outcome.status for outcome in stage.outcomes] == ["crashed", "unreadable", "timed out"]
    names = sorted(path.name for path in stage.out.iterdir())
    assert names == ["speed.json", "speed.log", "speed.md"]
    assert 2 * len(names) <= 8  # both stages into one folder
    text = (stage.out / "speed.md").read_text()
    assert "Dry run on a CPU" in text
    assert "| crash | **crashed** |" in text
    assert f"| {CANDIDATE} | 2 s | {LOOP} | 10 s | 5 x as fast |" in text
    assert "nonsense" in (stage.out / "speed.log").read_text()
    (bench,) = json.loads((stage.out / "speed.json").read_text())["benchmarks"]
    assert bench["extra_info"] == info(2.0)


def test_tests_that_began_and_never_ended(tmp_path):
    record = tmp_path / "record"
    end = {"event": "end", "seconds": 1.0}
    events = [
        {"event": "begin", "test": "a"},
        {**end, "test": "a", "outcome": "passed", "why": ""},
        {"event": "begin", "test": "b"},
        {**end, "test": "b", "outcome": "failed", "why": "off by 1"},
        {"event": "program", "hit": True},
        {"event": "begin", "test": "c"},
    ]
    record.write_text("".join(f"{json.dumps(event)}\n" for event in events) + '{"event": "end", "te')
    found = records.read_tests(record)
    assert (found["passed"], found["failed"], found["never ended"]) == (1, 1, ["c"])
    assert found["failures"] == {"b": "off by 1"}
    assert (found["Triton programs found"], found["Triton programs compiled"]) == (1, 0)
    assert gpu.judge_tests(0, found) == "failed"


@pytest.mark.parametrize(
    ("printed", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= ERROR SUMMARY: 2 errors", 0, "failed"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 0, "failed"),
        ("========= Error: Device not supported. Please refer to the documentation", 1, "not supported"),
        ("Traceback", 1, "failed"),
    ],
)
def test_what_the_sanitizer_says(tmp_path, printed, code, status):
    outcome = run(
        tmp_path, f"print({printed!r}); raise SystemExit({code})", read=gpu.sanitized, judge=gpu.judge_sanitizer
    )
    assert outcome.status == status


def test_what_a_launch_is_known_by():
    """Dtype and alignment of a tensor; a number as it is."""
    numbers = torch.zeros(8)
    assert launches.described(numbers) == {"dtype": "float32", "offset": numbers.data_ptr() % 16}
    assert launches.described(numbers[1:])["offset"] == (numbers.data_ptr() + 4) % 16
    assert launches.described(3) == 3
    again = launches.Tensor(**launches.described(numbers[1:]))
    assert (again.dtype, again.data_ptr()) == (torch.float32, (numbers.data_ptr() + 4) % 16)


# -- ratios -----------------------------------------------------------------------------------------------------------


def result(*infos: dict, model: str = "A CPU (R) 9000") -> dict:
    machine = {
        "cpu": {"brand_raw": model, "count": 2},
        "gpu": None,
        "threads": 1,
        "torch": "2.0",
        "python_version": "3",
    }
    machine["processor"] = "x86_64"
    benches = [{"extra_info": one, "fullname": f"bench_x.py::test_{i}"} for i, one in enumerate(infos)]
    return {"machine_info": machine, "datetime": "2026-01-02T03:04", "benchmarks": benches}


@pytest.fixture
def summarise(tmp_path):
    """A function of results that runs summarise.py on them, with or without options; a baseline of 2.0 is kept."""

    def call(*results: dict, options: tuple[str, ...]) -> subprocess.CompletedProcess:
        files = []
        for i, one in enumerate(results):
            files.append(tmp_path / f"result-{i}.json")
            files[-1].write_text(json.dumps(one))
        command = [sys.executable, str(BENCHMARKS / "summarise.py"), *map(str, files), *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    kept = call(result(info(2.0), info(3.0, title="another")), options=("--save-baseline", "kept"))
    assert kept.returncode == 0, kept.stderr
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a-cpu-r-9000-1-thread.json"]
    return call


OTHER = info(3.0, title="another")


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        ([result(info(1.0), OTHER)], 0, "4 ratios compared"),
        ([result(info(2.28), OTHER)], 0, "4 ratios compared"),  # 14 % worse
        ([result(info(2.32), OTHER)], 1, f"WORSE: {CANDIDATE} / {FLOOR}: 2.32, was 2; at most 2.3 is allowed (+15%)"),
        ([result(info(float("nan")), OTHER)], 1, f"WORSE: {CANDIDATE} / {FLOOR}: nan"),
        ([result(info(2.32), OTHER), result(info(2.2))], 0, "4 ratios compared"),  # repeated, and it was a disturbance
        ([result(info(2.32), OTHER), result(info(2.4))], 1, f"WORSE: {CANDIDATE} / {FLOOR}: 2.32"),
        ([result(info(2.0))], 0, f"missing, not compared: another / {FLOOR}"),
        ([result(info(2.0), OTHER, info(1.0, title="more"))], 0, f"new, not compared: more / {LOOP}"),
    ],
)
def test_against_the_ratios_that_were_kept(summarise, results, code, said):
    done = summarise(*results, options=("--against", "kept", "--repeat", "tests"))
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert (CANDIDATE in done.stdout.partition("WORSE")[2]) == (code == 1)


def test_which_tests_to_repeat(summarise, tmp_path):
    summarise(result(OTHER, info(2.4)), options=("--against", "kept", "--repeat", "tests"))
    assert (tmp_path / "tests").read_text() == "bench_x.py::test_1\n"


def test_a_device_that_is_not_known(summarise):
    done = summarise(result(info(2.0), model="B CPU"), options=("--against", "kept"))
    assert done.returncode == 2
    assert "No baseline for B CPU, 1 thread: kept/b-cpu-1-thread.json does not exist." in done.stderr
    assert "--save-baseline kept" in done.stderr


def test_nothing_in_common_is_not_a_success(summarise):
    done = summarise(result(info(2.0, title="else")), options=("--against", "kept"))
    assert done.returncode == 1
    assert "no row in common" in done.stderr


def test_a_gpu_gives_the_file_its_name():
    machine = result()["machine_info"] | {"gpu": "NVIDIA H100 80GB HBM3"}
    path = ratios.file_of(Path("baselines"), ratios.device_of(machine))
    assert path == Path("baselines/nvidia-h100-80gb-hbm3.json")


def test_kept_baselines_can_be_read():
    """Each lies under its device's name and holds ratios that are numbers above 0."""
    for path in (BENCHMARKS / "baselines").glob("*.json"):
        kept = ratios.Baseline.read(path)
        assert ratios.file_of(path.parent, kept.device) == path
        assert kept.ratios and all(ratio > 0 for row in kept.ratios.values() for ratio in row.values())
