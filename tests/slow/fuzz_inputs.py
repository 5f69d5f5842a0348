"""Small valid inputs of the public readers, and calls that read some of them; ``fuzz_readers`` has the table."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_cases import BUILD, TinyClip, as_version_1, draw_images, resealed
from click.testing import Result
from coop_cases import coop_run
from fit_cases import QUICK
from miniature import write_few_shot, write_miniature
from PIL import Image
from safetensors.torch import save_file
from test_documents import NAMES, RECORDS, SOLUTIONS
from tiny import TEXT, VISION, cache, normal, prompt, tiny_clip, tiny_model
from torch import nn
from typer.testing import CliRunner

import mergetune as mt
from mergetune import merging
from mergetune.cli import app
from mergetune.data import decode_pictures, find_pictures
from mergetune.data.cache_blocks import Damage, reopen
from mergetune.data.cache_files import read_manifest
from mergetune.io import LOCK, naming_file
from mergetune.training import run_folder

PIXELS = 1 << 18
CLASSES = ("ant", "bee", "cat")
FEATURES = torch.nn.functional.normalize(normal(6, 8), dim=-1)
LABELS = [0, 1, 2, 0, 1, 2]
TINY = {"width": 8, "layers": 1}

# -- inputs ------------------------------------------------------------------------------------------------------------


def saved(content: Any, name: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name, **options)

    return make


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def weights(name: str, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file({key.replace("__", "."): t for key, t in tensors.items()}, folder / name, metadata)


def all_of(*makers: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def seal(folder: Path) -> None:
    """The checksum of the tensors in solution.json or beside an export is made right."""
    pairs = [(folder / "solution.json", folder / "solution.safetensors")]
    pairs += [(file, Path(str(file).removesuffix(".mergetune.json"))) for file in folder.rglob("*.mergetune.json")]
    for document, content in pairs:
        if document.exists() and content.exists():
            try:
                found = json.loads(document.read_bytes())
                found["sha256"] = hashlib.sha256(content.read_bytes()).hexdigest()
                document.write_text(json.dumps(found))
            except (ValueError, TypeError, RecursionError):
                continue


def coop_checkpoint() -> dict[str, Any]:
    state = {"ctx": normal(4, 16), "token_prefix": normal(3, 1, 16), "token_suffix": normal(3, 11, 16)}
    return {"state_dict": state, "epoch": 50, "optimizer": None, "val_result": None}


def taskres(folder: Path) -> None:
    state = {"base_text_features": normal(3, 8), "text_feature_residuals": normal(3, 8)}
    saved({"state_dict": state, "epoch": 100}, "prompt_learner/model.pth.tar-100")(folder)


def exported(folder: Path) -> None:
    clip = replace(tiny_clip(), name="ViT-B-32/openai")
    mt.zero_shot_classifier(SOLUTIONS["head"], clip, NAMES, file=folder / "c.pt")
    mt.to_coop(SOLUTIONS["prompt"], folder, clip=clip, classnames=NAMES)


# -- caches ------------------------------------------------------------------------------------------------------------


@functools.cache
def images_of_caches(root: Path) -> mt.data.ImageList:
    """Drawn once, before there are workers: they share the files."""
    return draw_images(root / "images of caches", 11)


@functools.cache
def true_rows(root: Path) -> torch.Tensor:
    """The features of these images."""
    return rows_of(mt.cache_features(TinyClip(), images_of_caches(root), root / "whole cache", **BUILD))


def rows_of(found: mt.FeatureCache) -> torch.Tensor:
    return torch.cat([found.tensor(view) for view in range(found.views)])


def built(folder: Path) -> None:
    mt.cache_features(TinyClip(), images_of_caches(folder.parent), folder, **BUILD)


def built_1(folder: Path) -> None:
    built(folder)
    as_version_1(folder)


def version_1(folder: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "files" / "v0.1" / "cache" / "train", folder, dirs_exist_ok=True)


def unfinished(folder: Path) -> None:
    """A cache that lacks its second block."""
    built(folder)
    reopen(folder, read_manifest(folder), Damage(rows=((4, 4),), text=""))


def continued(folder: Path) -> None:
    """Whatever was damaged, the features are refused or those of the images."""
    assert torch.equal(continued_1(folder), true_rows(folder.parent.parent)), "other features"


def continued_1(folder: Path) -> torch.Tensor:
    """Version 0.1 compares no checksums when a cache is opened."""
    return rows_of(mt.cache_features(TinyClip(), images_of_caches(folder.parent.parent), folder, **BUILD))


def opened_cache(folder: Path) -> torch.Tensor:
    return rows_of(mt.FeatureCache.open(folder))


def same_cache(folder: Path) -> None:
    """The damage is noticed, or no number is another one."""
    assert torch.equal(opened_cache(folder), true_rows(folder.parent.parent)), "other features"


def verified_1(folder: Path) -> torch.Tensor:
    found = mt.FeatureCache.open(folder)
    found.verify(progress=False)
    return rows_of(found)


def reseal(folder: Path) -> None:
    """The checksums at the beginning of the documents of a cache are made right."""
    for name in ("manifest.json", "images.json"):
        try:
            (folder / name).write_bytes(resealed(json.loads((folder / name).read_bytes())))
        except (OSError, ValueError, AttributeError, RecursionError):
            continue


def recheck(folder: Path) -> None:
    """The state of the last check becomes that of the damaged file: no checksum is compared, as after decay on disk."""
    state, found = json.loads((folder / "checked.json").read_bytes()), (folder / "arrays.bin").stat()
    state |= {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}
    (folder / "checked.json").write_text(json.dumps(state))


def cache_and_damage(folder: Path) -> None:
    built(folder.parent / "whole cache to open")
    shutil.move(folder.parent / "whole cache to open", folder / "whole")
    shutil.copy(folder / "whole" / "arrays.bin", folder / "arrays.bin")


def read_while_damaged(folder: Path, *, mapped: bool) -> torch.Tensor:
    """The file of the arrays is damaged while the cache is open; its rows are mapped, or read from the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergetune.data.cache.MAX_MAPPED", 1 << 28 if mapped else 0)
        found = mt.FeatureCache.open(folder / "whole")
    (folder / "whole" / "arrays.bin").write_bytes((folder / "arrays.bin").read_bytes())
    return rows_of(found)


