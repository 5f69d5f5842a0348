"""Builds two commits and compares, bit for bit, what their command lines leave on this machine.

    python tests/slow/same_bits.py main HEAD --quick
    python tests/slow/same_bits.py v0.1.0 HEAD --only merge export --keep /tmp/bits

A change that only moves code must leave every item "same". Nothing is stored between runs. Only the command line and
the files that it writes are used, so the two commits may differ in all their modules. Each commit gets a virtual
environment of its own, which shares the dependencies of the Python that runs this script (git, g++, cmake, ninja and
pybind11 are needed). Both commits run in the same folder, one after the other, on the same inputs, which OLD makes.
What may differ is listed in `MAY_DIFFER`, with reasons; everything else that goes to files and stdout is compared.

Exit codes: 0 all the same, 1 a difference or a command that fails, 2 a wrong argument or a build that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
INPUTS = "../../../inputs"  # as a step sees them: it runs in run/ITEM/NAME
MODEL = ["--backbone", f"local-dir:{INPUTS}/icon-clip"]
TRAIN, TEST = ["--cache", f"{INPUTS}/cache/train"], ["--cache", f"{INPUTS}/cache/test"]
TEMPLATE = "a photo of a {}."
CLASSES = ("anchor", "apple", "bell", "book", "camera", "heart")
PROMPTS = [f"{INPUTS}/{name}" for name in ("coop-1", "coop-2", "kgcoop")]
HEADS = [f"{INPUTS}/{name}" for name in ("head-1", "head-2")]


@dataclass(frozen=True)
class MayDiffer:
    """A place in a JSON file that two runs of one commit fill differently.

    Attributes:
        place: pattern of the keys and indices on the way to it, joined by "/".
        reason: why it may differ.
    """

    place: str
    reason: str


MAY_DIFFER = (
    MayDiffer("*timings/seconds", "how long training took"),
    MayDiffer("*timings/ms_per_step", "how long training took"),
    MayDiffer("milliseconds_per_step/*", "how long the demo's training took"),
    MayDiffer("candidates/*/seconds", "how long a candidate of compare took"),
    MayDiffer("lines/*/seconds", "how long a line of compare took"),
    MayDiffer("versions/mergetune", "the version of the commit itself"),
    MayDiffer("shards/*/images/*/2", "when the demo wrote its image files"),
    MayDiffer("images/mtime_ns/*", "when the demo wrote its image files"),
    MayDiffer("checksum", "the checksum over these times"),
    MayDiffer("mtime_ns", "when a cache was written"),
    MayDiffer("inode", "where a cache was written"),
)
SECONDS_COLUMN = "s"  # of the tables in Markdown that compare writes: how long a line took


# -- the steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        item: what `--only` selects.
        name: of its line in the report, and of its folder.
        arguments: of `mergetune`.
    """

    item: str
    name: str
    arguments: tuple[str, ...]


def preparation() -> list[Step]:
    """The commands of OLD that make the inputs of both commits."""
    tune = ["tune", *TRAIN, *MODEL, "--epochs", "4", "--shots", "12", "--lr", "0.2"]  # far apart, for the merges
    trained = {
        "coop-1": [],
        "coop-2": ["--seed", "2"],
        "kgcoop": ["--method", "kgcoop"],
        "head-1": ["--method", "head"],
        "head-2": ["--method", "head", "--seed", "2"],
    }
    steps = {"cache": ["cache", f"{INPUTS}/images", "--out", f"{INPUTS}/cache", *MODEL]}
    steps |= {name: [*tune, "--out", f"{INPUTS}/{name}", *options] for name, options in trained.items()}
    return [Step("inputs", name, tuple(arguments)) for name, arguments in steps.items()]


def demo_steps(quick: bool) -> dict[str, list[str]]:
    return {"table": ["demo", "--out", "out", "--json", *(["--seed", "1"] if quick else [])]}


def compare_steps(quick: bool) -> dict[str, list[str]]:
    few = ["--expert", "coop:1", "--seeds", "1", "--shots", "4", "--lam", "8", "--tau", "0.3"]
    short = ["--tune", "epochs=2", "--fit", "epochs=2"]
    arguments = ["compare", "--demo", "--out", "out", "--partition", "0", "--json"]
    return {"partition 0": [*arguments, *(few + short if quick else [])]}


