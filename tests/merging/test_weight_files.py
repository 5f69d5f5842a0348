"""Weights of whole models in files: torch files, shards, wrappers, averages and what the models do not share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergetune as mt
from mergetune import merging as m

State = dict[str, Tensor]


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (5, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def named(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


OTHER = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4), "b.weight": torch.ones(5, 4)}
LAYOUTS: dict[str, Callable[[State], object]] = {
    "plain": dict,
    "ordered": OrderedDict,
    "parameters": lambda s: {n: nn.Parameter(t) for n, t in s.items()},
    "transposed": lambda s: {n: t.t().contiguous().t() for n, t in s.items()},
    "views": lambda s: {n: torch.cat([t.flatten(), torch.ones(3)])[: t.numel()].view(t.shape) for n, t in s.items()},
    "DDP": named("module."),
    "compiled": named("_orig_mod."),
    "DDP of compiled": named("module._orig_mod."),
    "compiled DDP": named("_orig_mod.module."),
    "state_dict": lambda s: {"epoch": 3, "state_dict": named("module.")(s), "optimizer": {"state": {}}},
    "model": lambda s: {"model": s, "step": torch.tensor(3)},
    "model_state_dict": lambda s: {"model_state_dict": named("_orig_mod.")(s), "loss": 0.5},
    "module": lambda s: {"module": s, "global_steps": 3},
    "beside numbers": lambda s: {**s, "epoch": 3, "name": "x"},
    "weights and their average": lambda s: {"state_dict": s, "state_dict_ema": OTHER},
    "average alone": lambda s: {"step": torch.tensor(1), "model_ema": named("module.")(s)},
    "average in a wrapper": lambda s: {"ema": {"module": s}},
    "average beside": lambda s: {**s, "ema": OTHER},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(5), **named("module.")(s)},
    "averages under a prefix": lambda s: {
        "initted": torch.tensor(True),
        "step": torch.tensor(4),
        **named("ema_model.")(OTHER),
        **named("online_model.")(s),
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("old", [False, True])
def test_the_weights_come_out_of_every_layout(name: str, old: bool, tmp_path: Path) -> None:
    torch.save(LAYOUTS[name](draw(1)), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    found = m.open_weights(tmp_path / "a.pt")
    assert found.keys() == draw(1).keys() and all(torch.equal(found[n], t) for n, t in draw(1).items())


@pytest.mark.parametrize("name", ["weights and their average", "averages under a prefix", "average beside"])
def test_the_average_is_taken_when_asked_for(name: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[name](draw(1)), tmp_path / "a.pt")
    found = m.open_weights(tmp_path / "a.pt", ema=True)
    assert found.keys() == OTHER.keys() and all(torch.equal(found[n], t) for n, t in OTHER.items())
    torch.save(draw(1), tmp_path / "b.bin")
    save_file(draw(1), tmp_path / "b.safetensors")
    for file in ("b.bin", "b.safetensors"):
        with pytest.raises(ValueError, match=rf"{file} must hold a moving average of the weights"):
            m.open_weights(tmp_path / file, ema=True)


def test_a_torchscript_archive_is_read_and_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    torch.jit.save(torch.jit.script(network), tmp_path / "a.pt")
    found = m.open_weights(tmp_path / "a.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


def shard(folder: Path, state: State, ending: str) -> Path:
    """Two shards and their index, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    places = {}
    for k, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{k}-of-00002.{ending}"
        tensors = {name: state[name] for name in part}
        save_file(tensors, folder / file) if ending == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    start = "model" if ending == "safetensors" else "pytorch_model"
    index = folder / f"{start}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def write(folder: Path, layout: str, state: State) -> Path:
    """A model in a file or folder."""
    folder.mkdir(parents=True)
    if layout.startswith("shards"):
        index = shard(folder, state, layout.partition(" ")[2])
        return index
    if layout == "folder of shards":
        return shard(folder, state, "bin").parent
    if layout == "folder":
        save_file(state, folder / "model.safetensors")
        (folder / "optimizer.bin").write_bytes(b"no weights")
        return folder
    file = folder / f"model.{layout}"
    save_file(state, file) if layout == "safetensors" else torch.save({"state_dict": named("module.")(state)}, file)
    return file


