"""The table of public readers: a small valid input for each, and the call that reads it.

A new reader is one line in ``READERS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fit_cases import QUICK
from fuzz_inputs import (
    CLASS_NAMES,
    CLASSES,
    FEATURES,
    LABELS,
    LISTED,
    adapters,
    all_of,
    animation,
    arrays,
    backbone,
    built,
    built_1,
    cache_and_damage,
    class_prompt,
    clip_lora,
    command,
    commanded,
    continued,
    continued_1,
    coop_checkpoint,
    experts,
    exported,
    few_shot,
    folder_and_names,
    for_clip,
    locked_folder,
    lora,
    merged,
    merged_adapters,
    module,
    named_arrays,
    opened_cache,
    pickled,
    picture,
    picture_list,
    plain_array,
    predict_command,
    predicted,
    read_while_damaged,
    recheck,
    record,
    renamed,
    reported,
    reseal,
    retrieval,
    same_cache,
    saved,
    script,
    seal,
    seen,
    shards,
    sklearn_model,
    small_model,
    split_file,
    table,
    taskres,
    text,
    to_predict,
    torch_backbone,
    trained,
    unfinished,
    verified_1,
    version_1,
    weights,
    whole_model,
    written_anyway,
)
from fuzz_workers import Reader
from miniature import write_miniature
from test_documents import RECORDS, SOLUTIONS
from tiny import cache, normal, prompt, tiny_clip

import mergetune as mt
from mergetune import merging
from mergetune.data import find_pictures, listed_images, read_features
from mergetune.experiments.engine import begun
from mergetune.experiments.run_list import list_runs
from mergetune.io import convert_module, read_torchscript
from mergetune.solutions import read_head, read_prompt, recorded_metrics

STATE = {"weight": normal(3, 8), "bias": normal(3)}
SKLEARN = (
    ("pickle", ("m.pkl", "LogisticRegression"), {}), ("old pickle", ("m.pkl", "RidgeClassifier"), {"protocol": 2}),
    ("joblib", ("m.joblib", "LogisticRegression"), {}), ("zlib", ("m.joblib", "LogisticRegression"), {"compress": 3}),
    ("gzip", ("m.joblib", "RidgeClassifier"), {"compress": ("gzip", 3)}),
    ("pipeline", ("m.pkl", "LogisticRegression", "Normalizer", "StandardScaler", "MinMaxScaler"), {}),
    ("joblib pipeline", ("m.joblib", "SGDClassifier", "RobustScaler"), {"compress": 1}),
)  # fmt: skip
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
    Reader("cache", built, ("*",), same_cache),
    Reader("resealed cache", built, ("manifest.json",), opened_cache, reseal),
    Reader("state of the last check", built, ("checked.json",), same_cache, share=2, refuses=False),
    Reader("cache to continue", built, ("*",), continued, share=2),
    Reader("images of a cache", built, ("images.json",), continued, reseal, share=2),
    Reader("cache in building", unfinished, ("*",), continued, share=3),
    Reader("rows after the check", built, ("arrays.bin",), opened_cache, recheck),
    *(Reader(f"{how} rows of an open cache", cache_and_damage, ("arrays.bin",),
             partial(read_while_damaged, mapped=how == "mapped"), share=2) for how in ("mapped", "read")),
    Reader("cache of version 0.1", version_1, ("*",), verified_1),
    Reader("cache of version 0.1 to continue", built_1, ("*",), continued_1, share=2),
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
           ("checkpoint",), read_prompt, share=1, refuses=False),
    Reader("class-specific CoOp", class_prompt, ("model*",), for_clip),
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
    *(Reader(f"scikit-learn {name}", sklearn_model(*how, **options), ("m.*",),
             partial(lambda n, f: mt.open_solution(f / n), how[0]))
      for name, how, options in SKLEARN),
    Reader("CLIP-LoRA", clip_lora, ("*.pt",), lambda f: mt.open_solution(f / "lora_weights.pt")),
    *(Reader(f"PEFT and {names}", partial(lambda names, f: mt.to_peft(lora(), f, names=names), names), ("*",),
             mt.open_solution) for names in ("open_clip", "transformers")),
    Reader("whole model", whole_model, ("*.pt",), lambda f: mt.open_solution(f / "epoch_1.pt"), share=3),
    Reader("whole model.safetensors", lambda f: weights("m.safetensors", **small_model())(f), ("*",),
           lambda f: mt.open_solution(f / "m.safetensors"), share=3),
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
    Reader("features.npz of objects", named_arrays, ("f.npz",), lambda f: read_features(f / "f.npz")),
    Reader("features.npy", plain_array, ("*",), lambda f: read_features(f / "f.npy", labels=f / "labels.txt")),
    Reader("features.npy and objects.npy", named_arrays, ("*.npy",),
           lambda f: read_features(f / "f.npy", labels=f / "objects.npy")),
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
    *(Reader(name, table(name), ("t*",), partial(lambda name, f: mt.image_table(f / name), name), share=3)
      for name in ("table.tsv", "table.jsonl", "table with semicolons.csv")),
    *(Reader(f"class names in {name}", folder_and_names(name), (name,), partial(renamed, name), share=2)
      for name in CLASS_NAMES),
    Reader("table.json", table("t.json"), ("t.json",), lambda f: listed_images(f / "t.json")),
    *(Reader(f"pictures in {name}", picture_list(name, content), (name,),
             partial(lambda name, f: list(find_pictures([f / name])), name), share=2, refuses=name != "l.txt")
      for name, content in LISTED.items()),
    *(Reader(f"predictions of {name}", to_predict(name), (name, "c0/000.png"), partial(predicted, name), share=2)
      for name in LISTED),
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
    *(Reader(f"predict {name}", to_predict(name), (name, "c0/000.png"), partial(predict_command, name), share=1)
      for name in LISTED),
    Reader("cache --verify", built, ("*",), command("cache", "--out", "{}", "--verify"), share=2),
    Reader("resealed cache --verify", built, ("manifest.json",), command("cache", "--out", "{}", "--verify"), reseal),
    Reader("list of runs", reported, ("**/*.json",), command("runs", "{}"), share=2, refuses=False),
    # locks
    Reader("locks", locked_folder, (".*",), written_anyway, refuses=False),
]  # fmt: skip