def cache_steps(quick: bool) -> dict[str, list[str]]:
    cache = ["cache", f"{INPUTS}/images", "--out", "out", *MODEL, "--json"]
    return {
        "float32": cache,
        "bfloat16, 2 views": [*cache, "--dtype", "bfloat16", "--views", "2", "--batch-size", "7"],
    }


def train_steps(quick: bool) -> dict[str, list[str]]:
    common = [*TRAIN, *MODEL, "--out", "out", "--epochs", "2" if quick else "6", "--json"]
    fit = ["fit", *common, "--tuned", PROMPTS[0]]
    return {
        "tune coop": ["tune", *common, "--classes", "base"],
        "tune kgcoop": ["tune", *common, "--method", "kgcoop", "--shots", "8"],
        "tune head": ["tune", *common, "--method", "head"],
        "tune from a random start": ["tune", *common, "--n-ctx", "4"],
        "fit": fit,
        "fit two anchors": [*fit, "--tuned", PROMPTS[2], "--beta", "0.5", "--beta", "0.1", "--grid", "random"],
        "fit fisher, parameter": [*fit, "--surrogate", "fisher", "--space", "parameter", "--grid", "official"],
        "fit several templates": [*fit, "--template", TEMPLATE, "--template", "an icon of a {}."],
        "fit a head": ["fit", *common, "--tuned", HEADS[0]],
        "fit from images": [
            "fit", f"{INPUTS}/images", *MODEL, "--out", "out", "--classes", "base", "--shots", "8", "--epochs", "2",
            "--json",
        ],
    }  # fmt: skip


# What the methods of merging need. A method that is named nowhere here is given all experts and the base, no options.
MOST = {"wise_ft": 1, "compeft": 1, "slerp": 2}  # experts
NO_BASE = ("slerp", "lora_lego")
FROM_IMAGES = (
    "adamerging", "evolve", "expert_merging", "fisher_average", "metrics_average", "natural_niches", "ota_ffg",
)  # fmt: skip
NOT_FOR_SOLUTIONS = ("lines", "lora_lego")  # they need names with block numbers, and LoRA factors
LEFT_OUT = {"layerwise": "its coefficients cannot be given as text"}
NOT_FOR_FILES = ("adamerging", "evolve", "expert_merging", "natural_niches")  # they need a model
OPTIONS = {
    "adamerging": ["steps=20"],
    "evolve": ["trials=12"],
    "expert_merging": ["steps=20"],
    "natural_niches": ["steps=40", "population=6"],
}
OPTIONS_FOR_FILES = {
    "fisher_average": [f"fishers={INPUTS}/square-1.safetensors,{INPUTS}/square-2.safetensors"],
    "lines": ["beta=0.4"],
    "metrics_average": ["metrics=0.4,0.7"],
    "ota_ffg": [f"second_moments={INPUTS}/square-1.safetensors,{INPUTS}/square-2.safetensors"],
}


def merge_steps(methods: Sequence[str]) -> dict[str, list[str]]:
    """One merge of each method: of prompts, of heads and of files, where the method is for them."""
    steps = {}
    for method in methods:
        if method in LEFT_OUT:
            continue
        options = OPTIONS.get(method, [])
        solutions = {} if method in NOT_FOR_SOLUTIONS else {"prompts": PROMPTS, "heads": HEADS}
        for kind, experts in solutions.items():
            base = [] if method in NO_BASE else ["--base", TEMPLATE]
            images = TRAIN if method in FROM_IMAGES else []
            arguments = [
                "merge",
                method,
                *experts[: MOST.get(method)],
                "--out",
                "out",
                "--json",
                *base,
                *images,
                *MODEL,
            ]
            steps[f"{method}, {kind}"] = _with_options(arguments, options)
        if method not in NOT_FOR_FILES:
            kind = "lora" if method == "lora_lego" else "state"
            files = [f"{INPUTS}/{kind}-{i}.safetensors" for i in (1, 2)][: MOST.get(method)]
            base = [] if method in NO_BASE else ["--base", f"{INPUTS}/state-0.safetensors"]
            arguments = ["merge", method, *files, "--out", "out.safetensors", "--json", *base]
            steps[f"{method}, files"] = _with_options(arguments, [*options, *OPTIONS_FOR_FILES.get(method, [])])
    return steps


def _with_options(arguments: list[str], options: Sequence[str]) -> list[str]:
    return [*arguments, *(word for option in options for word in ("--option", option))]


