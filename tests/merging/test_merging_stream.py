"""Merging files: the same bits as in memory, little at a time, whole or not at all; and what is refused."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergetune import merging
from mergetune import merging as m
from mergetune.merging import sources
from mergetune.merging.methods import METHODS

STREAMED = [name for name in METHODS if hasattr(getattr(m, name), "plan")]
SHAPES = {"blocks.0.weight": (12, 10), "blocks.1.weight": (9, 30), "bias": (70,), "scale": (), "conv": (3, 2, 3, 3)}
WHOLE = {"widen", "tsv_m", "opcm"}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STRETCH", 32)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    fixed = {"steps": torch.arange(40), "mask": torch.ones(3, dtype=torch.bool), "none": torch.empty(0, 2, dtype=dtype)}
    return state | fixed


def options_for(name: str, count: int) -> dict:
    positive = [{n: t.abs() if n in SHAPES else t for n, t in draw(k + 20).items()} for k in range(count)]
    return {
        "fisher_average": {"fishers": positive, "normalize": "norm"},
        "ota_ffg": {"second_moments": positive, "rank_one": True},
        "metrics_average": {"metrics": [0.5 + k for k in range(count)]},
        "layerwise": {"coefficients": {n: [0.3] * count for n in [*SHAPES, "none"]}},
        "lines": {"beta": 0.4},
    }.get(name, {})


def files(folder: Path, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Base and experts."""
    paths = [folder / f"{k}.safetensors" for k in range(count + 1)]
    for k, path in enumerate(paths):
        save_file(draw(k, dtype), path, metadata={"made by": str(k)})
    return paths


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    method = getattr(m, name)
    base, *experts = files(tmp_path, 1 if name == "slerp" else min(METHODS[name].most or 3, 3), dtype)
    options = options_for(name, len(experts))
    expected = method(load_file(base), [load_file(e) for e in experts], **options)
    m.merge_files(method, base, experts, tmp_path / "out.safetensors", **options)
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


@pytest.fixture
def threads() -> Iterator[None]:
    """Tests may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(set(STREAMED) - WHOLE))
def test_the_same_bits_with_any_number_of_threads(name: str, threads: None) -> None:
    method = getattr(m, name)
    experts = [draw(k + 1) for k in range(1 if name == "slerp" else min(METHODS[name].most or 3, 3))]
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(method(draw(0), experts, **options_for(name, len(experts))))
        assert torch.get_num_threads() == count
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_a_thread_that_cannot_start_is_an_error_and_the_next_merge_works(threads: None, monkeypatch) -> None:
    """Threads that did start wait for the others: they must not wait for ever."""
    torch.set_num_threads(4)  # another number than before, so that threads start
    began, start = [], threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        if len(began) == 2:
            raise RuntimeError("can't start new thread")
        began.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            m.average(None, [draw(1), draw(2)])
    for thread in began:
        thread.join(60)
    assert not any(thread.is_alive() for thread in began)
    found = m.average(None, [draw(1), draw(2)])
    torch.set_num_threads(1)
    assert all(torch.equal(tensor, found[name]) for name, tensor in m.average(None, [draw(1), draw(2)]).items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_has_threads_of_its_own(threads: None) -> None:
    torch.set_num_threads(2)
    expected = m.ties(draw(0), [draw(1), draw(2)])
    child = os.fork()
    if not child:  # without the parent's threads it would wait for ever
        signal.alarm(60)
        try:
            got = m.ties(draw(0), [draw(1), draw(2)])
            same = all(torch.equal(tensor, got[key]) for key, tensor in expected.items())
        finally:
            os._exit(0 if locals().get("same") else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("options", [{"rescale": "l2"}, {"consensus": "sum", "divide": "weight"}, {"seed": 5}])
def test_random_masks_are_the_same(options: dict, tmp_path: Path) -> None:
    base, *experts = files(tmp_path)
    m.merge_files(m.dare, base, experts, tmp_path / "out", **options)
    expected = m.dare(load_file(base), [load_file(e) for e in experts], **options)
    assert all(torch.equal(t, expected[n]) for n, t in load_file(tmp_path / "out").items())


def test_without_a_base_and_in_another_order_and_dtype(tmp_path: Path) -> None:
    a, b = draw(1, torch.bfloat16), draw(2, torch.float64)
    save_file(a, tmp_path / "a")
    save_file({name: b[name] for name in reversed(b)}, tmp_path / "b")
    m.merge_files(m.average, None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[1, 3])
    expected = m.average(None, [a, b], weights=[1, 3])
    assert all(torch.equal(t, expected[n]) for n, t in load_file(tmp_path / "out").items())


def test_the_header_is_the_bases(tmp_path: Path) -> None:
    base, *experts = files(tmp_path)
    m.merge_files(m.ties, base, experts, tmp_path / "out")
    with safe_open(tmp_path / "out", "pt") as out:
        assert out.metadata() == {"made by": "0"}
    assert (tmp_path / "out").stat().st_size == base.stat().st_size


def test_options_may_be_files(tmp_path: Path) -> None:
    base, *experts = files(tmp_path, 2)
    fishers = options_for("fisher_average", 2)["fishers"]
    for k, fisher in enumerate(fishers):
        save_file(fisher, tmp_path / f"fisher-{k}")
    lazy = [m.TensorFile(tmp_path / f"fisher-{k}") for k in range(2)]
    m.merge_files(m.fisher_average, None, experts, tmp_path / "out", fishers=lazy)
    expected = m.fisher_average(None, [load_file(e) for e in experts], fishers=fishers)
    assert all(torch.equal(t, expected[n]) for n, t in load_file(tmp_path / "out").items())


@pytest.mark.parametrize("name", sorted(set(STREAMED) - WHOLE))
def test_no_tensor_is_read_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: every read of a method that works element by element is one stretch."""
    method, sizes = getattr(m, name), []
    base, *experts = files(tmp_path, 1 if name == "slerp" else min(METHODS[name].most or 3, 3))
    find = merging.TensorFile.source

    def watched(self: merging.TensorFile, name: str) -> sources.Source:
        found = find(self, name)

        def read(begin: int, end: int) -> Tensor:
            sizes.append(end - begin)
            return found.read(begin, end)

        return sources.Source(found.shape, found.dtype, found.device, read)

    monkeypatch.setattr(merging.TensorFile, "source", watched)
    m.merge_files(method, base, experts, tmp_path / "out", **options_for(name, len(experts)))
    assert max(sizes) == 32


