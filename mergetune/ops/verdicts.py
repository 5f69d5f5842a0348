"""Verdicts: agreement with the definition, times, and the chosen implementation of each op on a device.

A verdict file holds the results of one run of :mod:`mergetune.ops.verification`. Its name and first fields state the
device, driver and versions for which it is valid; with others the file is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AllowInfNan

from mergetune.facts.brief import brief
from mergetune.io import Document, Items, installed_version, read_document, write_json
from mergetune.ops import native

FORMAT = 1
MAX_BYTES = 1 << 20  # largest verdict file; a usual one has about 20 kB
WAY_ON = "`mergetune doctor --kernels` makes a new verdict"
HOME_VARIABLE = "MERGETUNE_HOME"

AnyFloat = Annotated[float, AllowInfNan(True)]  # a wrong result may be off by any amount
Status = Literal["agreed", "wrong", "raised", "crashed", "hung", "not tried"]


@brief("backend", "status", "seconds", "error", "allowed", "detail")
class Trial(Document, frozen=True):
    """The outcome of one implementation on the problems of one op, dtype and shape class.

    Attributes:
        backend: name of the implementation.
        status: "agreed" with the definition, "wrong", "raised" an error, "crashed" its process, "hung" until killed, or
            "not tried" because of the time limit or an earlier crash.
        detail: explanation of the status, such as the wrong result or the error.
        error, allowed: largest difference from the definition and the largest allowed one, as shares of the largest
            value.
        seconds: median time of one call with its gradient, on the first problem.
    """

    backend: str
    status: Status
    detail: str = ""
    error: AnyFloat | None = None
    allowed: AnyFloat | None = None
    seconds: float | None = None


@brief("op", "dtype", "shape_class", "chosen")
class Verdict(Document, frozen=True):
    """All trials of one op, dtype and shape class; ``chosen`` is the fastest backend that agreed."""

    op: str
    dtype: str
    shape_class: str
    trials: Items[Trial]

    @property
    def chosen(self) -> str:
        """Name of the fastest backend that agreed with the definition; "torch" if none did."""
        agreed = [trial for trial in self.trials if trial.status == "agreed" and trial.seconds is not None]
        return min(agreed, key=lambda trial: trial.seconds or 0.0).backend if agreed else "torch"


class DeviceFacts(Document, frozen=True):
    """Device, driver and versions for which a verdict is valid; if one of them changes, a new verdict is needed."""

    device: str
    driver: str
    torch: str
    triton: str
    kernels: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


@brief("facts", "verdicts", "seconds")
class VerdictFile(Document, frozen=True):
    """The results of one run of the verification.

    Attributes:
        format: format number of the file.
        facts: device, driver and versions.
        verdicts: one verdict per op, dtype and shape class.
        seconds: duration of the run.
    """

    format: Literal[1] = FORMAT
    facts: DeviceFacts
    verdicts: Items[Verdict]
    seconds: float


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of one device, or of the CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    else:
        name = f"{platform.machine()} {native.build_info()['cpu_variant']} {torch.get_num_threads()} threads"
    return DeviceFacts(
        device=name,
        driver=_driver() if device.type == "cuda" else "none",
        torch=f"{torch.__version__} {torch.version.cuda or torch.version.hip or ''}".strip(),
        triton=installed_version("triton", otherwise="none"),
        kernels=_kernels(),
    )


def folder() -> Path:
    """The folder of the verdicts: below MERGETUNE_HOME, else below XDG_CACHE_HOME or the user's cache folder.

    Raises:
        OSError: the user has no home folder, and neither variable is set.
    """
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home) / "kernels"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home
        raise OSError(f"verdicts need a folder, got none: {error}; set {HOME_VARIABLE} to a folder") from error
    return cache / "mergetune" / "kernels"


def verdict_path(facts: DeviceFacts) -> Path:
    """The file of a device's verdict."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts.device).strip("-")[:60]
    return folder() / f"{name}-{facts.key}.json"


def read_verdicts(facts: DeviceFacts) -> VerdictFile | None:
    """The stored verdict for these facts; None without a stored verdict.

    Raises:
        ValueError: the file is damaged; the message names the file, the field, and the command that renews it.
    """
    try:
        found = read_document(verdict_path(facts), VerdictFile, limit=MAX_BYTES, way_on=WAY_ON)
    except OSError:
        return None
    return found if found.facts == facts else None


def write_verdicts(found: VerdictFile) -> Path:
    """Writes a verdict to its file and returns the path. Raises OSError if writing fails."""
    path = verdict_path(found.facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.model_dump())
    return path


def _driver() -> str:
    """Version of the NVIDIA driver, from the kernel module or else from the CUDA library."""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        if match:
            return match[0]
    except OSError:
        pass
    found = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return "unknown"
    return str(found.value)


@lru_cache(maxsize=1)
def _kernels() -> str:
    """Digest of the code that computes ops: the Triton kernels, the native core and the files of this package."""
    import mergetune.kernels

    files = [Path(native.core.__file__), *Path(__file__).parent.glob("*.py")]
    files += [file for folder in mergetune.kernels.__path__ for file in Path(folder).glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
