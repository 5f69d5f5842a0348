"""Our own documents: every fault is one sentence that names file, field, expectation, value and the way on."""

import copy
import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_cases import BUILD, NoMoreEncoding, TinyClip, as_version_1, draw_images
from fit_cases import QUICK
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import cache, normal, prompt, tiny_clip

from mergetune import (
    FeatureCache,
    FitResult,
    Head,
    LinearMap,
    LoRA,
    Prompt,
    Residual,
    Stack,
    cache_features,
    fit,
    load_solution,
    open_solution,
    to_coop,
    zero_shot_classifier,
)
from mergetune.data.cache_blocks import Damage, reopen
from mergetune.data.cache_files import read_manifest
from mergetune.experiments.engine import begun, kept
from mergetune.experiments.records import CellRecord, RunRecordFile
from mergetune.ops import Trial, Verdict, VerdictFile, verdicts
from mergetune.solutions import Templates
from mergetune.training import run_folder
from mergetune.training.run_folders import read_call

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE, NAMES = "a photo of a {}.", ("cat", "dog")
FOREIGN = ("pydantic", "Traceback", "type=", "input_value", "Input should", "Expecting", "Error(", "\x1b")
ABSURD = [None, True, -1, 10**30, 1.5, math.nan, math.inf, "absurd", "\x1b[31m" * 20, [], [[[]]], {}, {"": {"a": []}}]


@dataclass(frozen=True)
class Case:
    """A document in a folder.

    Attributes:
        file: name of the file that messages must have.
        load: reads the document of a folder.
        read, write: the text of the document in a folder.
        free: fields with any content, or any text that is compared with something else.
        optional: fields that a file may lack.
        nullable: fields that may be null.
    """

    folder: Path
    file: str
    load: Callable[[Path], Any]
    free: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()

    def read(self, folder: Path) -> str:
        return (folder / self.file).read_text(encoding="utf-8")

    def write(self, folder: Path, content: bytes) -> None:
        (folder / self.file).write_bytes(content)


@dataclass(frozen=True)
class SealedCase(Case):
    """A document that begins with its checksum: what is written has the checksum that fits."""

    def read(self, folder: Path) -> str:
        document = json.loads((folder / self.file).read_text())
        del document["checksum"]
        return json.dumps(document)

    def write(self, folder: Path, content: bytes) -> None:
        inner = content[1:]
        head = b'{"checksum":"%b",' % hashlib.sha256(inner).hexdigest().encode()
        (folder / self.file).write_bytes(head + inner if content.startswith(b"{") else content)


@dataclass(frozen=True)
class StateCase(Case):
    """The record in the metadata of a state file."""

    def read(self, folder: Path) -> str:
        with safe_open(folder / self.file, "pt") as file:
            return file.metadata()["run"]

    def write(self, folder: Path, content: bytes) -> None:
        with safe_open(folder / self.file, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / self.file, metadata={"run": content.decode(errors="replace")})


SOLUTIONS = {
    "prompt": Prompt(normal(4, 16), TEMPLATE, notes={"a": [1]}),
    "class-specific prompt": Prompt(normal(2, 4, 16), TEMPLATE, NAMES, backbone="tiny", fingerprint="f"),
    "head": Head(normal(2, 8), NAMES, logit_scale=12.5),
    "cosine head": Head(normal(2, 8), NAMES, normalize=True),
    "residual": Residual(normal(2, 8), NAMES),
    "map": LinearMap(torch.eye(8)),
    "lora": LoRA({"image.0.q.A": normal(2, 16), "image.0.q.B": normal(16, 2)}, {"image.0.q": 0.5}),
    "templates": Templates((TEMPLATE, "the {}")),
    "stack": Stack(Templates(), LinearMap(torch.eye(8)), Residual(normal(2, 8), NAMES)),
}


