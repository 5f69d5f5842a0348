"""Kernels verified where they run, on a simulated device: the CPU, with implementations that fail in every way."""

import ctypes
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fake_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from mergetune import FeatureCache, ops, tune
from mergetune.cli import app
from mergetune.ops import Trial, Verdict, VerdictFile, selection, verdicts

CPU = torch.device("cpu")
ONE_KIND = {"ops": ("lmc_loss",), "dtypes": (torch.float32,), "shape_classes": ("small",)}


@pytest.fixture(autouse=True)
def a_device_to_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The CPU goes by the verdict, as a GPU does; verdicts are kept in the test's own folder."""
    monkeypatch.setenv("MERGETUNE_BACKEND", "verified")
    monkeypatch.setenv("MERGETUNE_HOME", str(tmp_path))
    monkeypatch.setenv("MERGETUNE_TEST_FAKES", "1")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    selection.forget(CPU)
    fake_kernels.register()
    yield
    fake_kernels.unregister()
    selection.forget(CPU)


def arguments(scale: float = 10.0, dtype: torch.dtype = torch.float32) -> dict:
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)  # noqa: E731
    return {
        "x": F.normalize(draw(6, 8), dim=-1),
        "labels": torch.arange(6) % 3,
        "w": draw(3, 8).requires_grad_(),
        "anchors": draw(1, 3, 8),
        "alphas": torch.tensor([0.0, 0.5]),
        "betas": torch.tensor([1.0]),
        "scale": scale,
    }


def loss_and_gradient(backend: str | None = None) -> tuple[Tensor, Tensor]:
    given = arguments()
    loss, _ = ops.lmc_loss(**given, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, given["w"])[0]


def take(backend: str, op: str = "lmc_loss") -> None:
    """As if the verification had chosen this backend."""
    trials = (
        Trial(backend="torch", status="agreed", seconds=1.0),
        Trial(backend=backend, status="agreed", seconds=0.1),
    )
    verdict = Verdict(op=op, dtype="torch.float32", shape_class="small", trials=trials)
    facts = verdicts.device_facts(CPU)
    selection.take_verdicts(CPU, VerdictFile(facts=facts, verdicts=(verdict,), seconds=1.0))