def export_steps(quick: bool) -> dict[str, list[str]]:
    named = [*MODEL, "--classnames", f"{INPUTS}/names.txt"]
    prompt, head = PROMPTS[2], HEADS[0]
    return {
        "coop": ["export", prompt, "--to", "coop", "--out", "out", *named],
        "coop, half": ["export", prompt, "--to", "coop", "--out", "out", *named, "--half"],
        "head, safetensors": ["export", prompt, "--to", "head", "--out", "out.safetensors", *named],
        "head, npz": ["export", prompt, "--to", "head", "--out", "out.npz", *named],
        "head, pt": ["export", head, "--to", "head", "--out", "out.pt"],
        "classifier of a prompt": ["export", prompt, "--to", "classifier", "--out", "out.pt", *named],
        "classifier of a head": ["export", head, "--to", "classifier", "--out", "out.pt", *MODEL],
        "hub, prompt": ["export", prompt, "--to", "hub", "--out", "out", "--license", "mit"],
        "hub, head": ["export", head, "--to", "hub", "--out", "out"],
    }


def measure_steps(quick: bool) -> dict[str, list[str]]:
    measured = ["--solution", PROMPTS[0], "--solution", PROMPTS[2]]
    walk = ["path", *TEST, *MODEL, "--tuned", PROMPTS[0], "--solution", PROMPTS[2], "--points", "5", "--json"]
    return {
        "eval": ["eval", *TEST, *MODEL, *measured, "--solution", HEADS[0], "--json"],
        "eval, base and novel": ["eval", *TEST, *MODEL, *measured, "--base-novel", "--json"],
        "path": [*walk, "--plane", "plane.png", "--report", "report.html", "--curvature", "2"],
        "path, parameter": [*walk, "--space", "parameter"],
    }


ITEMS: dict[str, Callable[[bool], dict[str, list[str]]]] = {
    "cache": cache_steps,
    "train": train_steps,
    "merge": lambda quick: {},  # the methods are asked of OLD
    "export": export_steps,
    "measure": measure_steps,
    "demo": demo_steps,
    "compare": compare_steps,
}


# -- building and running ---------------------------------------------------------------------------------------------


def build(commit: str, place: Path) -> Path:
    """The virtual environment of a commit below `place`, made if it is not there."""
    environment = place / commit
    if (environment / "built").is_file():
        return environment
    print(f"building {commit[:12]}", file=sys.stderr)
    source = place / f"{commit}.source"
    if source.exists():  # of a run that was killed
        _git("worktree", "remove", "--force", str(source))
    _git("worktree", "add", "--force", "--detach", str(source), commit)
    try:
        shutil.rmtree(environment, ignore_errors=True)
        venv.create(environment, symlinks=True)
        python = environment / "bin" / "python"
        found = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        # Only paths: what .pth files in these folders would add, an editable mergetune among it, is not added.
        Path(found.strip(), "shared.pth").write_text("\n".join(shared) + "\n")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--disable-pip-version-check", "--no-cache-dir", source]
        made = subprocess.run(command, env=_environment(1), capture_output=True, text=True)
        if made.returncode:
            sys.exit(_fail(f"{commit} does not build:\n{made.stdout[-3000:]}{made.stderr[-3000:]}"))
    finally:
        _git("worktree", "remove", "--force", str(source))
    (environment / "built").touch()
    return environment


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)} fails: {done.stderr.strip()}")
    return done.stdout.strip()


