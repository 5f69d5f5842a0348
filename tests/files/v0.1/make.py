"""How the files beside this script were made, with mergetune 0.1.0: they open with every later version.

    python tests/files/v0.1/make.py EMPTY_FOLDER

They are kept as they are and never made again: a later version would write its own files, not this one's. All commands
run in the empty folder with relative paths, so no path of a machine is in the files.

    cache, cache-views     caches of the embedded icons of four classes: train and test; bfloat16 with two views
    tune, tune-head        finished runs of `mergetune tune`: a prompt and a head
    fit                    a finished run of `mergetune fit`
    coop, coop-interrupted   runs of `mergetune.tune`, finished and killed, in float32: the commands take the fastest
                           precision of the machine, and on others a run in bfloat16 ends elsewhere
    fit-head, fit-head-interrupted   runs of `mergetune.fit` on the head, finished and killed, near a saved head: unlike
                           the class embeddings of a template, a saved head has the same bits on every machine
    merged                 TIES of tune and fit
    exports                tune and tune-head in all forms
    eval.json              what `mergetune eval` said of tune, fit and merged on cache/test
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

CLASSES = ("anchor", "bell", "camera", "heart")
MODEL = ("--backbone", "local-dir:icon-clip")
TRAIN = ("--cache", "cache/train")
TUNE = ("tune", *TRAIN, *MODEL, "--epochs", "16", "--batch-size", "4", "--lr", "0.01")
EXPORT = ("--classnames", "names.txt", *MODEL)
STATE = "state.safetensors"
SCRIPT = str(Path(__file__).resolve())  # before the folder changes


def mergetune(*arguments: str) -> str:
    command = [sys.executable, "-m", "mergetune", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(folder: str) -> None:
    """The runs that no command can make: the commands take no precision and no saved zero-shot solution."""
    import mergetune as mt

    clip, cache = mt.load_clip("local-dir:icon-clip"), mt.FeatureCache.open("cache/train")
    common = {"epochs": 16, "batch_size": 4, "precision": "float32", "resume": folder, "progress": False}
    if folder.startswith("coop"):
        result = mt.tune(clip, cache, lr=0.01, **common)
    else:
        near = mt.open_solution("exports/head.safetensors", classnames=CLASSES)
        result = mt.fit(clip, cache, mt.load_solution("tune-head"), zero_shot=near, **common)
    result.save(folder)


def interrupted(folder: Path) -> None:
    """Kill a run of 16 epochs when it has finished some."""
    with subprocess.Popen([sys.executable, SCRIPT, str(folder)]) as process:
        while epochs(folder) < 4:
            if process.poll() is not None:
                raise RuntimeError(f"{folder} was finished before it could be killed")
            time.sleep(0.001)
        process.kill()
    for part in folder.glob(".*"):
        part.unlink()
    print(f"{folder}: killed after {epochs(folder)} epochs")


def epochs(folder: Path) -> int:
    if not (folder / STATE).is_file():
        return 0
    content = (folder / STATE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return len(json.loads(header["__metadata__"]["run"])["history"])


def main() -> None:
    assets = files("mergetune") / "assets"
    with as_file(assets / "icon-clip") as model:
        Path("icon-clip").symlink_to(model)
    Path("names.txt").write_text("\n".join(CLASSES) + "\n")
    with as_file(assets / "tilted-icons.zip") as archive, zipfile.ZipFile(archive) as content:
        for split, images in (("train", 10), ("test", 8)):
            for name in CLASSES:
                found = sorted(n for n in content.namelist() if n.startswith(f"{split}/{name}/"))
                content.extractall("images", found[:images])
    mergetune("cache", "images", "--out", "cache", *MODEL)
    mergetune("cache", "images", "--out", "cache-views", *MODEL, "--dtype", "bfloat16", "--views", "2")
    mergetune(*TUNE, "--out", "tune")
    mergetune(*TUNE, "--out", "tune-head", "--method", "head")
    mergetune("fit", *TRAIN, *MODEL, "--out", "fit", "--tuned", "tune", "--epochs", "8")
    mergetune("merge", "ties", "tune", "fit", "--out", "merged", "--base", "a photo of a {}.", *MODEL)
    for form, out in (("coop", "coop"), ("head", "head.safetensors"), ("classifier", "classifier.pt")):
        mergetune("export", "tune", "--to", form, "--out", f"exports/{out}", *EXPORT)
    for suffix in (".npz", ".pt"):
        mergetune("export", "tune-head", "--to", "head", "--out", f"exports/head{suffix}")
    mergetune("export", "tune", "--to", "hub", "--out", "exports/hub", "--license", "mit")
    for name in ("coop", "fit-head"):
        subprocess.run([sys.executable, SCRIPT, name], check=True)
        interrupted(Path(f"{name}-interrupted"))
    solutions = [word for name in ("tune", "fit", "merged") for word in ("--solution", name)]
    Path("eval.json").write_text(mergetune("eval", "--cache", "cache/test", *MODEL, *solutions, "--json"))


if __name__ == "__main__":
    if sys.argv[1].startswith(("coop", "fit-head")):
        run(sys.argv[1])
    else:
        os.chdir(sys.argv[1])
        main()