# -- the verification -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, Trial]:
    """What the verification found of every fake, in one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETUNE_TEST_FAKES", "1")
        patch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
        fake_kernels.register()
        # Compilation takes long and is tried in its own test.
        compiled = ops.OPS["lmc_loss"].implementations.pop("compile")
        try:
            verdict = ops.verify(CPU, **ONE_KIND, modules=("fake_kernels",), case_limit=6.0)
        finally:
            ops.OPS["lmc_loss"].register(compiled)
            fake_kernels.unregister()
    (only,) = verdict.verdicts
    assert only.chosen in ("cpp", "fast")
    return {trial.backend: trial for trial in only.trials}


@pytest.mark.parametrize("backend", ["wrong", "wrong_now_and_then", "wrong_for_odd_widths", "not_a_number"])
def test_a_wrong_kernel_is_found_out(found, backend):
    assert found[backend].status == "wrong"
    assert "grad of comparison" in found[backend].detail
    assert found[backend].seconds is None


def test_a_slow_kernel_agrees_and_is_not_chosen(found):
    assert found["slow"].status == "agreed"
    assert found["slow"].seconds > found["torch"].seconds


def test_a_kernel_that_raises_is_reported(found):
    assert (found["raises"].status, found["raises"].detail) == (
        "raised",
        "RuntimeError: an illegal instruction was met",
    )


def test_a_kernel_that_hangs_is_killed_and_the_others_are_tried(found):
    assert found["hangs"].status == "hung"
    assert found["crashes"].status == "crashed"
    assert "code -11" in found["crashes"].detail
    assert found["fast"].status == "agreed"  # behind both in the list
    assert found["torch"].status == found["cpp"].status == "agreed"


def test_every_gradient_of_attention_is_compared(monkeypatch):
    monkeypatch.delitem(ops.OPS["prefix_attention"].implementations, "compile")  # takes long
    kind = ONE_KIND | {"ops": ("prefix_attention",)}
    (verdict,) = ops.verify(CPU, **kind, modules=("fake_kernels",)).verdicts
    found = {trial.backend: trial for trial in verdict.trials}
    assert {name: trial.status for name, trial in found.items()} == {
        "torch": "agreed", "cpp": "agreed", "wrong_keys": "wrong", "lacks_a_head": "wrong",
    }  # fmt: skip
    assert found["wrong_keys"].detail.startswith("d_k of comparison 1 is off by 1.0e-02")
    assert found["lacks_a_head"].detail.startswith("d_q of comparison 1 is off by inf")
    assert verdict.chosen in ("torch", "cpp")


def test_the_limit_holds_whatever_hangs():
    began = time.monotonic()
    implementations = ops.OPS["lmc_loss"].implementations
    kept = dict(implementations)
    for name in set(implementations) - {"torch", "hangs"}:
        del implementations[name]
    try:
        verdict = ops.verify(
            CPU, ops=("lmc_loss",), shape_classes=("small",), modules=("fake_kernels",), limit=9.0, case_limit=60.0
        )
    finally:
        implementations.clear()
        implementations.update(kept)
    assert time.monotonic() - began < 40
    assert all(v.chosen == "torch" for v in verdict.verdicts)
    assert {t.status for v in verdict.verdicts for t in v.trials if t.backend == "hangs"} <= {"hung", "not tried"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the child in /proc")
def test_a_killed_verification_leaves_no_child(tmp_path):
    code = "import sys, fake_kernels, torch; from mergetune import ops; "
    code += "ops.verify(torch.device('cpu'), ops=('lmc_loss',), modules=('fake_kernels',), "
    code += "progress=lambda done, total, what: print(what, flush=True))"
    environment = os.environ | {"PYTHONPATH": str(Path(fake_kernels.__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert parent.stdout is not None and b"lmc_loss" in parent.stdout.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(child) for child in children)


def _runs(process: str) -> bool:
    """Whether a process lives; what nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_has_reported_everything_ends_by_itself(tmp_path, monkeypatch):
    """A compiler removes its temporary files when its process ends, but not when the process is killed."""
    left = tmp_path / "left by a compiler"
    code = f"import atexit, os, time\nos.mkdir({str(left)!r})\n"
    code += f"atexit.register(lambda: (time.sleep(0.5), os.rename({str(left)!r}, {str(tmp_path / 'ended')!r})))\n"
    (tmp_path / "compiles.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in set(ops.OPS["lmc_loss"].implementations) - {"torch"}:
        monkeypatch.delitem(ops.OPS["lmc_loss"].implementations, name)
    (verdict,) = ops.verify(CPU, **ONE_KIND, modules=("compiles",)).verdicts
    assert [trial.status for trial in verdict.trials] == ["agreed"]
    assert (tmp_path / "ended").is_dir() and not left.exists()


def test_a_child_that_does_not_start_is_an_error():
    with pytest.raises(RuntimeError, match="does not start: the process .*; last line: ModuleNotFoundError"):
        ops.verify(CPU, **ONE_KIND, modules=("there_is_no_such_module",))


READY, CASE = {"ready": True}, {"op": "lmc_loss", "backend": "torch", "dtype": "float32", "shape_class": "small"}
AGREED = {"backend": "torch", "status": "agreed", "seconds": 1e-6}
REPORTS = {
    "the content must be JSON": [READY, {"begin": CASE}, "agreed"],
    "must be an object": [READY, {"begin": CASE}, ["agreed"]],
    "trial.status must be": [READY, {"begin": CASE}, {"end": CASE, "trial": AGREED | {"status": "splendid"}}],
    "trial.seconds must be": [READY, {"begin": CASE}, {"end": CASE, "trial": AGREED | {"seconds": "none"}}],
    "also_chosen must": [READY, {"begin": CASE}, {"end": CASE, "trial": AGREED, "also_chosen": True}],
    "its report on torch is about cpp": [READY, {"begin": CASE}, {"end": CASE, "trial": AGREED | {"backend": "cpp"}}],
    "report is damaged": [READY, {"begin": CASE}, "[" * 100_000],
    "report is damaged: ": [READY, {"begin": CASE}, "9" * (3 << 20)],
    "last line: none": [READY, {"begin": CASE}, {"end": CASE | {"backend": "cpp"}, "trial": AGREED}],
}


@pytest.mark.skipif(sys.platform != "linux", reason="a shell writes to the report by way of /proc")
@pytest.mark.parametrize("said", REPORTS)
def test_a_child_that_reports_something_else_is_believed_nothing(said, tmp_path, monkeypatch):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in REPORTS[said]]
    (tmp_path / "report").write_text("\n".join(lines) + "\n")
    child = tmp_path / "child"
    child.write_text(
        "#!/bin/sh\nfor word; do case $word in --report=*) to=${word#--report=};; esac; done\n"
        f"cat {tmp_path / 'report'} > /proc/self/fd/$to\n"
    )
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    for name in set(ops.OPS["lmc_loss"].implementations) - {"torch"}:
        monkeypatch.delitem(ops.OPS["lmc_loss"].implementations, name)
    ((trial,),) = (verdict.trials for verdict in ops.verify(CPU, **ONE_KIND).verdicts)
    assert trial.status == "crashed" and said in trial.detail