def _environment(threads: int) -> dict[str, str]:
    """The environment of every build and run: threads fixed, no network, no MERGETUNE_* and PYTHON* variables."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR", "CXX", "CC") if name in os.environ}
    tools = [str(Path(sys.executable).parent)]
    for name, folder in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        try:
            tools.append(str(getattr(__import__(name), folder)))
        except ImportError:  # then it must be on PATH
            continue
    return kept | {
        "PATH": os.pathsep.join([*tools, os.environ["PATH"]]),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "200",
        "TERM": "dumb",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def play(file: Path) -> None:
    """Runs the steps of a JSON file, in the Python of a built commit: each in a process forked from this one.

    The entry point `mergetune` and its dependencies are imported once, which is most of the time of a short command.
    """
    content = json.loads(file.read_text())
    (command,) = entry_points(group="console_scripts", name="mergetune")
    app = command.load()
    imported = Path(sys.modules["mergetune"].__file__ or "")
    if Path(sys.prefix) not in imported.parents:
        raise SystemExit(f"mergetune must come from {sys.prefix}, got {imported}")
    import open_clip  # noqa: F401
    import torch  # noqa: F401

    for step in content["steps"]:
        folder = Path(content["run"], step["item"], step["name"])
        folder.mkdir(parents=True)
        as_json = "--json" in step["arguments"]
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.chdir(folder)
                for stream, name in ((1, "stdout.json" if as_json else "stdout.txt"), (2, f"../{step['name']}.stderr")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644), stream)
                sys.argv = ["mergetune", *step["arguments"]]
                app()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folder.with_name(f"{step['name']}.exit").write_text(str(code))


class Place:
    """The folder of a comparison: builds, inputs, and the runs of both commits."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.inputs, self.run = folder / "inputs", folder / "run"

    def play(self, environment: Path, steps: Sequence[Step]) -> None:
        """Runs steps in `run`, by a link to the build, so that the paths of both commits are the same."""
        link, file = self.folder / "build", self.folder / "steps.json"
        link.unlink(missing_ok=True)
        link.symlink_to(environment)
        content = {"run": str(self.run), "steps": [vars(step) for step in steps]}
        file.write_text(json.dumps(content))
        command = [link / "bin" / "python", Path(__file__).resolve(), "--play", file]
        if subprocess.run(command, env=_environment(self.threads), cwd=self.folder).returncode:
            raise ValueError(f"the commands of {environment.name} could not be run")

    def exit_code(self, side: Path, step: Step) -> int:
        return int((side / step.item / f"{step.name}.exit").read_text())

    def said(self, side: Path, step: Step) -> str:
        """The last line that a step wrote to stderr."""
        lines = (side / step.item / f"{step.name}.stderr").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"

    def prepare(self, old: Path) -> list[str]:
        """Makes the inputs, and gives the names of OLD's methods of merging."""
        shutil.rmtree(self.inputs, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)
        self.inputs.mkdir()
        (model,) = (old / "lib").rglob("icon-clip")
        shutil.copytree(model, self.inputs / "icon-clip")
        with zipfile.ZipFile(model.parent / "tilted-icons.zip") as archive:
            wanted = [name for name in archive.namelist() if name.split("/")[1] in CLASSES]
            archive.extractall(self.inputs / "images", wanted)
        (self.inputs / "names.txt").write_text("\n".join(CLASSES) + "\n")
        write_state_dicts(self.inputs)
        steps = [*preparation(), Step("inputs", "methods", ("merge", "--list", "--json"))]
        self.play(old, steps)
        for step in steps:
            if self.exit_code(self.run, step):
                raise ValueError(f"OLD cannot make the inputs: mergetune {' '.join(step.arguments)}: "
                                 f"{self.said(self.run, step)}")  # fmt: skip
        methods = json.loads((self.run / "inputs" / "methods" / "stdout.json").read_text())
        return [method["name"] for method in methods]