@pytest.mark.parametrize(
    "layout", ["safetensors", "bin", "pt", "ckpt", "shards safetensors", "shards bin", "folder", "folder of shards"]
)
def test_a_merge_of_files_is_that_of_their_state_dicts(layout: str, tmp_path: Path) -> None:
    base, *experts = (write(tmp_path / str(k), layout, draw(k)) for k in range(3))
    out = tmp_path / "new" / "folders" / "out.safetensors"
    m.merge_files(m.ties, base, experts, out)
    expected = m.ties(draw(0), [draw(1), draw(2)])
    found = load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_numbers_of_several_sizes_are_aligned_in_the_output(tmp_path: Path) -> None:
    mixed = {"h": torch.ones(3, dtype=torch.float16), "d": torch.ones(1).double(), "n": torch.tensor(7)}
    torch.save(mixed, tmp_path / "a.pt")
    m.merge_files(m.average, None, [tmp_path / "a.pt"] * 2, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert out.metadata() == {"format": "pt"} and {n: out.get_tensor(n).dtype for n in mixed} == {
            "h": torch.float16,
            "d": torch.float64,
            "n": torch.int64,
        }


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: None, "must be a file or folder of weights, got no such file"),
    "text": (lambda p: p.write_text("hello"), "cannot be read as a checkpoint"),
    "a list": (
        lambda p: torch.save([torch.ones(2)], p),
        "must hold the weights of a model, a dict of tensors, got list",
    ),
    "no tensors": (
        lambda p: torch.save({"epoch": 3, "lr": 0.1}, p),
        "must hold tensors by name.*the keys 'epoch', 'lr'",
    ),
    "a module": (lambda p: torch.save(nn.Linear(2, 2), p), "pickled code is never run"),
    "sparse": (lambda p: torch.save({"w": torch.eye(3).to_sparse()}, p), "'w' must be a tensor of plain numbers"),
    "complex": (lambda p: torch.save({"w": torch.ones(2) * 1j}, p), "'w' must be float64.*got complex64"),
    "float8": (lambda p: torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, p), "'w' must be.*float8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_weights_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    make(tmp_path / "x.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x\.pt.*{said}"):
        m.open_weights(tmp_path / "x.pt")