# -- the choice -------------------------------------------------------------------------------------------------------


def test_without_a_verdict_plain_torch_is_used_and_one_line_says_so():
    with pytest.warns(UserWarning, match="No kernel has been verified on cpu yet.*mergetune doctor --kernels") as said:
        first = loss_and_gradient()
        loss_and_gradient()
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, loss_and_gradient("torch"), strict=True))


def test_the_chosen_kernel_runs():
    calls = []
    ops.OPS["lmc_loss"].register(ops.Implementation("counted", lambda a: calls.append(1) or fake_kernels.CORE(a)))
    take("counted")
    try:
        results = [loss_and_gradient() for _ in range(3)]
    finally:
        del ops.OPS["lmc_loss"].implementations["counted"]
    assert len(calls) == 4  # once more at the first call, for the comparison
    for result in results:
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(result, loss_and_gradient("torch"), strict=True))


@pytest.mark.parametrize(
    ("backend", "trouble"),
    [
        ("wrong", "grad is off by 1.0e-02"),
        ("not_a_number", "grad is off by nan"),
        ("raises", "raised RuntimeError: an illegal"),
    ],
)
def test_a_mismatch_on_the_callers_data_is_reported_and_the_definition_used(backend, trouble):
    take(backend)
    with pytest.warns(UserWarning, match=f"backend '{backend}' {trouble}.*Plain PyTorch is used instead") as said:
        results = [loss_and_gradient() for _ in range(3)]
    assert len(said) == 1
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, loss_and_gradient("torch"), strict=True))
    ((key, why),) = ops.refusals().items()
    assert key == "lmc_loss cpu torch.float32 small"
    assert why.startswith(f"{backend}: ")


def test_an_explicit_backend_is_never_replaced():
    take("fast")
    wrong, true = loss_and_gradient("wrong"), loss_and_gradient("torch")
    assert torch.allclose(wrong[1], 1.01 * true[1], rtol=1e-5)
    with pytest.raises(RuntimeError, match="an illegal instruction was met"):
        loss_and_gradient("raises")
    assert not ops.refusals()


def test_wrong_arguments_raise_and_refuse_no_kernel():
    take("fast")
    given = arguments()
    given["labels"] = given["labels"] + 7
    with pytest.raises(ValueError, match="labels must lie in"):
        ops.lmc_loss(**given)
    assert not ops.refusals()
    assert loss_and_gradient()[0].isfinite()


def test_values_that_are_not_finite_judge_no_kernel():
    take("fast")
    given = arguments()
    with torch.no_grad():
        given["w"][0, 0] = torch.nan
    assert ops.lmc_loss(**given)[0].isnan()
    assert not ops.refusals()


def test_the_choice_survives_every_mode_of_autograd():
    take("fast")
    with torch.inference_mode():
        given = arguments()
        assert ops.lmc_loss(**given)[0].isfinite()
    compiled = torch.compile(lambda **given: ops.lmc_loss(**given)[0], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**arguments()), loss_and_gradient("torch")[0])
    assert not ops.refusals()


