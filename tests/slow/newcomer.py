"""Plays a newcomer: 12 embedded icon classes as a user's folder, from the installation to a prediction without torch.

    python tests/slow/newcomer.py
    python tests/slow/newcomer.py --python /path/to/python     # an environment that has mergetune[onnx]

Each step is a command that README.md gives. The script prints the wall and CPU seconds of each step, and checks what a
user would notice: every picture has an answer, most answers are right, the second experiment has a folder of its own,
and onnxruntime gives the labels that `mergetune predict` gives. Exit code 1 if a step fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("airplane", "anchor", "apple", "bell", "bicycle", "book", "bus", "camera", "car", "cat", "fish", "key")
NEW = 5  # pictures per class that the user takes later


def user_folder(place: Path) -> dict[str, str]:
    """Write photos/CLASS/*.png and new/*.png below ``place``; return file name -> class of the new pictures."""
    answers = {}
    with zipfile.ZipFile(REPOSITORY / "mergetune/assets/tilted-icons.zip") as content:
        by_class: dict[str, list[str]] = {}
        for name in sorted(content.namelist()):
            if name.endswith(".png"):
                by_class.setdefault(Path(name).parent.name, []).append(name)
        chosen = [name for name in CLASSES if name in by_class]
        chosen += [name for name in by_class if name not in chosen][: len(CLASSES) - len(chosen)]
        for label in chosen:
            for i, name in enumerate(by_class[label]):
                new = i < NEW
                file = place / "new" / f"{label}-{i}.png" if new else place / "photos" / label / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read(name))
                if new:
                    answers[file.name] = label.replace("_", " ")
    return answers


class Newcomer:
    """Runs commands one after the other in one folder, and keeps how long each took."""

    def __init__(self, python: Path, place: Path) -> None:
        self.python, self.place = python, place
        self.rows: list[tuple[str, float, float]] = []

    def step(self, title: str, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command; return what it printed on stdout."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MERGETUNE", "PYTHON", "VIRTUAL_ENV"))}
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment['PATH']}"
        print(f"\n$ {' '.join(map(str, command))}", flush=True)
        before, start = os.times(), time.monotonic()
        done = subprocess.run(
            list(map(str, command)), cwd=cwd or self.place, env=environment, stdout=subprocess.PIPE, text=True
        )
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        self.rows.append((title, time.monotonic() - start, cpu))
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(f"{title}: exit code {done.returncode}")
        return done.stdout

    def mergetune(self, title: str, *arguments: str | Path) -> str:
        return self.step(title, self.python.with_name("mergetune"), *arguments)


def check(truth: bool, told: str) -> None:
    if not truth:
        sys.exit(f"not as promised: {told}")
    print(f"ok: {told}", flush=True)


def play(python: Path | None, place: Path) -> None:
    answers = user_folder(place)
    fresh = python is None
    if python is None:
        venv.create(place / "venv", with_pip=True)
        python = place / "venv/bin/python"
    user = Newcomer(python, place)
    if fresh:
        user.step("install", python, "-m", "pip", "install", "-q", ".[onnx]", cwd=REPOSITORY)
    user.mergetune("fit", "fit", "photos", "--backbone", "icon-clip", "--out", "out")
    user.mergetune("predict", "predict", "out", "new", "--csv", "answers.csv")
    with open(place / "answers.csv", newline="", encoding="utf-8") as file:
        predicted = {Path(row["file"]).name: row["label"] for row in csv.DictReader(file)}
    check(predicted.keys() == answers.keys(), f"each of {len(answers)} new pictures has an answer")
    right = sum(predicted[name] == label for name, label in answers.items())
    check(right > len(answers) / 2, f"{right} of {len(answers)} answers are right")
    user.mergetune("fit, another lam", "fit", "photos", "--backbone", "icon-clip", "--out", "out", "--lam", "4")
    runs = json.loads(user.mergetune("runs", "runs", "out", "--json"))
    check(len(runs) == 2, "two runs, each in a folder")
    user.mergetune("export", "export", "out", "--to", "onnx", "--out", "served/model.onnx")
    pictures = sorted((place / "new").iterdir())
    told = user.step("predict, onnxruntime alone", python, "served/predict_onnx.py", "served/model.onnx", *pictures)
    lines = [line for line in told.splitlines() if ".png" in line]
    same = sum(predicted[picture.name] in line for picture, line in zip(pictures, lines, strict=True))
    check(same == len(pictures), "onnxruntime gives the same label for every picture")
    print(f"\n{'step':<28}{'wall s':>8}{'CPU s':>8}")
    for title, wall, cpu in user.rows:
        print(f"{title:<28}{wall:>8.1f}{cpu:>8.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="Python of an environment that has mergetune[onnx]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        play(given.python and given.python.absolute(), Path(folder))
