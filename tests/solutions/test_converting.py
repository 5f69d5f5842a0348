"""`mergetune convert`: each tensor of a file is written under its name, left out by name, or refused by name."""

import collections
import dataclasses
import functools
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import context
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mergetune import open_solution
from mergetune.cli import app
from mergetune.io import convert_module
from mergetune.io.pickled_modules import read_module

HOW = ("pickle 2", "pickle 5", "zip", "legacy")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("here")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(content, how: str, file: str = "file.pt") -> Path:
    if how.startswith("pickle"):
        Path(file).write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    return Path(file)


class Subclass(Tensor):
    pass


class SubParameter(nn.Parameter):
    pass


@dataclasses.dataclass
class Bag:
    first: Tensor
    others: list


Point = collections.namedtuple("Point", "x y")


def numbered(n: int) -> Tensor:
    return context(2, 3) + n


def attributed(n: int) -> Tensor:
    tensor = numbered(n)
    tensor.note, tensor.scale = "text", numbered(n + 1)
    return tensor


T = numbered
FORMS = {  # content -> {name: tensor}
    "plain": (T(0), {"": T(0)}),
    "attributes": (attributed(0), {"": T(0), ".scale": T(1)}),
    "attributes of a parameter": (nn.Parameter(T(0)), {"": T(0)}),
    "subclass": (T(0).as_subclass(Subclass), {"": T(0)}),
    "parameter subclass": (SubParameter(T(0)), {"": T(0)}),
    "torch.nn.Buffer": (nn.Buffer(T(0)), {"": T(0)}),
    "array": (T(0).numpy(), {"": T(0)}),
    "array in Fortran's order": (np.asfortranarray(T(0).numpy()), {"": T(0)}),
    "big-endian array": (T(0).numpy().astype(">f4"), {"": T(0)}),
    "scalars": ([np.float64(2.5), np.int16(3)], {".0": torch.tensor(2.5).double(), ".1": torch.tensor(3).short()}),
    "array of objects": (np.array([{"a": T(0)}, None], dtype=object), {".0.a": T(0)}),
    "set": ({T(0)}, {".0": T(0)}),
    "frozenset": (frozenset([T(0)]), {".0": T(0)}),
    "tuple and list": ((T(0), [1, T(1)]), {".0": T(0), ".1.1": T(1)}),
    "dataclass": (Bag(T(0), [T(1)]), {".first": T(0), ".others.0": T(1)}),
    "namedtuple": (Point(T(0), T(1)), {".0": T(0), ".1": T(1)}),
    "deque": (collections.deque([T(0), T(1)]), {".0": T(0), ".1": T(1)}),
    "default dict": (collections.defaultdict(list, {"a": [T(0)]}), {".a.0": T(0)}),
    "float8": (T(0).to(torch.float8_e4m3fn), {"": T(0).to(torch.float8_e4m3fn)}),
    "complex": (T(0).to(torch.complex64), {"": T(0).to(torch.complex64)}),
}


@pytest.mark.parametrize("how", HOW)
def test_tensors_in_every_form_are_read_alike_from_every_format(how):
    content, expected = {}, {}
    for form, (value, found) in FORMS.items():
        content[form] = value
        expected |= {f"{form}{name}": tensor for name, tensor in found.items()}
    found = read_module(write(content, how))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and type(found[name]) is Tensor, name
        assert found[name].tolist() == tensor.tolist() if tensor.dtype.itemsize > 1 else True, name
    assert found["float8"].float().equal(expected["float8"].float())
    with pytest.raises(ValueError, match=r"'float8' must be float64, .* got float8_e4m3fn"):
        convert_module("file.pt", "out.safetensors")


def test_arguments_and_states_of_objects_are_searched():
    part = functools.partial(print, T(0), x=T(1))
    assert sorted(t.mean().item() for t in read_module(write({"a": part}, "pickle 4")).values()) == sorted(
        t.mean().item() for t in (T(0), T(1))
    )
    assert read_module(write({T(0): 1, "b": T(1)}, "zip")).keys() == {"key 0", "b"}