def test_damaged_indices_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    index = shard(tmp_path, draw(0), "safetensors")
    places = json.loads(index.read_text())["weight_map"]
    for wrong, said in (
        ([], "must hold a weight_map"),
        ({"weight_map": {}}, "must hold a weight_map"),
        ({"weight_map": {"w": "../secret.safetensors"}}, "files of the same folder, got '../secret.safetensors'"),
        ({"weight_map": {"w": "/etc/passwd"}}, "files of the same folder"),
        ({"weight_map": {"w": index.name}}, "files of the same folder"),
        ({"weight_map": {"w": 3}}, "must hold a weight_map"),
        ({"weight_map": {"w": "gone.bin"}}, "needs the shard gone.bin"),
        ({"weight_map": places | {"other": places["a.bias"]}}, "must hold 'other', got no such tensor"),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            m.open_weights(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty must hold weights"):
        m.open_weights(tmp_path / "empty")
    for name in ("one.pt", "two.pt"):
        torch.save(draw(0), tmp_path / "empty" / name)
    with pytest.raises(ValueError, match="must hold the weights of one model, got 2 files: one.pt, two.pt"):
        m.open_weights(tmp_path / "empty")


# -- what the models need not share -----------------------------------------------------------------------------------

BUFFERS = {
    "bn.num_batches_tracked": (torch.tensor(7), torch.tensor(9)),
    "position_ids": (torch.arange(5)[None], torch.arange(5)[None].half()),
    "text.embeddings.position_ids": (torch.arange(5).float(), torch.arange(7)),
    "counter in another dtype.num_batches_tracked": (torch.tensor(7), torch.tensor(9.0)),
    "equal.table": (torch.arange(300), torch.arange(300.0)),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("with_base", [False, True])
def test_buffers_are_the_references(name: str, with_base: bool) -> None:
    ours, theirs = BUFFERS[name]
    expected = m.average(draw(0) if with_base else None, [draw(1), draw(2)])
    states = [draw(1) | {name: theirs if with_base else ours}, draw(2) | {name: theirs}]
    got = m.average(draw(0) | {name: ours} if with_base else None, states)
    assert torch.equal(got[name], ours) and got[name].dtype == ours.dtype
    assert all(torch.equal(got[n], t) for n, t in expected.items())


@pytest.mark.parametrize("name", ["bn.num_batches_tracked", "embeddings.position_ids", "attn_mask"])
def test_a_buffer_in_one_model_alone_is_no_difference(name: str) -> None:
    extra = {name: torch.arange(4)}
    expected = m.average(None, [draw(1), draw(2)])
    assert m.average(None, [draw(1), draw(2) | extra]).keys() == expected.keys()
    assert torch.equal(m.average(None, [draw(1) | extra, draw(2)])[name], extra[name])


def test_one_number_has_any_shape() -> None:
    for ours, theirs in (((), (1,)), ((1,), ()), ((1, 1), (1,))):
        found = m.average(None, [{"logit_scale": torch.full(ours, 4.0)}, {"logit_scale": torch.full(theirs, 6.0)}])
        assert torch.equal(found["logit_scale"], torch.full(ours, 5.0))
        fishers = [{"logit_scale": torch.full(theirs, 1.0)}, {"logit_scale": torch.full(theirs, 3.0)}]
        states = [{"logit_scale": torch.full(ours, 4.0)}, {"logit_scale": torch.full(theirs, 6.0)}]
        assert m.fisher_average(None, states, fishers=fishers)["logit_scale"].item() == 5.5


def tied(seed: int, *, stored: bool) -> State:
    state = {"embed.weight": draw(seed)["b.weight"]}
    return state | ({"head.weight": state["embed.weight"].clone()} if stored else {})


def test_tied_tensors_may_be_stored_once_or_twice() -> None:
    expected = (tied(0, stored=True)["embed.weight"] + tied(1, stored=True)["embed.weight"]) / 2
    both = m.average(None, [tied(0, stored=True), tied(1, stored=False)])
    assert both.keys() == {"embed.weight", "head.weight"} and all(torch.allclose(t, expected) for t in both.values())
    one = m.average(None, [tied(0, stored=False), tied(1, stored=True)])
    assert one.keys() == {"embed.weight"} and torch.allclose(one["embed.weight"], expected)


EXTRA: dict[str, Callable[[State], State]] = {
    "a head more": lambda s: s | {"head.weight": torch.ones(3, 4)},
    "an untied head": lambda s: s | {"head.weight": s["b.weight"] + 1},
    "a head less": lambda s: {n: t for n, t in s.items() if n != "a.bias"},
    "another number of classes": lambda s: s | {"a.bias": torch.ones(9)},
}


@pytest.mark.parametrize("name", EXTRA)
def test_missing_says_what_happens_to_other_tensors(name: str, tmp_path: Path) -> None:
    states = [draw(0), draw(1), EXTRA[name](draw(2))]
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    with pytest.raises(ValueError, match=r"experts\[1\].*2\.safetensors.*missing='drop' \(--missing drop\)"):
        m.merge_files(m.task_arithmetic, paths[0], paths[1:], tmp_path / "out.safetensors")
    common = [n for n in draw(0) if n in states[2] and states[2][n].shape == draw(0)[n].shape]
    first, *others = ({n: state[n] for n in common} for state in states)
    expected = m.task_arithmetic(first, others)
    for missing in ("drop", "base"):
        m.merge_files(m.task_arithmetic, paths[0], paths[1:], tmp_path / "out.safetensors", missing=missing)
        found = load_file(tmp_path / "out.safetensors")
        assert set(found) == set(common if missing == "drop" else draw(0))
        assert all(torch.equal(found[n], t) for n, t in expected.items())
        assert all(torch.equal(found[n], draw(0)[n]) for n in found if n not in common)


@pytest.mark.parametrize("prefix", ["model.", "clip.visual.", "image_encoder."])
def test_a_prefix_is_named(prefix: str) -> None:
    for base, expert, whose in (
        (draw(0), named(prefix)(draw(1)), r"experts\[0\]"),
        (named(prefix)(draw(0)), draw(1), "base"),
    ):
        with pytest.raises(ValueError, match=rf"the names of {whose} begin with '{prefix}'; remove this prefix"):
            m.task_arithmetic(base, [expert])


def test_models_without_a_common_tensor_and_wrong_choices_are_refused() -> None:
    for missing in ("drop", "base"):
        with pytest.raises(ValueError, match="must have tensors in common with base"):
            m.match(draw(0), [{"x": torch.ones(2)}], missing=missing)
    with pytest.raises(ValueError, match="missing must be one of refuse, base, drop, got 'keep'"):
        m.match(draw(0), [draw(1)], missing="keep")
    for ours, theirs in (
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.5])),
    ):
        with pytest.raises((ValueError, TypeError), match=r"experts\[1\]\['codes'\] must"):
            m.average(None, [{"codes": ours}, {"codes": theirs}])


