"""The table of public readers: a small valid input for each, and the call that reads it.

A new reader is one line in ``READERS``.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_cases import BUILD, TinyClip, draw_images
from coop_cases import coop_run
from fit_cases import QUICK
from fuzz_workers import Reader
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
from mergetune.data import decode_pictures, find_pictures, listed_images, read_features
from mergetune.experiments.engine import begun
from mergetune.experiments.run_list import list_runs
from mergetune.io import convert_module, read_torchscript
from mergetune.solutions import read_head, read_prompt, recorded_metrics
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


def built(folder: Path) -> None:
    mt.cache_features(TinyClip(), draw_images(folder.parent / "images of caches", 11), folder, **BUILD)


def continued(folder: Path) -> mt.FeatureCache:
    images = draw_images(folder.parent.parent / "images of caches", 11)
    return mt.cache_features(TinyClip(), images, folder, **BUILD)


def unfinished(folder: Path) -> None:
    built(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    plan = {key: value for key, value in manifest.items() if key not in ("torch", "shards")}
    (folder / "building.json").write_text(json.dumps(plan))
    for number, shard in enumerate(manifest["shards"]):
        (folder / f"shard-{number:05d}.json").write_text(json.dumps({"plan": manifest["id"], "shard": shard}))


def opened_cache(folder: Path) -> torch.Tensor:
    found = mt.FeatureCache.open(folder)
    return torch.cat([found.tensor(view) for view in range(found.views)])


def trained(folder: Path) -> None:
    mt.fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK).save(folder)


def arrays(folder: Path) -> None:
    np.savez(folder / "f.npz", features=FEATURES.numpy(), labels=np.array(LABELS))


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
        lines = ["path,label,split", *(",".join(row.values()) for row in rows)]
        (folder / name).write_text(json.dumps(rows) if name.endswith("json") else "\n".join(lines) + "\n")

    return make


SPLITS = ("train", "train", "train", "val", "test")


def picture_list(name: str, content: str) -> Callable[[Path], None]:
    return all_of(images, text(name, content))


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


def command(*words: str) -> Callable[[Path], None]:
    """A command of the command line; words in braces are files of the folder."""

    def read(folder: Path) -> None:
        given = [str(folder / word[1:-1]) if word[:1] == "{" else word for word in words]
        done = CliRunner().invoke(app, given)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        said = done.stderr.strip()
        assert done.exit_code in (0, 1, 2) and "\x1b" not in done.stdout + said
        if done.exit_code:
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


# -- the table ---------------------------------------------------------------------------------------------------------

STATE = {"weight": normal(3, 8), "bias": normal(3)}
HEADS = ("solution.json", "solution.safetensors")
DATUM = "shot.pkl"
head = partial(mt.open_solution, classnames=CLASSES)
FORMATS: dict[str, Callable[[Path], None]] = {
    "jpg": picture(".jpg"), "progressive jpg": picture(".jpg", progressive=True), "png": picture(".png", "RGBA"),
    "palette png": picture(".png", "P"), "16 bit png": picture(".png", "I;16"), "webp": picture(".webp", "RGBA"),
    "jp2": picture(".jp2"), "tiff": picture(".tif"), "packed tiff": picture(".tif", compression="tiff_lzw"),
    "float tiff": picture(".tif", "F"), "gif": animation, "bmp": picture(".bmp"), "dib": picture(".dib"),
    "ppm": picture(".ppm"), "pbm": picture(".pbm", "1"), "lossless webp": picture(".webp", lossless=True),
}  # fmt: skip

READERS = [
    # our own documents
    *(Reader(name, partial(lambda s, folder: s.save(folder), solution), HEADS, mt.load_solution, seal)
      for name, solution in SOLUTIONS.items()),
    Reader("classifier", exported, ("c.pt*",), lambda f: mt.open_solution(f / "c.pt"), seal),
    Reader("exported prompt", exported, ("prompt_learner/*",), mt.open_solution, seal),
    Reader("cache", built, ("*",), opened_cache, share=8),
    Reader("cache to continue", built, ("*",), continued, share=2),
    Reader("cache in building", unfinished, ("*.json",), continued, share=2),
    Reader("state", trained, ("state.safetensors",),
           lambda f: mt.fit(tiny_clip(), cache(), prompt(), resume=f, **QUICK), share=1),
    Reader("result", trained, ("result.json", *HEADS), mt.FitResult.load, seal),
    Reader("runs", reported, ("**/*.json",), list_runs, seal, refuses=False),
    Reader("metrics", reported, ("*.json",), recorded_metrics),
    *(Reader(f"{name} record", record(name), ("*.json",),
             partial(lambda n, f: begun(f / f"{n}.json", RECORDS[n]), name)) for name in RECORDS),
    # checkpoints of others
    Reader("CoOp", saved(coop_checkpoint(), "prompt_learner/model.pth.tar-50"), ("**/model*",), mt.open_solution),
    Reader("old CoOp", saved(coop_checkpoint(), "model.pth.tar-5", _use_new_zipfile_serialization=False), ("model*",),
           read_prompt),
    Reader("CoOp's note", all_of(saved(coop_checkpoint(), "model.pth.tar-5"), text("checkpoint", "model.pth.tar-5\n")),
           ("checkpoint",), read_prompt, share=1),
    Reader("TaskRes", taskres, ("**/model*",), partial(mt.open_taskres, classnames=CLASSES)),
    Reader("head.pt", saved(STATE, "h.pt"), ("h.pt",), lambda f: head(f / "h.pt")),
    Reader("head.pth", saved({"state_dict": STATE}, "h.pth"), ("h.pth",), lambda f: head(f / "h.pth")),
    Reader("head.safetensors", weights("h.safetensors", {"scale": "10.5", "classnames": json.dumps(CLASSES)}, **STATE),
           ("h.safetensors",), lambda f: mt.open_solution(f / "h.safetensors")),
    Reader("head.npz", lambda f: np.savez(f / "h.npz", coef_=STATE["weight"], intercept_=STATE["bias"],
                                          classes_=np.array(CLASSES)), ("h.npz",), lambda f: read_head(f / "h.npz")),
    Reader("module", module, ("m.pt",), lambda f: convert_module(f / "m.pt", f / "o.safetensors")),
    Reader("pickle", pickled, ("m.pkl",), lambda f: convert_module(f / "m.pkl", f / "o.safetensors"), share=6),
    Reader("TorchScript", script, ("s.pt",), lambda f: read_torchscript(f / "s.pt")),
    # weights to merge
    Reader("weights", saved({"state_dict": STATE}, "w.pt"), ("w.pt",),
           lambda f: dict(merging.open_weights(f / "w.pt"))),
    Reader("shards", shards, ("*",), lambda f: dict(merging.open_weights(f))),
    Reader("experts", experts, ("*.safetensors",), merged, also=(TypeError,)),
    Reader("adapters", adapters, ("*/*",), merged_adapters),
    # backbones
    Reader("backbone", backbone, ("*",), lambda f: mt.load_clip(f"local-dir:{f}"), share=2, also=(RuntimeError,)),
    Reader("backbone.bin", torch_backbone, ("*.bin",), lambda f: mt.load_clip(f"local-dir:{f}"), share=1,
           also=(RuntimeError,)),
    # features of others
    Reader("features.npz", arrays, ("f.npz",), lambda f: read_features(f / "f.npz", classnames=CLASSES)),
    Reader("features.npy", plain_array, ("*",), lambda f: read_features(f / "f.npy", labels=f / "labels.txt")),
    Reader("features.pt", saved({"features": FEATURES, "labels": torch.tensor(LABELS)}, "f.pt"), ("f.pt",),
           lambda f: read_features(f / "f.pt", classnames=CLASSES)),
    Reader("features.safetensors", weights("f.safetensors", features=FEATURES, labels=torch.tensor(LABELS)), ("*",),
           lambda f: read_features(f / "f.safetensors", classnames=CLASSES)),
    Reader("Tip-Adapter", all_of(saved(FEATURES, "test_f.pt"), saved(torch.tensor(LABELS), "test_l.pt")), ("*.pt",),
           lambda f: read_features(f / "test_f.pt", classnames=CLASSES)),
    Reader("clip-retrieval", retrieval, ("*/*",), partial(read_features, labels="label", classnames=CLASSES)),
    # lists of images, and images
    Reader("split file", split_file, ("*.json",), lambda f: mt.coop_split(f, "split_zhou_X.json")),
    Reader("found split file", split_file, ("*.json",), lambda f: listed_images(f / "split_zhou_X.json"), share=2),
    Reader("table.csv", table("t.csv"), ("t.csv",), lambda f: mt.image_table(f / "t.csv")),
    Reader("table.json", table("t.json"), ("t.json",), lambda f: listed_images(f / "t.json")),
    *(Reader(f"pictures{name}", picture_list(f"l{name}", content), (f"l{name}",),
             partial(lambda n, f: list(find_pictures([f / f"l{n}"])), name), share=2, refuses=name != ".txt")
      for name, content in {".txt": "c0/000.png\nc1/001.png\n", ".csv": "path,x\nc0/000.png,1\n",
                            ".json": '["c0/000.png", {"path": "c1/001.png"}]'}.items()),
    Reader("few-shot file", few_shot, (DATUM,),
           lambda f: mt.CoOpDataset("dtd", f).few_shot_file(f / DATUM, "train"), share=2),
    Reader("aircraft", lambda f: write_miniature(f, "fgvc_aircraft", size=8), ("*/*.txt",),
           lambda f: mt.CoOpDataset("fgvc_aircraft", f), share=1),
    Reader("imagenet", lambda f: write_miniature(f, "imagenet", images_per_class=4, size=8), ("*/*.txt",),
           lambda f: mt.CoOpDataset("imagenet", f), share=1),
    *(Reader(name, make, ("p.*",), seen, share=5) for name, make in FORMATS.items()),
    # the command line
    Reader("export", commanded, ("head/*", "names.txt"),
           command("export", "{head}", "--to", "head", "--out", "{out.safetensors}"), seal, share=2),
    Reader("convert", module, ("m.pt",), command("convert", "{m.pt}", "{o.safetensors}"), share=2),
    Reader("merge", experts, ("*.safetensors",),
           command("merge", "average", "{a.safetensors}", "{b.safetensors}", "--out", "{o.safetensors}"), share=2),
    Reader("list of runs", reported, ("**/*.json",), command("runs", "{}"), share=2, refuses=False),
]  # fmt: skip