# -- runs and arrays ---------------------------------------------------------------------------------------------------


def trained(folder: Path) -> None:
    mt.fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK).save(folder)


def arrays(folder: Path) -> None:
    np.savez(folder / "f.npz", features=FEATURES.numpy(), labels=np.array(LABELS))


def named_arrays(folder: Path) -> None:
    """Labels as Python's texts, which numpy pickles."""
    labels = np.array(CLASSES, dtype=object)[LABELS]
    np.savez(folder / "f.npz", features=FEATURES.numpy(), labels=labels)
    np.save(folder / "f.npy", FEATURES.numpy())
    np.save(folder / "objects.npy", labels)


def plain_array(folder: Path) -> None:
    np.save(folder / "f.npy", FEATURES.numpy())
    (folder / "labels.txt").write_text("".join(f"{CLASSES[label]}\n" for label in LABELS))


def retrieval(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", FEATURES.numpy())
    files = [f"{CLASSES[label]}/{number}.jpg" for number, label in enumerate(LABELS)]
    table = pa.table({"image_path": files, "label": LABELS})
    parquet.write_table(table, folder / "metadata" / "metadata_0.parquet")


def module(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), folder / "m.pt")


def script(folder: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "s.pt"))


def pickled(folder: Path) -> None:
    (folder / "m.pkl").write_bytes(pickle.dumps(nn.Linear(3, 2)))


def shards(folder: Path) -> None:
    places = {}
    for number in range(2):
        file = f"model-{number}.safetensors"
        save_file({f"w{number}": normal(3, 4, seed=number)}, folder / file)
        places[f"w{number}"] = file
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 96}, "weight_map": places})
    )


def experts(folder: Path) -> None:
    for number, name in enumerate(("base", "a", "b")):
        save_file({"w": normal(5, 4, seed=number), "b": normal(4, seed=number)}, folder / f"{name}.safetensors")


def merged(folder: Path) -> None:
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    merging.merge_files(merging.ties, folder / "base.safetensors", files, folder / "out.safetensors")


def adapters(folder: Path) -> None:
    for number in range(2):
        place = folder / f"adapter-{number}"
        place.mkdir()
        names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
        pair = (normal(2, 6, seed=number), normal(9, 2, seed=number))
        save_file(dict(zip(names, pair, strict=True)), place / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"], "use_rslora": False,
            "alpha_pattern": {}, "rank_pattern": {"q": 2}, "modules_to_save": None, "bias": "none",
        }  # fmt: skip
        (place / "adapter_config.json").write_text(json.dumps(config))


def merged_adapters(folder: Path) -> None:
    merging.merge_files(merging.average, None, [folder / "adapter-0", folder / "adapter-1"], folder / "out")


# -- models of other programs ------------------------------------------------------------------------------------------


def sklearn_model(name: str, kind: str, *steps: str, **options: Any) -> Callable[[Path], None]:
    """A fitted linear model, perhaps behind scalers, as pickle or, with ``options``, as joblib writes it."""

    def make(folder: Path) -> None:
        import joblib
        from sklearn import linear_model, pipeline, preprocessing

        before = [getattr(preprocessing, step)() for step in steps]
        model = pipeline.make_pipeline(*before, getattr(linear_model, kind)())
        model = (model if steps else model[0]).fit(FEATURES.numpy(), np.array(CLASSES)[LABELS])
        if name.endswith(".pkl"):
            (folder / name).write_bytes(pickle.dumps(model, **options))
        else:
            joblib.dump(model, folder / name, **options)

    return make