COUNTS = {
    "classes": {"base": [0, 1], "novel": [2]},
    "images": {"base": [5, 5], "novel": [6]},
    "right": {"MERGETUNE": {"base": [5, 0], "novel": [3], "seen": [1, 0], "unseen": [2]}},
}
CANDIDATE = {
    "row": "TIES", "options": {"density": 0.2}, "experts": 2, "data": "none", "parameters": 64, "seconds": 0.5,
    "score": 50,
}  # fmt: skip
SETTINGS = {"clip": "0123456789abcdef", "shots": 4, "tune": {"epochs": 1}}
RECORDS = {
    "cell": {
        "cell": {"task": "pets", "partition": 0, "seed": 1}, "settings": SETTINGS,
        "candidates": [CANDIDATE, {**CANDIDATE}],
        "left_out": {"opcm": "needs three"}, "chosen": {"TIES": 1}, **COUNTS, "milliseconds": {"CoOp": 1.5},
        "paths": {},
    },
    "run": {
        "run": {
            "protocol": "base-to-novel", "source": "dtd", "method": "coop", "shots": 16, "seed": 1,
            "targets": ["base", "novel"],
        },
        "settings": SETTINGS, **COUNTS, "seconds": 3.5, "mixes": {"base": {"weight ensemble": [50.0, 60]}},
        "results": {"base": {"MERGETUNE": {"accuracy": 50.0, "images": 10, "standard_error": 0.1}}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("documents")
    found = {}
    for kind, solution in SOLUTIONS.items():
        solution.save(root / kind)
        nullable = ("backbone", "fingerprint", *(("classnames",) if "prompt" in kind or kind == "stack" else ()))
        found[kind] = Case(root / kind, "solution.json", load_solution, ("notes",), ("position", "normalize"), nullable)
    clip = replace(tiny_clip(), name="ViT-B-32/openai")
    exported = zero_shot_classifier(SOLUTIONS["head"], clip, NAMES, file=root / "classifier" / "c.pt")
    assert exported.shape == (8, 2)
    (root / "prompt export").mkdir()
    to_coop(SOLUTIONS["prompt"], root / "prompt export", clip=clip, classnames=NAMES)
    beside, optional = ".mergetune.json", ("template", "position", "temperature")
    nullable = ("backbone", "fingerprint", "template", "logit_scale")
    free = ("backbone", "fingerprint")
    found["classifier"] = Case(
        root / "classifier", f"c.pt{beside}", lambda f: open_solution(f / "c.pt"), free, optional, nullable
    )
    found["coop"] = Case(
        root / "prompt export" / "prompt_learner", f"model.pth.tar-50{beside}", open_solution, free, optional, nullable
    )
    images = draw_images(root / "images", 11)
    built = cache_features(TinyClip(), images, root / "cache", **BUILD)

    def opened(folder: Path) -> FeatureCache:
        FeatureCache.open(folder)
        return cache_features(NoMoreEncoding(), images, folder, **BUILD)

    def continued(folder: Path) -> FeatureCache:
        return cache_features(TinyClip(), images, folder, **BUILD)

    free = ("preprocess", "files", "skipped")
    optional = ("decoding",)  # version 0.1 wrote none
    found["manifest"] = SealedCase(built.path, "manifest.json", opened, free, optional, ("seed",))
    nothing = ("sha256", "bytes", "mtime_ns")  # may be null for each image
    found["images"] = SealedCase(built.path, "images.json", opened, (), (), nothing)
    for name, file in {"plan": "building.json", "block record": "block-00001.json"}.items():
        folder = shutil.copytree(built.path, root / name)
        reopen(folder, read_manifest(folder), Damage(rows=(), text=""))
        found[name] = Case(folder, file, continued, free, optional, ("seed", *nothing))
    folder = as_version_1(shutil.copytree(built.path, root / "manifest 1"))
    found["manifest 1"] = Case(folder, "manifest.json", opened, (*free, "images"), optional, ("seed",))

    def resumed(folder: Path) -> FitResult:
        return fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)

    resumed(root / "run").save(root / "run")
    found["state"] = StateCase(root / "run", "state.safetensors", resumed, ("settings", "in_words"), ("in_words",))
    found["result"] = Case(root / "run", "result.json", FitResult.load, ("settings",), ("versions",))

    facts = verdicts.device_facts(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETUNE_HOME", str(root / "verdict"))
        trial = Trial(backend="cpp", status="wrong", detail="off", error=math.inf, allowed=0.1, seconds=1.0)
        verdict = Verdict(op="lmc_loss", dtype="torch.float32", shape_class="small", trials=(trial,))
        path = verdicts.write_verdicts(VerdictFile(facts=facts, verdicts=(verdict,), seconds=1.0))

    def read_verdict(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MERGETUNE_HOME", str(folder.parent))
            return verdicts.read_verdicts(facts)

    maps = ("settings", "in_words", "left_out", "chosen", "classes", "images", "right", "milliseconds", "paths")
    maps = (*maps, "options", "results", "mixes", "seconds")
    for name, document in RECORDS.items():
        place = root / f"{name} record"
        place.mkdir()
        (place / f"{name}.json").write_text(json.dumps(document))
        model = CellRecord if name == "cell" else RunRecordFile
        load = partial(lambda folder, file, model: kept(folder / file, model), file=f"{name}.json", model=model)
        optional = ("candidates", "standard_error", *maps[1:])
        found[f"{name} record"] = Case(place, f"{name}.json", load, maps, optional, ("partition", "shots"))
    asked = {"lam": 8.0, "features": "0123456789abcdef"}
    run_folder(root / "call", asked, in_words={"features": "30 of 3 classes"}, parts=("tuned",))
    found["call"] = Case(root / "call", "call.json", read_call, ("settings", "in_words"), ("in_words", "parts"))

    optional = ("format", "detail", "error", "allowed", "seconds")
    found["verdict"] = Case(path.parent, path.name, read_verdict, ("facts",), optional, ("error", "allowed", "seconds"))
    return found


DOCUMENTS = [
    *SOLUTIONS,
    "classifier",
    "coop",
    "manifest",
    "manifest 1",
    "images",
    "plan",
    "block record",
    "state",
    "result",
    "cell record",
    "run record",
    "call",
    "verdict",
]


@pytest.fixture(params=DOCUMENTS)
def case(request, cases, tmp_path) -> Case:
    case = cases[request.param]
    folder = shutil.copytree(case.folder, tmp_path / ("kernels" if request.param == "verdict" else "copy"))
    return type(case)(folder, case.file, case.load, case.free, case.optional, case.nullable)


def places(value: Any, free: tuple[str, ...], at: tuple = ()):
    """Path to each field of a document, to the first and to the last entry of each list."""
    if isinstance(value, dict):
        entries = list(value.items())
    else:
        entries = [(i, value[i]) for i in sorted({0, len(value) - 1})] if isinstance(value, list) and value else []
    for key, inner in entries:
        yield (*at, key)
        if key not in free:
            yield from places(inner, free, (*at, key))


def changed(document: Any, path: tuple, change: Callable[[Any, Any], None]) -> bytes:
    copied = copy.deepcopy(document)
    inner = copied
    for step in path[:-1]:
        inner = inner[step]
    change(inner, path[-1])
    return json.dumps(copied).encode()


def refusal(case: Case, content: bytes) -> str | None:
    """The message of the error; None if the document is accepted."""
    work = case.folder.parent / f"{case.folder.name}-work" / case.folder.name  # loading may finish a cache
    shutil.copytree(case.folder, work)
    case.write(work, content)
    try:
        case.load(work)
    except ValueError as error:
        message = str(error)
        another = f"feature cache {work} " in message or f"{work} holds another run: " in message
        assert type(error) is ValueError and (case.file in message or another), message
        assert "\n" not in message and not [word for word in FOREIGN if word in message], message
        assert len(message) < 3 * len(str(work)) + 500, message
        return message
    finally:
        shutil.rmtree(work.parent)
    return None


def spelled(path: tuple) -> str:
    return "".join(f".{step}" if str(step).isidentifier() else f"[{step!r}]" for step in path).removeprefix(".")


def kind_of(value: Any) -> type:
    return float if type(value) is int else type(value)


def test_each_document_is_read_back(case):
    assert refusal(case, case.read(case.folder).encode()) is None


def test_a_field_that_is_missing_is_named(case):
    document = json.loads(case.read(case.folder))
    tried = 0
    for path in places(document, case.free):
        if (
            isinstance(path[-1], int)
            or path[-1] in case.optional
            or path[0] in ("timings", "versions")
            or "history" in path[:-1]
            or "scales" in path[:-1]
        ):
            continue
        message = refusal(case, changed(document, path, lambda inner, key: inner.pop(key)))
        assert message is not None, path
        assert f"{spelled(path)} must be there, got no such field; " in message or f"must have {path[-1]} " in message
        tried += 1
    assert tried >= 2


def test_a_value_of_another_type_is_named_and_any_value_is_refused_in_one_sentence(case):
    document = json.loads(case.read(case.folder))
    tried = 0
    for path in places(document, case.free):
        old = document
        for step in path:
            old = old[step]
        for new in ABSURD[:: 6 if isinstance(case, StateCase) else 1]:  # a run takes longer to load
            message = refusal(case, changed(document, path, lambda inner, key, new=new: inner.__setitem__(key, new)))
            name = next(step for step in reversed(path) if isinstance(step, str))
            other = kind_of(new) is not kind_of(old)
            allowed = (new is None or old is None) and name in case.nullable or name in case.free and path[-1] == name
            if other and not allowed:
                assert message is not None, (path, new)
                assert spelled(path) in message or f"must have {name} " in message, (path, new, message)
            tried += message is not None
    assert tried >= 20


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_is_refused_in_one_sentence(case, seed):
    dice, whole = random.Random(seed), case.read(case.folder).encode()
    damages = [
        lambda: whole[: dice.randrange(len(whole))],
        lambda: dice.randbytes(dice.randrange(200)),
        lambda: whole[: (at := dice.randrange(len(whole)))] + bytes([dice.randrange(256)]) + whole[at + 1 :],
        lambda: whole[: (at := dice.randrange(len(whole)))] + whole[at + dice.randrange(1, 9) :],
    ]
    messages = [refusal(case, damages[i % 4]()) for i in range(24)]
    assert sum(message is not None for message in messages) >= 10


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ufeff{"])
def test_a_document_of_another_form_is_refused(case, text):
    message = refusal(case, text.encode())
    assert message is not None
    assert re.search("must (be JSON|be an object|have format|have metadata), got ", message), message


def test_a_deep_field_of_any_content_is_refused(case):
    document = json.loads(case.read(case.folder))
    field = next((name for name in ("notes", "settings", "preprocess") if name in document), None)
    deep = changed(document, (field,), lambda inner, key: inner.update({key: {}})) if field else b""
    content = deep.replace(b'"%s": {}' % str(field).encode(), b'"%s": ' % str(field).encode() + nested(300))
    if field is not None:
        assert f"{field} must be nested at most 256 levels deep" in (refusal(case, content) or "")


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("name", "field", "later"),
    [
        ("prompt", "version", 2),
        ("stack", "version", 12),
        ("manifest", "format", "mergetune.features/3"),
        ("plan", "format", "mergetune.features/10"),
        ("verdict", "format", 2),
    ],
)
def test_a_document_of_a_later_version_asks_for_an_update(cases, tmp_path, name, field, later):
    case = cases[name]
    folder = shutil.copytree(case.folder, tmp_path / "kernels")
    document = json.loads(case.read(folder)) | {field: later, "unknown": 1}
    case.write(folder, json.dumps(document).encode())
    with pytest.raises(ValueError, match=rf"must have {field} .*, got '?{later}'?; update mergetune$"):
        case.load(folder)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("cell", ("right", "MERGETUNE", "base"), [1], "right.MERGETUNE.base must be a list of 2, one entry per class"),
        ("cell", ("right", "MERGETUNE", "seen", 1), 6, "right.MERGETUNE.seen[1] must be at most 5, the images, got 6"),
        ("cell", ("right", "MERGETUNE", "other"), [1], "right.MERGETUNE.other must be a part of images"),
        ("cell", ("chosen", "TIES"), 2, "chosen.TIES must be below 2, the candidates, got 2"),
        ("cell", ("candidates", 1, "score"), 101, "candidates[1].score must be at most 100, got 101"),
        ("run", ("results", "base", "MERGETUNE", "accuracy"), "50", "accuracy must be a number, got '50'"),
        ("run", ("mixes", "base", "weight ensemble", 0), -1, "must be at least 0, got -1"),
        ("run", ("run", "shots"), 0, "run.shots must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_record_whose_numbers_do_not_fit_is_refused(cases, tmp_path, name, place, value, message):
    document = changed(RECORDS[name], place, lambda inner, key: inner.__setitem__(key, value))
    (tmp_path / f"{name}.json").write_bytes(document)
    with pytest.raises(ValueError) as caught:
        begun(tmp_path / f"{name}.json", RECORDS[name])
    assert message in str(caught.value) and str(caught.value).endswith("; delete it to run it again")


@pytest.mark.parametrize("part", ["../mine", "/mine", "a/b", "..", "", "mymodel"])
def test_the_parts_of_a_run_lie_in_its_folder(cases, tmp_path, part):
    """Replacing a run deletes files there."""
    case = cases["call"]
    document = json.loads(case.read(case.folder)) | {"parts": ["tuned", part]}
    case.write(tmp_path, json.dumps(document).encode())
    with pytest.raises(
        ValueError, match=r"call.json is damaged: parts\[1\] must be one of tuned, measure, mergetune, got "
    ):
        read_call(tmp_path)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_as_it_was_written(tmp_path, name):
    (tmp_path / f"{name}.json").write_text(json.dumps(RECORDS[name]))
    assert begun(tmp_path / f"{name}.json", RECORDS[name]) == RECORDS[name]
