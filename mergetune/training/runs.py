"""TrainingRun: the state of a run in training, its files for resuming, and FitResult, its result."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mergetune.data import Batches
from mergetune.data.batches import random_views
from mergetune.evaluation import accuracy
from mergetune.facts.brief import brief
from mergetune.io import (
    Count,
    Document,
    Items,
    JsonObject,
    Number,
    fault,
    jsonable,
    own_versions,
    parse_document,
    read_document,
    remove_parts,
    require_regular,
    write_atomically,
    write_json,
    writing_in,
)
from mergetune.solutions import Solution, State, load_solution
from mergetune.training.jobs import LAM_WEIGHT, Job
from mergetune.training.objective import Batch
from mergetune.training.run_settings import differences, images_in_words

if TYPE_CHECKING:
    from typing_extensions import Self

RESULT, STATE = "result.json", "state.safetensors"
ANEW = "delete it to start anew"
NAMED = 3  # most differences in a message


def _numbered(history: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
    for i, entry in enumerate(history):
        if entry.get("epoch") != i + 1:
            raise fault((i, "epoch"), f"{i + 1}", entry.get("epoch"))
    return history


History = Annotated[Items[dict[str, Number]], AfterValidator(_numbered)]
"""One entry per epoch, numbered from 1 on: learning rate, loss and its terms by name."""


class ResultFile(Document, frozen=True, extra="ignore"):
    """``result.json``: the fields of :class:`FitResult` but the solution, and the versions of the packages."""

    history: History
    settings: JsonObject
    timings: dict[str, Number]
    versions: dict[str, str] = {}


class RunRecord(Document, frozen=True, extra="ignore"):
    """What a state file says about its run, as its metadata "run".

    Attributes:
        settings: every argument that the result depends on.
        history: the finished epochs.
        best_epoch: the epoch of the best state; 0 before the first.
        digest: checksum of the tensors.
        in_words: descriptions of the settings whose values are checksums; version 0.1 wrote none.
    """

    settings: JsonObject
    history: History
    best_epoch: Count
    digest: str
    in_words: JsonObject = {}

    @model_validator(mode="after")
    def _best_is_finished(self) -> Self:
        if self.best_epoch > len(self.history):
            raise fault(("best_epoch",), f"at most {len(self.history)}, the finished epochs", self.best_epoch)
        return self


@brief("solution", "settings", "timings", epochs=lambda self: len(self.history), last=lambda self: self.history[-1])
@dataclass(frozen=True, eq=False)
class FitResult:
    """The result of :func:`mergetune.tune` and :func:`mergetune.fit`.

    Attributes:
        solution: the trained solution; with ``val``, that of the best epoch.
        history: one entry per epoch: lr, loss, every term of the loss and, with ``val``, val_accuracy.
        settings: every argument that the result depends on, JSON-able.
        timings: seconds, steps and ms_per_step. A resumed run counts only the last process; runs that train together
            share the seconds equally.

    Example:
        >>> import mergetune as mt, tempfile, torch
        >>> head, folder = mt.Head(torch.eye(2), ("cat", "dog")), tempfile.mkdtemp()
        >>> mt.FitResult(head, history=(), settings={"method": "head"}, timings={}).save(folder)
        >>> mt.FitResult.load(folder).settings
        {'method': 'head'}
    """

    solution: Solution
    history: tuple[dict[str, float], ...]
    settings: dict[str, Any]
    timings: dict[str, float]

    def save(self, path: str | Path) -> None:
        """Write the solution and ``result.json`` into the folder ``path``.

        If nothing was trained, because the run was finished before, the file keeps the timings of its training.
        """
        self.solution.save(path)
        timings = self.timings
        if timings.get("steps") == 0:
            with contextlib.suppress(OSError, ValueError):  # a damaged file is written again
                saved = read_document(Path(path) / RESULT, ResultFile, way_on="")
                timings = saved.timings if saved.settings == jsonable(self.settings) else timings
        record = {"history": self.history, "settings": self.settings, "timings": timings, "versions": own_versions()}
        write_json(Path(path) / RESULT, record, indent=2)

    @classmethod
    def load(cls, path: str | Path) -> FitResult:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no result.
            ValueError: a damaged file; the message names the file and the field.
        """
        way_on = f"load_solution({str(path)!r}) reads the solution alone"
        record = read_document(Path(path) / RESULT, ResultFile, way_on=way_on)
        return cls(load_solution(path), record.history, record.settings, record.timings)