# -- the output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.pt", "out.bin", "out.ckpt", "out.pth"])
def test_an_ending_promises_a_format(name: str, tmp_path: Path) -> None:
    save_file(draw(0), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"must be a .safetensors file, got .*{name}"):
        m.merge_files(m.average, None, [tmp_path / "a.safetensors"], tmp_path / name)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(draw(0), tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    monkeypatch.setattr("mergetune.merging.stream.prepared", None)  # the first step of the work
    for out, said in (("folder.safetensors", "got the folder"), ("file/out.safetensors", "file")):
        with pytest.raises((ValueError, OSError), match=said):
            m.merge_files(m.average, None, [tmp_path / "a.safetensors"], tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "file", "folder.safetensors"]


MERGE = """
import sys, time
from mergetune import merging as m
from mergetune.merging import stream
real = stream.merged_pieces
def slowly(*arguments):
    for item in real(*arguments):
        yield item
        print("working", flush=True)
        time.sleep(600)
stream.merged_pieces = slowly
m.merge_files(m.average, None, sys.argv[1:3], sys.argv[3])
"""


def test_a_killed_merge_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for k, path in enumerate(paths):
        save_file(draw(k), path)
    out = tmp_path / "out.safetensors"
    process = subprocess.Popen([sys.executable, "-c", MERGE, *paths, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and len(os.listdir(tmp_path)) == 4  # the inputs, a part and a lock
    m.merge_files(m.average, None, paths, tmp_path / "another.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors", "another.safetensors"]


@pytest.mark.slow
def test_kills_at_any_moment_change_no_bits_and_leave_nothing(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for k, path in enumerate(paths):
        generator = torch.Generator().manual_seed(k)
        save_file({str(n): torch.randn(2_000_000, generator=generator) for n in range(4)}, path)
    m.merge_files(m.ties, paths[0], paths[1:], tmp_path / "expected.safetensors")
    command = "import sys; from mergetune import merging as m; print(1, flush=True); "
    command += "m.merge_files(m.ties, sys.argv[1], sys.argv[2:4], sys.argv[4])"
    out = tmp_path / "out.safetensors"
    for moment in range(20):
        process = subprocess.Popen([sys.executable, "-c", command, *paths, out], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.05 * moment)
        process.kill()
        process.wait()
        assert not out.exists() or out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    m.merge_files(m.ties, paths[0], paths[1:], out)
    assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted([*(p.name for p in paths), "expected.safetensors", "out.safetensors"])


# -- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two fine-tunes of the embedded CLIP, as two trainers save them, and the folder of the CLIP itself."""
    folder = tmp_path_factory.mktemp("tunes")
    with as_file(files("mergetune") / "assets" / "icon-clip") as clip:
        config, weights = (clip / "open_clip_config.json").read_text(), load_file(clip / "open_clip_model.safetensors")
    for k, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(k)
        state = {
            n: t + k * 0.01 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t + k
            for n, t in weights.items()
        }
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(config)
        if name == "two":
            wrapped = {f"module.{n}": t.float() for n, t in state.items()} | {
                "module.logit_scale": state["logit_scale"][None]
            }
            torch.save({"epoch": 1, "state_dict": wrapped}, folder / name / "open_clip_pytorch_model.bin")
        else:
            save_file(state, folder / name / "open_clip_model.safetensors")
    return [folder / name for name in ("base", "one", "two")]


@pytest.mark.parametrize("method", ["average", "ties", "task_arithmetic"])
def test_fine_tunes_of_a_clip_merge_and_load(method: str, tunes: list[Path], tmp_path: Path) -> None:
    base, *experts = tunes
    m.merge_files(getattr(m, method), base, experts, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path / "merged")) == ["open_clip_config.json", "open_clip_model.safetensors"]
    clip = mt.load_clip(f"local-dir:{tmp_path / 'merged'}")
    assert clip.class_embeddings(["cat", "dog"], "an icon of a {}").isfinite().all()
    found = load_file(tmp_path / "merged" / "open_clip_model.safetensors")
    assert {str(t.dtype) for t in found.values()} == {"torch.float16", "torch.int64"}
    assert (
        found["visual.bn1.num_batches_tracked"].item()
        == load_file(base / "open_clip_model.safetensors")["visual.bn1.num_batches_tracked"].item()
    )
    again = tmp_path / "again"
    m.merge_files(m.average, None, [experts[1], tmp_path / "merged"], again)  # the first is a torch file with a prefix
    assert mt.load_clip(f"local-dir:{again}").embed_dim == 128