@pytest.mark.parametrize("value", [0, 1.0])
def test_a_number_as_the_base(value: float, tmp_path: Path) -> None:
    """Differences are merged as they are: LoRA's from 0, IA3's from 1."""
    _, *experts = files(tmp_path, 2)
    m.merge_files(m.ties, value, experts, tmp_path / "out", density=0.4)
    states = [load_file(e) for e in experts]
    base = {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in states[0].items()}
    expected = m.ties(base, states, density=0.4)
    got = load_file(tmp_path / "out")
    assert got.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in got.items())
    constant = m.Constant(states[0], value)
    assert constant.keys() == base.keys() and all(torch.equal(t, base[n]) for n, t in constant.items())
    assert "bias" in constant and len(constant) == len(base)


def test_lora_factors_are_merged_as_peft_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    states = [{n: draw(k)[n] for n in ("blocks.0.weight", "blocks.1.weight")} for k in (1, 2)]
    for k, state in enumerate(states):
        save_file(state, tmp_path / str(k))
    m.merge_files(m.ties, 0, [tmp_path / "0", tmp_path / "1"], tmp_path / "out", density=0.3, trim="tensor")
    for name, tensor in load_file(tmp_path / "out").items():
        torch.testing.assert_close(tensor, peft.ties([s[name] for s in states], torch.ones(2), 0.3))


def test_an_input_may_be_replaced(tmp_path: Path) -> None:
    base, *experts = files(tmp_path)
    expected = m.ties(load_file(base), [load_file(e) for e in experts])
    m.merge_files(m.ties, base, experts, experts[1])
    assert all(torch.equal(t, expected[n]) for n, t in load_file(experts[1]).items())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    base, *experts = files(tmp_path)
    bad = draw(1)
    bad["conv"][0] = torch.nan
    save_file(bad, experts[0])
    (tmp_path / "out").write_text("old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"'conv' must be finite.*experts\[0\] \(.*1.safetensors\) holds 18 NaN"):
        m.merge_files(m.task_arithmetic, base, experts, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_tensor_file_is_a_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(draw(1), tmp_path / "a")
    file = m.TensorFile(str(tmp_path / "a"))
    assert file.keys() == draw(1).keys() and len(file) == len(draw(1))
    assert all(torch.equal(file[name], tensor) and file[name].shape == tensor.shape for name, tensor in draw(1).items())
    expected = m.average(None, [draw(1), draw(2)])
    assert all(torch.equal(t, expected[n]) for n, t in m.average(None, [file, draw(2)]).items())
    monkeypatch.setattr(merging.TensorFile, "source", None)  # no tensor is read to see whether it is there
    assert "bias" in file and "other" not in file
    with pytest.raises(KeyError):
        draw(1)["other"]


def test_refusals(tmp_path: Path) -> None:
    base, *experts = files(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="method must work tensor by tensor, got lora_lego"):
        m.merge_files(m.lora_lego, None, experts, out)
    with pytest.raises(ValueError, match="expert_files must hold at least one file, got none"):
        m.merge_files(m.average, None, [], out)
    with pytest.raises(TypeError, match="expert_files must be a list of files"):
        m.merge_files(m.average, None, experts[0], out)
    with pytest.raises(FileNotFoundError, match="missing must be a file or folder of weights"):
        m.merge_files(m.average, tmp_path / "missing", experts, out)
    with pytest.raises(ValueError, match="ties needs a base"):
        m.merge_files(m.ties, None, experts, out)
    with pytest.raises(ValueError, match="density must be in"):
        m.merge_files(m.ties, base, experts, out, density=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lam'"):
        m.merge_files(m.ties, base, experts, out, lam=2)
    experts[1].write_bytes(experts[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match="2.safetensors is not a safetensors file"):
        m.merge_files(m.average, None, experts, out)
    assert not out.exists()


def test_a_file_that_shrinks_is_seen(tmp_path: Path) -> None:
    save_file(draw(1), tmp_path / "a")
    file = m.TensorFile(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as stream:
        stream.truncate(len(file.header) + 10)
    with pytest.raises(ValueError, match="the file was cut off while it was read"):
        m.average(None, [file])


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match="must hold F64, F32, .* only, got F8_E4M3"):
        m.TensorFile(tmp_path / "a")