def write_state_dicts(folder: Path) -> None:
    """Small state dicts as .safetensors: a base, two experts, squares for Fisher diagonals, and two LoRA adapters."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"blocks.0.weight": (24, 16), "blocks.1.weight": (24, 16), "blocks.1.bias": (24,), "rounded": (40,)}
    base = {name: normal(*shape) for name, shape in shapes.items()}
    states = [base, *({name: t + 0.1 * normal(*t.shape) for name, t in base.items()} for _ in range(2))]
    for i, state in enumerate(states):
        rounded = {"rounded": state["rounded"].bfloat16(), "steps": torch.tensor(7)}
        save_file(state | rounded, folder / f"state-{i}.safetensors")
        save_file({name: t.square() for name, t in state.items()}, folder / f"square-{i}.safetensors")
    for i, rank in ((1, 2), (2, 3)):
        factors = {"layer.lora_A.weight": normal(rank, 16), "layer.lora_B.weight": normal(24, rank)}
        save_file(factors, folder / f"lora-{i}.safetensors")


# -- comparing --------------------------------------------------------------------------------------------------------


def differences(old: Path, new: Path) -> Iterator[str]:
    """What differs between two folders, a sentence for each file."""
    names = {side: {p.relative_to(side).as_posix() for p in side.rglob("*") if p.is_file()} for side in (old, new)}
    for name in sorted(names[old] | names[new]):
        if name not in names[old] or name not in names[new]:
            yield f"{name}: only {'OLD' if name in names[old] else 'NEW'} has it"
        elif found := difference(old / name, new / name):
            yield f"{name}: {found}"


def difference(old: Path, new: Path) -> str | None:
    """The first difference of two files beside `MAY_DIFFER`, or None."""
    contents = old.read_bytes(), new.read_bytes()
    if contents[0] == contents[1]:
        return None
    if old.suffix == ".json":
        return _json_difference(*contents)
    if old.suffix == ".md":
        return _text_difference(*(_without_seconds(content.decode()) for content in contents))
    if old.suffix == ".safetensors":
        if _cut_safetensors(contents[0]) == _cut_safetensors(contents[1]):
            return None
        return _tensor_difference(*(_read_safetensors(content) for content in contents))
    if old.suffix in (".pt", ".npz") or old.name.startswith("model.pth"):
        return _tensor_difference(*(_read_arrays(file) for file in (old, new)))
    return _byte_difference(*contents)


def _byte_difference(old: bytes, new: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return f"{len(old)} and {len(new)} bytes, the first difference at byte {at}"


def _json_difference(old: bytes, new: bytes) -> str | None:
    replaced: list[str] = []
    values = [_settled(json.loads(content), "", replaced) for content in (old, new)]
    if (found := _value_difference(*values, "")) is not None:
        return found
    return None if replaced else "the same content in another layout"


def _settled(value: Any, place: str, replaced: list[str]) -> Any:
    """A JSON value without what may differ; `replaced` takes the places."""
    if any(fnmatchcase(place, rule.place) for rule in MAY_DIFFER):
        replaced.append(place)
        return "may differ"
    inner = f"{place}/" if place else ""
    if isinstance(value, dict):
        return {name: _settled(item, f"{inner}{name}", replaced) for name, item in value.items()}
    if isinstance(value, list):
        return [_settled(item, f"{inner}{i}", replaced) for i, item in enumerate(value)]
    return value


def _value_difference(old: Any, new: Any, place: str) -> str | None:
    if json.dumps(old) == json.dumps(new):  # texts: NaN is NaN, 1 is not 1.0, the order of keys counts
        return None
    inner = f"{place}/" if place else ""
    if isinstance(old, dict) and isinstance(new, dict):
        if list(old) != list(new):
            odd = sorted(old.keys() ^ new.keys())
            return f"{place or 'top'}: {f'keys {odd[:5]} on one side' if odd else 'another order of keys'}"
        found = (_value_difference(old[name], new[name], f"{inner}{name}") for name in old)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = (_value_difference(a, b, f"{inner}{i}") for i, (a, b) in enumerate(zip(old, new, strict=True)))
    else:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new))
        apart = f", {abs(old - new):.3g} apart" if numbers else ""
        return f"{place or 'top'}: {_short(old)} and {_short(new)}{apart}"
    return next(text for text in found if text)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_seconds(text: str) -> str:
    """A table in Markdown without its column of seconds."""
    rows = [line.split(" | ") for line in text.splitlines()]
    at = rows[0].index(SECONDS_COLUMN) if SECONDS_COLUMN in rows[0] else None
    return "\n".join(" | ".join(cell for i, cell in enumerate(row) if i != at) for row in rows)


def _text_difference(old: str, new: str) -> str | None:
    if old == new:
        return None
    lines = zip(old.splitlines(), new.splitlines(), strict=False)
    number = next((i for i, (a, b) in enumerate(lines, 1) if a != b), "of the end")
    return f"line {number} differs"


def _read_safetensors(content: bytes) -> tuple[dict[str, Any], Any]:
    """Tensors, and what else the header says."""
    from safetensors.torch import load

    return load(content), json.loads(_cut_safetensors(content)[0])


def _cut_safetensors(content: bytes) -> tuple[str, bytes]:
    """The header in its order, but for the metadata, and the numbers.

    safetensors writes the metadata in the order of its hashes, which differ from process to process.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return json.dumps(header), content[end:]