def lora(tower: str = "text") -> mt.LoRA:
    made = mt.LoRA.start(tiny_clip(), rank=2, parts=("q", "v", "out"), tower=tower)
    return made.with_state({name: normal(*t.shape) for name, t in made.state().items()})


def clip_lora(folder: Path) -> None:
    """Both towers; CLIP-LoRA's files tell them by their widths."""
    layers = [
        {part: {"w_lora_A": normal(2, width), "w_lora_B": normal(width, 2)} for part in ("q_proj", "v_proj")}
        for width in (16, 16, 24, 24)
    ]
    about = {"r": 2, "alpha": 1, "encoder": "both", "params": ["q", "v"], "position": "all"}
    content = {"weights": {f"layer_{i}": layer for i, layer in enumerate(layers)}, "metadata": about}
    torch.save(content, folder / "lora_weights.pt")


def small_model() -> dict[str, torch.Tensor]:
    return dict(tiny_model(text={**TEXT, **TINY, "vocab_size": 64}).state_dict())


def whole_model(folder: Path) -> None:
    """A file of open_clip's trainer."""
    state = {f"module.{name}": tensor for name, tensor in small_model().items()}
    content = {"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, folder / "epoch_1.pt")


def class_prompt(folder: Path) -> None:
    """CoOp's file with context vectors for each class, and the embedded names of the classes in another order."""
    clip = tiny_clip()
    texts = clip.text.token_embedding.weight[clip.tokenize([f"X X X X {name}." for name in reversed(CLASSES)])].detach()
    state = {"ctx": normal(3, 4, 16), "token_prefix": texts[:, :1].clone(), "token_suffix": texts[:, 5:].clone()}
    saved({"state_dict": state, "epoch": 50}, "model.pth.tar-50")(folder)


def for_clip(folder: Path) -> None:
    """The prompt in the file, with its rows in the order of the names; a prompt in memory does not know its path."""
    found = mt.open_solution(folder / "model.pth.tar-50", classnames=CLASSES)
    with naming_file(folder):
        found.for_clip(tiny_clip())


def backbone(folder: Path) -> None:
    words = {**TEXT, **TINY, "vocab_size": 64}
    from backbone_cases import write_tokenizer

    write_tokenizer(folder)
    words |= {"hf_tokenizer_name": "org/clip", "tokenizer_kwargs": {"clean": "lower"}}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": words}, "preprocess_cfg": {"size": 16}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    plain = {key: value for key, value in words.items() if not key.startswith(("hf_", "tokenizer_"))}
    save_file(tiny_model(text=plain).state_dict(), folder / "open_clip_model.safetensors")


def torch_backbone(folder: Path) -> None:
    backbone(folder)
    state = mt.merging.open_weights(folder / "open_clip_model.safetensors")
    torch.save(dict(state), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()


def images(folder: Path) -> None:
    for label in range(3):
        draw_images(folder / f"c{label}", 5)


def split_file(folder: Path) -> None:
    images(folder)
    parts = {"train": range(3), "val": [3], "test": [4]}
    split = {part: [[f"c{c}/{n:03d}.png", c, f"class_{c}"] for c in range(3) for n in ns] for part, ns in parts.items()}
    (folder / "split_zhou_X.json").write_text(json.dumps(split))


def table(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        images(folder)
        rows = [
            {"path": f"c{c}/{n:03d}.png", "label": f"c{c}", "split": s} for c in range(3) for n, s in enumerate(SPLITS)
        ]
        sign = ";" if "semicolon" in name else "\t" if name.endswith("tsv") else ","
        lines = [sign.join(row.values()) for row in [{key: key for key in rows[0]}, *rows]]
        if name.endswith("jsonl"):
            lines = [json.dumps(row) for row in rows]
        (folder / name).write_text(json.dumps(rows) if name.endswith("json") else "\n".join(lines) + "\n")

    return make


SPLITS = ("train", "train", "train", "val", "test")


def picture_list(name: str, content: str) -> Callable[[Path], None]:
    return all_of(images, text(name, content))


CLASS_NAMES = {
    "names.txt": "ant\nbee\ncat\n", "keys.txt": "c0 ant\nc1 bee\nc2 cat\n", "keys.json": '{"c0": "ant", "c2": "cat"}',
    "names.json": '["ant", "bee", "cat"]', "index.json": '{"0": ["c0", "ant"], "1": ["c1", "bee"], "2": ["c2", "cat"]}',
}  # fmt: skip


def folder_and_names(name: str) -> Callable[[Path], None]:
    return all_of(lambda folder: images(folder / "pictures"), text(name, CLASS_NAMES[name]))


def renamed(name: str, folder: Path) -> mt.data.Dataset:
    return mt.ImageFolder(folder / "pictures", classnames=folder / name)


LISTED = {
    "l.txt": "c0/000.png\nc1/001.png\n", "l.csv": "path,x\nc0/000.png,1\n",
    "l.json": '["c0/000.png", {"path": "c1/001.png"}]',
}  # fmt: skip


def to_predict(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        picture_list(name, LISTED[name])(folder)
        SOLUTIONS["head"].save(folder / "head")
        (folder / "clip").mkdir()
        backbone(folder / "clip")

    return make


def predicted(name: str, folder: Path) -> None:
    """A picture that cannot be read has a row with a sentence, which is looked at as the others."""
    predictor = mt.Predictor(tiny_clip(), SOLUTIONS["head"], max_pixels=PIXELS)
    for row in predictor.stream(find_pictures([folder / name]), progress=False):
        if row.error is not None:
            raise ValueError(f"{folder / name}: {row.error}")


def predict_command(name: str, folder: Path) -> None:
    """The rows as JSON, a line of the table or of the screen per picture, and the exit code that says what happened."""
    given = [folder / "head", folder / name, "--json", "--backbone", f"local-dir:{folder / 'clip'}"]
    done = invoked("predict", *given)
    if done.exit_code == 2:
        raise ValueError(done.stderr[done.stderr.find("error: ") :].strip())
    found = json.loads(done.stdout)
    wrong = [row["error"] for row in found["predictions"] if row.get("error") is not None]
    assert (found["pictures"], found["unreadable"]) == (len(found["predictions"]), len(wrong))
    assert done.exit_code == bool(wrong)
    if wrong:
        raise ValueError(f"{folder / name}: {wrong[0]}")


def few_shot(folder: Path) -> None:
    write_miniature(folder, "dtd", classes=4, size=8)
    write_few_shot(folder / "shot.pkl", coop_run(folder, "dtd", 2, 1, "all"))


def picture(suffix: str, mode: str = "RGB", **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pixels = random.Random(0).randbytes(24 * 20 * 4)
        image = (
            Image.frombytes("RGBA", (24, 20), pixels)
            .convert("RGB" if mode in ("P", "1") else "RGBA")
            .convert("L" if mode == "I;16" else mode)
        )
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(folder / f"p{suffix}", **options)

    return make


def animation(folder: Path) -> None:
    frames = [Image.new("RGB", (24, 20), (40 * n, 9, 9)) for n in range(3)]
    frames[0].save(folder / "p.gif", save_all=True, append_images=frames[1:])


def seen(folder: Path) -> Any:
    (file,) = folder.iterdir()
    return mt.data.load_image(file, max_pixels=PIXELS)


def decoded(folder: Path) -> Any:
    (file,) = folder.iterdir()
    found = decode_pictures(tiny_clip(), [file], batch_size=1)
    return list(found.batches if hasattr(found, "batches") else found)


def record(name: str) -> Callable[[Path], object]:
    return text(f"{name}.json", json.dumps(RECORDS[name]))


def invoked(*words: object) -> Result:
    """The result of a command of the command line, which ends with an exit code and without a traceback."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 1, 2) and "\x1b" not in done.stdout + done.stderr
    return done


def command(*words: str) -> Callable[[Path], None]:
    """A command of the command line; words in braces are files of the folder."""

    def read(folder: Path) -> None:
        done = invoked(*(folder / word[1:-1] if word[:1] == "{" else word for word in words))
        if done.exit_code:
            said = done.stderr.strip()
            raise ValueError(said[said.find("error: ") :] if "error: " in said else said)

    return read


def commanded(folder: Path) -> None:
    SOLUTIONS["head"].save(folder / "head")
    (folder / "names.txt").write_text("cat\ndog\n")


def reported(folder: Path) -> None:
    trained(folder)
    run_folder(folder / "call", {"lam": 8.0, "features": "0123456789abcdef"}, in_words={"features": "30 of 3 classes"})
    rows = {"MERGETUNE": {"accuracy": 50.0}}
    (folder / "report.json").write_text(json.dumps({"row": "MERGETUNE", "reports": {"base": rows, "novel": rows}}))


def locked_folder(folder: Path) -> None:
    """The lock of a process that was killed; there is no process of this number."""
    for name in (LOCK, ".h.pt.lock"):
        (folder / name).write_text(f"4194305 {socket.gethostname()}\n")


def written_anyway(folder: Path) -> None:
    """Nobody holds the locks, so the folder and the file are written, and no lock is left."""
    SOLUTIONS["head"].save(folder)
    mt.to_head(SOLUTIONS["head"], folder / "h.pt")
    mt.load_solution(folder)
    assert not [name for name in (LOCK, ".h.pt.lock") if (folder / name).exists()]