def test_a_choice_that_differentiates_inside_runs_in_a_compiled_graph(monkeypatch):
    """As torch.compile of the definition does: within an op autograd is off, at the second call as at the first."""
    stand_in = ops.Implementation("compile", fake_kernels.DEFINITION)
    monkeypatch.setitem(ops.OPS["lmc_loss"].implementations, "compile", stand_in)
    take("compile")
    compiled = torch.compile(lambda **given: ops.lmc_loss(**given)[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(compiled(**arguments()), loss_and_gradient("torch")[0])
    assert not ops.refusals()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_chosen_attention_runs_forward_and_backward(compiled, monkeypatch):
    calls, cpp = [], ops.OPS["prefix_attention"].implementations["cpp"]
    counted = ops.Implementation(
        "counted", lambda a: calls.append("forward") or cpp.run(a),
        lambda d_out, a: calls.append("backward") or cpp.run_backward(d_out, a),
    )  # fmt: skip
    monkeypatch.setitem(ops.OPS["prefix_attention"].implementations, "counted", counted)
    take("counted", "prefix_attention")
    draw = torch.Generator().manual_seed(0)
    q, k, v, prefix_k, prefix_v = (torch.randn(1, rows, 2, 4, generator=draw) for rows in (5, 5, 5, 3, 3))

    def out_and_gradient(backend: str | None) -> tuple[Tensor, Tensor]:
        leaf = k.clone().requires_grad_()
        run = lambda leaf: ops.prefix_attention(q, leaf, v, prefix_k, prefix_v, (2, 3), backend=backend)  # noqa: E731
        if compiled and backend is None:
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        out = run(leaf)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    expected = out_and_gradient("torch")
    for count in (2, 3):  # the first call compares forward and backward with the definition
        for got, true in zip(out_and_gradient(None), expected, strict=True):
            assert torch.allclose(got, true, rtol=1e-5, atol=1e-6)
        assert calls.count("forward") == calls.count("backward") == count
    assert not ops.refusals()


def test_plain_torch_by_the_environment(monkeypatch):
    take("wrong")
    monkeypatch.setenv("MERGETUNE_BACKEND", "torch")
    assert torch.equal(loss_and_gradient()[1], loss_and_gradient("torch")[1])
    monkeypatch.setenv("MERGETUNE_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="MERGETUNE_BACKEND must be empty, torch or verified, got 'cudnn'"):
        loss_and_gradient()


# -- the verdict's file -----------------------------------------------------------------------------------------------


def test_a_kept_verdict_is_taken_up_by_another_process(tmp_path):
    take("cpp")
    trials = (Trial(backend="torch", status="agreed", seconds=1.0), Trial(backend="cpp", status="agreed", seconds=0.1))
    verdict = Verdict(op="lmc_loss", dtype="torch.float32", shape_class="small", trials=trials)
    ops.keep(CPU, VerdictFile(facts=verdicts.device_facts(CPU), verdicts=(verdict,), seconds=1.0))
    (file,) = (tmp_path / "kernels").glob("*.json")
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    code += "from mergetune.ops import selection; "
    code += "print(selection.chosen(('lmc_loss', 'cpu', 'torch.float32', 'small')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "cpp", done.stderr
    assert json.loads(file.read_text())["verdicts"][0]["trials"][1]["backend"] == "cpp"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t[: len(t) // 2], "must be JSON, got a mistake in line"),
        (lambda t: "[]", "the content must be an object, got a list of 0"),
        (lambda t: t.replace('"agreed"', '"splendid"'), r"verdicts\[0\].trials\[0\].status must be one of 'agreed'"),
        (lambda t: t.replace('"seconds": 1.0', '"seconds": "soon"'), "seconds must be a number, got 'soon'"),
        (lambda t: t.replace('"facts"', '"fakts"'), "facts must be there, got no such field"),
        (lambda t: t.replace('"format": 1', '"format": 2'), "must have format 1, got 2; update mergetune"),
        (lambda t: t + " " * (1 << 20), "must have at most 1,048,576 bytes"),
    ],
)
def test_a_damaged_verdict_is_named_and_not_used(damage, said):
    take("cpp")
    trial = Trial(backend="wrong", status="agreed", seconds=0.1)
    verdict = Verdict(op="lmc_loss", dtype="torch.float32", shape_class="small", trials=(trial,))
    path = verdicts.write_verdicts(VerdictFile(facts=verdicts.device_facts(CPU), verdicts=(verdict,), seconds=1.0))
    path.write_text(damage(path.read_text()))
    selection.forget(CPU)
    with pytest.warns(UserWarning, match=said) as warned:
        result = loss_and_gradient()
    assert str(path) in str(warned[0].message)
    assert "mergetune doctor --kernels" in str(warned[0].message) or "update mergetune" in said
    assert torch.equal(result[1], loss_and_gradient("torch")[1])


def test_a_verdict_of_another_driver_is_not_used(monkeypatch):
    facts = verdicts.device_facts(CPU)
    verdict = Verdict(
        op="lmc_loss", dtype="torch.float32", shape_class="small",
        trials=(Trial(backend="wrong", status="agreed", seconds=0.1),),
    )  # fmt: skip
    for change in ("driver", "torch", "triton", "kernels", "device"):
        other = facts.model_copy(update={change: "another"})
        path = verdicts.write_verdicts(VerdictFile(facts=other, verdicts=(verdict,), seconds=1.0))
        path.rename(verdicts.verdict_path(facts))  # even under this device's name
        assert verdicts.read_verdicts(facts) is None


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", None])
def test_verdicts_lie_in_the_users_cache_folder(variable, monkeypatch, tmp_path):
    monkeypatch.delenv("MERGETUNE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    kept = VerdictFile(facts=verdicts.device_facts(CPU), verdicts=(), seconds=1.0)
    ops.keep(CPU, kept)
    place = tmp_path / ("cache" if variable else "home/.cache") / "mergetune" / "kernels"
    assert len(list(place.glob("*.json"))) == 1
    assert ops.kept_verdicts(CPU) == kept


def test_a_folder_that_cannot_be_written_costs_the_verdict_only(monkeypatch, tmp_path):
    (tmp_path / "kernels").write_text("a file, where the folder would be")
    take("fast")
    found = VerdictFile(facts=verdicts.device_facts(CPU), verdicts=(), seconds=1.0)
    with pytest.warns(UserWarning, match="could not be stored, so the next process verifies again"):
        ops.keep(CPU, found)


# -- fit and tune -----------------------------------------------------------------------------------------------------


def test_the_first_training_verifies_once(clip, monkeypatch, tmp_path):
    """With two implementations of one op, so that it takes seconds; the second training finds the verdict."""
    runs = []
    real = ops.verify

    def quick(device, **settings):
        runs.append(device)
        return real(device, ops=("path_cross_entropy",), shape_classes=("small",), progress=settings["progress"])

    monkeypatch.setattr("mergetune.ops.verification.verify", quick)
    x = F.normalize(torch.randn(8, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = FeatureCache.from_tensors(x, torch.arange(8) % 2, ("cat", "dog"))
    settings = {"epochs": 1, "method": "head", "progress": False}
    tune(clip, features, **settings, backend="torch")
    assert not runs
    tune(clip, features, **settings)
    assert runs == [CPU]
    tune(clip, features, **settings)
    selection.forget(CPU)  # another process
    tune(clip, features, **settings)
    assert runs == [CPU]
    assert list((tmp_path / "kernels").glob("*.json"))


def test_what_another_process_finds_meanwhile_is_taken_over(monkeypatch):
    """Of two processes that start to train at once, one waits for the lock and then verifies nothing."""

    flock = fcntl.flock

    def wait(*_) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        verdicts.write_verdicts(VerdictFile(facts=verdicts.device_facts(CPU), verdicts=(), seconds=1.0))

    monkeypatch.setattr("fcntl.flock", wait)
    monkeypatch.setattr("mergetune.ops.verification.verify", lambda *_, **__: pytest.fail("verified twice"))
    ops.ensure_verified(CPU, progress=False)
    assert selection.has_verdicts(CPU)


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_verifies_keeps_and_tells(monkeypatch, tmp_path):
    """On a machine without a GPU it is the CPU's implementations that are tried."""
    real = ops.verify
    monkeypatch.setattr(
        ops, "verify", lambda device, **how: real(device, ops=("path_cross_entropy",), shape_classes=("small",), **how)
    )
    done = CliRunner().invoke(app, ["doctor", "--kernels", "--json", "--limit", "100"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    verdict = report["kernels"]["cpu"]
    assert report["healthy"]
    assert {trial["backend"] for trial in verdict["verdicts"][0]["trials"]} == {"torch", "cpp"}
    assert {trial["status"] for row in verdict["verdicts"] for trial in row["trials"]} == {"agreed"}
    (file,) = (tmp_path / "kernels").glob("*.json")
    assert json.loads(file.read_text()) == verdict

    monkeypatch.setattr(
        ops, "verify", lambda device, **how: VerdictFile.model_validate(verdict | {"verdicts": tried()})
    )
    done = CliRunner().invoke(app, ["doctor", "--kernels"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    said = " ".join(re.sub("[^a-z0-9A-Z\\[\\]() ]", " ", done.stdout).split())  # without the table's lines
    assert "triton WRONG (grad is [far] off)" in said
    assert "torch 12 us" in said


def tried() -> list[dict]:
    wrong = Trial(backend="triton", status="wrong", detail="grad is [far] off")
    trials = (Trial(backend="torch", status="agreed", seconds=1.2e-5), wrong)
    return [Verdict(op="lmc_loss", dtype="torch.float32", shape_class="small", trials=trials).model_dump()]


# -- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder"])
def test_a_verdict_that_is_no_regular_file_is_not_waited_for(kind):
    path = verdicts.verdict_path(verdicts.device_facts(CPU))
    path.parent.mkdir(parents=True)
    {"fifo": lambda: os.mkfifo(path), "endless": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with pytest.warns(UserWarning, match="plain PyTorch is used"):
        result = loss_and_gradient()
    assert torch.equal(result[1], loss_and_gradient("torch")[1])


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("trouble", ["no executable", "executable is gone", "no temporary folder", "no home"])
def test_where_nothing_can_be_verified_plain_torch_is_used_and_said(trouble, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, b"/what is no text is left out"])
    if trouble == "no temporary folder":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    else:
        gone = str(tmp_path / "gone") if trouble == "executable is gone" else ""
        monkeypatch.setattr(sys, "executable", gone)
    if trouble == "no home":
        monkeypatch.delenv("MERGETUNE_HOME")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", _homeless)
    with pytest.warns(UserWarning, match="kernels could not be verified on cpu: .* Plain PyTorch is used"):
        ops.ensure_verified(CPU, progress=False)
    ops.ensure_verified(CPU, progress=False)  # not tried again in this process
    assert torch.equal(loss_and_gradient()[1], loss_and_gradient("torch")[1])


def test_what_a_kernel_prints_does_not_disturb_the_report(found):
    assert (found["prints"].status, found["prints"].detail) == ("agreed", "")


# -- a GPU that is not there ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """What torch says of a GPU; nothing runs on it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "Imagined GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda", 0)


def test_doctor_tells_of_each_gpu_whether_its_kernels_are_verified(gpu, tmp_path):
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0 and "kernels on cuda:0: not verified, so plain PyTorch is used" in done.stdout
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["kernels"] == {"cuda:0": None}
    facts = verdicts.device_facts(gpu)
    assert facts.device == "Imagined GPU sm_90"
    trial = Trial(backend="triton", status="agreed", seconds=1e-5)
    verdict = Verdict(op="lmc_loss", dtype="torch.float32", shape_class="small", trials=(trial,))
    path = verdicts.write_verdicts(VerdictFile(facts=facts, verdicts=(verdict,), seconds=7.0))
    shown = " ".join(CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).stdout.split())
    assert "Kernels on cuda:0 (Imagined GPU sm_90), verified in 7 s" in shown and "triton 10 us" in shown
    path.write_text("{")  # a damaged verdict counts as none
    assert "not verified" in CliRunner().invoke(app, ["doctor"]).stdout


@pytest.mark.parametrize(
    ("said", "library", "driver"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version 12.2.0", None,
         "570.133.20"),
        ("nothing that has a version", 13000, "13000"),
        (None, 12080, "12080"),
        (None, None, "unknown"),
    ],
)  # fmt: skip
def test_the_driver_is_read_from_the_kernel_module_or_the_library(gpu, said, library, driver, monkeypatch):
    """A verdict holds for one driver, so another version must be noticed."""
    read_text = Path.read_text

    def read(path: Path, *arguments, **options) -> str:
        if path != Path("/proc/driver/nvidia/version"):
            return read_text(path, *arguments, **options)
        if said is None:
            raise FileNotFoundError(path)
        return said

    class Library:
        def __init__(self, name: str) -> None:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, found) -> None:  # noqa: N802
            found._obj.value = library

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert verdicts.device_facts(gpu).driver == driver