class TrainingRun:
    """The state of a run in training: current and best solution, optimiser, history, and the file for resuming.

    Each epoch uses a new random generator with a seed from (seed, epoch). A resumed run therefore needs only the
    states of solution and optimiser and the history.

    Args:
        job: the checked run.
        which: description of the run for errors; empty if there is one run.
    """

    def __init__(self, job: Job, which: str) -> None:
        self.job, self.which, training, device = job, which, job.training, job.clip.device
        self.settings = settings_of(job)
        self.names = ("loss", *job.objective.term_names)
        self.labels = job.features.labels.to(device)
        self.state = {
            name: tensor.detach().float().to(device).clone().requires_grad_()
            for name, tensor in job.start.state().items()
        }
        parameters, decay = list(self.state.values()), training.weight_decay
        adaptive = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(training.optimizer)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=training.lr, momentum=training.momentum, weight_decay=decay)
            if adaptive is None
            else adaptive(parameters, lr=training.lr, weight_decay=decay)
        )
        self.history: list[dict[str, float]] = []
        self.best, self.best_epoch = self._copy(), 0
        self.seconds, self.steps = 0.0, 0
        self.folder = None if job.resume is None else Path(job.resume)
        if self.folder is not None:
            self.read(self.folder)

    def begin(self, epoch: int) -> Tensor:
        """Set the learning rate of an epoch; return a tensor of zeros for loss and terms, [steps, 1 + terms]."""
        self.optimizer.param_groups[0]["lr"] = self.job.training.lr_at(epoch)
        return torch.zeros(self.job.batches, len(self.names), device=self.job.clip.device)

    def batches(self, epoch: int, products: Tensor | None) -> Iterator[Batch]:
        """Batches of one epoch (see :data:`Batch`), in a random order that depends on seed and epoch.

        Args:
            epoch: number of the epoch, from 0.
            products: anchor products of all training images, [K, N, C], or None.
        """
        features, size = self.job.features, self.job.batch_size
        generator = torch.Generator().manual_seed((self.job.training.seed << 20) + epoch)
        parts = torch.randperm(len(features), generator=generator)[: self.job.batches * size].split(size)
        for index, x in zip(parts, random_views(features, parts, generator), strict=True):
            there = index.to(self.labels.device)
            x = x.to(self.labels.device, non_blocking=True)
            yield x, self.labels[there], generator, None if products is None else products[:, there]

    def end(self, epoch: int, record: Tensor) -> None:
        """Finish an epoch: check for NaN, add the epoch to the history and save the state.

        Args:
            epoch: number of the epoch, from 0.
            record: loss and terms of each step, [steps, 1 + terms].
        """
        _check_finite(record, self.state, self.names, epoch, self.which)
        self.steps += len(record)
        entry = {
            "epoch": epoch + 1,
            "lr": self.job.training.lr_at(epoch),
            **dict(zip(self.names, record.mean(0).tolist(), strict=True)),
        }
        if self.job.val is not None:
            entry["val_accuracy"] = self._val_accuracy(self.job.val)
        self.add(entry)
        if self.folder is not None:
            self.write(self.folder)

    def result(self) -> FitResult:
        """The result: the solution of the best epoch, or of the last one without ``val``."""
        start, clip, best = self.job.start, self.job.clip, self.job.finished(self.best)
        notes = {"settings": self.settings, "best_epoch": self.best_epoch, "start": start.notes}
        return FitResult(
            solution=start.with_state(
                {name: tensor.cpu() for name, tensor in best.items()}, notes=notes, **start.origin(clip)
            ),
            history=tuple(self.history),
            settings=self.settings,
            timings={
                "seconds": self.seconds,
                "steps": self.steps,
                "ms_per_step": 1e3 * self.seconds / max(self.steps, 1),
            },
        )

    def add(self, entry: dict[str, float]) -> None:
        """Append an epoch to the history. The best one has the highest val accuracy, or is the last without ``val``."""
        scores = [past.get("val_accuracy", -1.0) for past in self.history]
        if "val_accuracy" not in entry or not scores or entry["val_accuracy"] > max(scores):
            self.best, self.best_epoch = self._copy(), entry["epoch"]
        self.history.append(entry)

    def _copy(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.state.items()}

    @torch.no_grad()
    def _val_accuracy(self, val: Batches) -> float:
        space, states = self.job.objective.space, {name: tensor.detach()[None] for name, tensor in self.state.items()}
        images = None if space.images is None else lambda x: space.features(states, x)[0]
        return accuracy(space.classes(states)[0], val, normalize=space.normalize, images=images).accuracy

    def write(self, folder: Path) -> None:
        """Replace the state on disk atomically: a killed process leaves the old or the new state."""
        tensors: State = {}
        for name, tensor in self.state.items():
            tensors[f"state.{name}"], tensors[f"best.{name}"] = tensor.detach(), self.best[name]
            kept = {key: value for key, value in self.optimizer.state[tensor].items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items()}
        record = {"settings": self.settings, "history": self.history, "best_epoch": self.best_epoch}
        record["in_words"] = in_words_of(self.job)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        record["digest"] = short_digest(*(tensors[name] for name in sorted(tensors)))
        write_atomically(folder / STATE, serialize(tensors, metadata={"run": json.dumps(record)}))

    def read(self, folder: Path) -> None:
        """Take up the state in ``folder``, if there is one; it must be of this very run."""
        remove_parts(folder, STATE)
        path = folder / STATE
        if not path.exists():
            return
        record, tensors = self._read_state(path)
        if self.settings.keys() - record.settings.keys() == {LAM_WEIGHT}:
            self.job = self.job.of_version_0_1()
            self.settings = settings_of(self.job)
        other = differences(
            record.settings, self.settings, there_in_words=record.in_words, here_in_words=in_words_of(self.job)
        )
        older = older_settings_of(self.job)
        if other and not differences(record.settings, older):
            self.settings = older  # the run goes on as it was begun
        elif other:
            raise ValueError(
                f"resume: {folder} holds another run: {'; '.join(found.words for found in other[:NAMED])}; give "
                "another folder, or delete its files to train anew"
            )
        self._check_tensors(path, tensors)
        self.history, self.best_epoch = list(record.history), record.best_epoch
        for name, tensor in self.state.items():
            self.best[name] = tensors[f"best.{name}"].to(tensor)
            with torch.no_grad():
                tensor.copy_(tensors[f"state.{name}"])
            for key, value in tensors.items():
                slot = key.removeprefix("optimizer.").removesuffix(f".{name}")
                if key == f"optimizer.{slot}.{name}":
                    self.optimizer.state[tensor][slot] = value if slot == "step" else value.to(tensor)

    def _read_state(self, path: Path) -> tuple[RunRecord, State]:
        """The record and the tensors of a state file, by their present names."""
        record, tensors = read_state(path, tensors=True)
        if short_digest(*(tensors[name] for name in sorted(tensors))) != record.digest:
            raise ValueError(
                f"resume: {path} is damaged: digest must be that of its tensors, got another checksum; {ANEW}"
            )
        return record, _renamed(tensors, list(self.state))

    def _check_tensors(self, path: Path, tensors: State) -> None:
        """Refuse a file of this run that lacks a tensor, or has one of another shape."""
        for part in ("state", "best"):
            for name, tensor in self.state.items():
                if (there := tensors.get(f"{part}.{name}")) is None or there.shape != tensor.shape:
                    got = "none" if there is None else f"{list(there.shape)}"
                    rule = f"{path} must hold the tensor {part}.{name} of shape {list(tensor.shape)}"
                    raise ValueError(f"resume: {rule}, got {got}; delete it to start anew")