def _read_arrays(file: Path) -> tuple[dict[str, Any], Any]:
    """Tensors by their place in an .npz or .pt file, and the rest of the content as text."""
    import numpy as np
    import torch

    if file.suffix == ".npz":
        with np.load(file) as arrays:
            content: Any = {name: arrays[name] for name in arrays.files}
    else:
        content = torch.load(file, map_location="cpu", weights_only=True)
    tensors: dict[str, Any] = {}

    def visit(value: Any, place: str) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor):
            tensors[place or "tensor"] = value
            return f"tensor {place}"
        if isinstance(value, dict):
            return {str(name): visit(item, f"{place}/{name}".strip("/")) for name, item in value.items()}
        return repr(value)

    rest = visit(content, "")
    return tensors, rest


def _tensor_difference(old: tuple[dict[str, Any], Any], new: tuple[dict[str, Any], Any]) -> str:
    """The first tensor that differs; files with the same tensors and the same rest differ in their layout."""
    import torch

    tensors = old[0], new[0]
    if odd := sorted(tensors[0].keys() ^ tensors[1].keys()):
        return f"tensors {odd[:5]} on one side"
    worst, first, count = 0.0, None, 0
    for name, a in tensors[0].items():
        b = tensors[1][name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"tensor {name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        if not torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b))):
            apart = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
            worst, first, count = max(worst, apart.max().item()), first or name, count + 1
    if first:
        return f"tensor {first} (and {count - 1} more): largest absolute difference {worst:.3g}"
    return _value_difference(old[1], new[1], "") or "the same content in another layout"


# -- the whole --------------------------------------------------------------------------------------------------------


def steps_of(items: Sequence[str], methods: Sequence[str], quick: bool) -> list[Step]:
    found = []
    for item in items:
        commands = merge_steps(methods) if item == "merge" else ITEMS[item](quick)
        found += [Step(item, name, tuple(arguments)) for name, arguments in commands.items()]
    return found


def report(place: Place, steps: Sequence[Step], old: Path, new: Path) -> bool:
    """Prints a line for each step; whether all are the same."""
    width = max(len(f"{step.item}: {step.name}") for step in steps)
    wrong = 0
    for step in steps:
        codes = [place.exit_code(side, step) for side in (old, new)]
        if any(codes):
            said = "; ".join(
                f"{title} exits with {code}: {place.said(side, step)}"
                for title, side, code in (("OLD", old, codes[0]), ("NEW", new, codes[1]))
                if code
            )
            found = [f"FAILED  {said}"]
        else:
            found = [
                f"different  {text}" for text in differences(old / step.item / step.name, new / step.item / step.name)
            ]
        wrong += bool(found)
        count = sum(1 for file in (old / step.item / step.name).rglob("*") if file.is_file())
        for line in found[:3] or [f"same  ({count} files)"]:
            print(f"{f'{step.item}: {step.name}':{width}}  {line}")
        if len(found) > 3:
            print(f"{'':{width}}  ... and {len(found) - 3} more files")
    if any(step.item == "merge" for step in steps):
        for method, why in LEFT_OUT.items():
            print(f"left out: merge {method}: {why}")
    print(f"{len(steps) - wrong} of {len(steps)} commands left the same bits")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two commits bit for bit, by their command lines and files.")
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="a commit")
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), help="items to compare")
    parser.add_argument("--quick", action="store_true", help="demo with one seed, compare with few short runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep builds and results here; builds are reused")
    parser.add_argument("--threads", type=int, default=1, help="of every command (default: 1)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        try:
            commits = [_git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (arguments.old, arguments.new)]
            folder = (arguments.keep or Path(temporary)).resolve()
            (folder / "builds").mkdir(parents=True, exist_ok=True)
            environments = [build(commit, folder / "builds") for commit in commits]
            place = Place(folder, arguments.threads)
            methods = place.prepare(environments[0])
            steps = steps_of(arguments.only, methods, arguments.quick)
            sides = folder / "old", folder / "new"
            for side, environment in zip(sides, environments, strict=True):
                shutil.rmtree(side, ignore_errors=True)
                for item in arguments.only:
                    started = time.perf_counter()
                    place.play(environment, [step for step in steps if step.item == item])
                    print(f"{side.name}: {item}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
                place.run.rename(side)
        except ValueError as error:
            return _fail(f"error: {error}")
        same = report(place, steps, *sides)
        print(f"{commits[0][:12]} and {commits[1][:12]}, {time.perf_counter() - began:.0f} s")
        return 0 if same else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(Path(sys.argv[2]))
    else:
        sys.exit(main())