class Elsewhere(Tensor):
    """A tensor whose numbers are those of another one, as quantisation libraries have them."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        raise NotImplementedError


REFUSED = {
    "sparse": lambda: T(0).to_sparse(),
    "sparse, rows": lambda: T(0).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(T(0), 0.1, 0, torch.qint8),
    "quantised by channel": lambda: torch.quantize_per_channel(
        T(0), torch.ones(2), torch.zeros(2).int(), 0, torch.quint8
    ),
    "meta": lambda: T(0).to("meta"),
    "nested": lambda: torch.nested.nested_tensor([T(0)[0], T(0)[1, :2]]),
    "a view with the flag conj": lambda: T(0).to(torch.complex64).conj(),
    "subclass": lambda: Elsewhere(T(0)),
    "array of complex128": lambda: T(0).numpy().astype("c16"),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_without_plain_numbers_are_refused_by_name(kind, how):
    """Other parts of the file can be read."""
    content = {"good": {"w": T(0)}, "part": {"odd": REFUSED[kind]()}}
    try:
        file = write(content, how)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{how} cannot hold it: {error}"[:80])
    with pytest.raises(ValueError, match=r"file\.pt cannot be read .*'part\.odd' is an? .*only \(--only\)"):
        convert_module(file, "out.safetensors")
    assert torch.equal(read_module(file, only="good")["w"], T(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.tied = self.inner
        self.register_buffer("mask", T(5), persistent=False)
        self.register_buffer("mean", T(6))
        self.cached = [T(7)]


@pytest.mark.parametrize("how", HOW)
def test_a_module_is_its_state_dict_and_the_rest_is_named(how):
    model = Model()
    done = convert_module(write(model, how), "out.safetensors")
    assert done.names == tuple(model.state_dict()) and done.numbers == sum(
        t.numel() for t in model.state_dict().values()
    )
    assert done.left_out == (
        "mask: buffers that the module does not save",
        "cached.0: attributes of modules that are no parameters",
    )
    everything = read_module("file.pt", everything=True)
    assert everything.keys() == {*model.state_dict(), "mask", "cached.0"} and torch.equal(everything["mask"], T(5))


WRAPPERS = [(), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("state_dict", "model"), ("module",)]


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [*((keys, "module.") for keys in WRAPPERS), *((("model",), prefix) for prefix in ("", "_orig_mod.module.module."))],
    ids=str,
)
def test_names_are_those_of_the_model_and_the_states_of_training_are_left_out(keys, prefix):
    layer = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    content = {f"{prefix}a.{name}": tensor for name, tensor in layer.state_dict().items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    content |= {"optimizer": optimiser.state_dict(), "lr_scheduler": {"last": T(1)}, "scaler": {"scale": T(2)}}
    content |= {"ema": {"a.weight": T(3)}, "best": np.float64(81.5)} if keys else {}
    done = convert_module(write(content, "zip"), "out.safetensors")
    assert done.names == ("a.weight", "a.bias") and torch.equal(load_file("out.safetensors")["a.bias"], layer.bias)
    expected = ["optimizer (6 tensors)", "lr_scheduler.last", "scaler.scale"]
    expected = [f"{what.partition('.')[0]} (1 tensor)" if "." in what else what for what in expected]
    expected = [f"{what}: state of the training" for what in expected]
    expected += ["ema (1 tensor): beside the weights", "best: beside the weights"] if keys else []
    assert list(done.left_out) == expected
    everything = read_module("file.pt", everything=True)
    assert len(everything) == 2 + 8 + 2 * bool(keys) and everything["optimizer.state.0.exp_avg"].shape == (2, 3)
    if keys:
        assert torch.equal(read_module("file.pt", only="ema")["a.weight"], T(3))
    assert read_module("file.pt", only="optimizer").keys() >= {"state.1.step"}


@pytest.mark.parametrize("how", HOW)
def test_only_writes_the_names_below_it(how):
    state = {"module.head.weight": T(0), "module.head.bias": T(1), "module.headless.weight": T(2)}
    write({"state_dict": state}, how)
    for only in ("head", "module.head", "state_dict.module.head"):
        assert convert_module("file.pt", "out.safetensors", only=only).names == ("weight", "bias")
    assert convert_module("file.pt", "out.safetensors", only="head.bias").names == ("bias",)
    with pytest.raises(ValueError, match="must hold tensors of hea, got head.weight, head.bias, headless.weight"):
        convert_module("file.pt", "out.safetensors", only="hea")


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors have the name 1"):
        read_module(write({1: T(0), "1": T(1)}, "zip"))


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.plain = T(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.plain.sum()


def test_torchscript_is_converted_and_what_is_no_weight_is_named():
    program = Program()
    torch.jit.script(program).save("file.pt")
    done = convert_module("file.pt", "out.safetensors")
    assert done.names == tuple(program.state_dict()) and done.left_out == (
        "attributes (1 tensor): constants and attributes of the program",
    )
    assert torch.equal(read_module("file.pt", everything=True)["attributes.plain"], T(4))
    assert list(read_module("file.pt", only="inner")) == ["weight", "bias"]


def test_a_prompt_in_a_whole_model_is_taken_out_and_read():
    ctx = context(4, 16)
    whole = {"prompt_learner.ctx": ctx, "image_encoder.conv1.weight": T(1), "text_encoder.text_projection": T(2)}
    write({"state_dict": {f"module.{name}": tensor for name, tensor in whole.items()}, "epoch": 3}, "zip")
    with pytest.raises(ValueError, match=r"2 weights of its towers .* --only module\.prompt_learner"):
        open_solution("file.pt")
    convert_module("file.pt", "prompt.safetensors", only="module.prompt_learner")
    assert torch.equal(open_solution("prompt.safetensors").ctx, ctx)


def test_the_command_counts_what_it_wrote_and_names_what_it_left_out():
    write({"state_dict": {"module.w": T(0)}, "optimizer": {"state": {0: T(1)}, "param_groups": []}}, "zip")
    result = CliRunner().invoke(app, ["convert", "file.pt", "out.safetensors"])
    assert result.stdout.splitlines() == [
        "left out: optimizer (1 tensor): state of the training",
        "w: out.safetensors",
        "read 1 tensor with 6 numbers",
    ]
    result = CliRunner().invoke(app, ["convert", "file.pt", "out.safetensors", "--all"])
    assert "read 2 tensors with 12 numbers" in result.stdout
    with safe_open("out.safetensors", "pt") as opened:
        assert set(opened.keys()) == {"w", "optimizer.state.0"}


def test_bytes_of_arrays_are_bounded_by_the_file():
    """Protocol 5 names a size before the bytes."""
    content = pickle.dumps({"a": T(0).numpy()}, protocol=5)
    at = content.index(pickle.BYTEARRAY8) + 1
    Path("file.pt").write_bytes(content[:at] + (1 << 50).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(ValueError, match="bytes that the file does not have"):
        read_module("file.pt")
    assert io.BytesIO(content).getbuffer().nbytes < 1000