def settings_of(job: Job) -> dict[str, Any]:
    """Every argument that the result of a run depends on; two runs with equal settings are one run.

    No value depends on the processor: what a run computes before its first step is recorded by what determines it.
    """
    return {
        **job.settings,
        "start": short_digest(*job.begins_from),
        "features": job.features.digest,
        "val": None if job.val is None else job.val.digest,
        "clip": job.clip.name,
        "classnames": list(job.features.classnames),
    }


def older_settings_of(job: Job) -> dict[str, Any]:
    """:func:`settings_of` as version 0.1 recorded them, with checksums of the start and the zero-shot classes."""
    return settings_of(job) | {"start": short_digest(*job.start.state().values())} | job.older_settings


def in_words_of(job: Job) -> dict[str, Any]:
    """Descriptions of the settings of a run whose values are checksums."""
    return {**job.in_words, "features": images_in_words(job.features), "val": images_in_words(job.val)}


def read_state(path: Path, *, tensors: bool = False) -> tuple[RunRecord, State]:
    """The record of a state file, and its tensors if wanted.

    Raises:
        ValueError: the file is damaged; the message names the field.
    """
    found: State = {}
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("run")
            if tensors:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise ValueError(f"resume: {path} must be a .safetensors file, got something else; {ANEW}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}; {ANEW}") from error
    if text is None:
        raise ValueError(f"resume: {path} must have metadata 'run', got none; {ANEW}")
    return parse_document(text, RunRecord, name=f"resume: {path}", way_on=ANEW), found


@contextlib.contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Context manager that makes the folder of a run and lets one process train in it.

    Raises:
        ValueError: the path is a file, or the folder cannot be made.
        RuntimeError: another process works in the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"resume must be a folder, got the file {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"resume must be a folder that can be written, got {folder}: {error}") from error
    with writing_in(folder):
        yield


def _renamed(tensors: State, names: list[str]) -> State:
    """Tensors of a state file under today's names. Version 0.1 had one parameter, with a head's bias as last column."""
    if "parameter" not in tensors:
        return tensors
    found = {}  # the caller checks names and shapes
    for old, new in {"parameter": "state", "best": "best", "momentum": "optimizer.momentum_buffer"}.items():
        if old not in tensors:
            continue
        both = len(names) == 2
        parts = [tensors[old][:, :-1], tensors[old][:, -1]] if both else [tensors[old]]
        found |= {f"{new}.{name}": part.contiguous() for name, part in zip(names, parts, strict=True)}
    return found


def _check_finite(record: Tensor, state: State, names: Sequence[str], epoch: int, which: str) -> None:
    """Raise FloatingPointError for NaN or inf. Called once per epoch, so that no step waits for the device."""
    broken = ~record.isfinite()
    if broken.any():
        step = int(broken.any(1).int().argmax())
        terms = broken[step, 1:] if broken[step, 1:].any() else broken[step]
        name = names[int(terms.int().argmax()) + (len(names) - len(terms))]
        value = record[step, names.index(name)].item()
        raise FloatingPointError(
            f"the term {name!r}{which} became {value} at step {epoch * len(record) + step + 1} (epoch {epoch + 1}): "
            "lower lr, or check the features"
        )
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise FloatingPointError(
            f"the solution{which} became NaN or infinite at the end of epoch {epoch + 1}: lower lr"
        )


def short_digest(*parts: Tensor | str) -> str:
    """First 16 hex digits of the SHA-256 of tensors and texts."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
