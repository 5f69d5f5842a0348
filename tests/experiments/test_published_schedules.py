"""`reproduce` trains stage 1 as the publications do, and says how."""

import json
from pathlib import Path

import pytest
from miniature import write_miniature
from typer.testing import CliRunner

import mergetune
from mergetune.cli import app
from mergetune.experiments import Experiment, plan


def settings(protocol: str, method: str, dataset: str, shots: int | None, **options) -> dict:
    named = {} if protocol in ("cross-dataset", "domain", "robust") else {"datasets": [dataset]}
    (run,) = plan(protocol, methods=[method], seeds=[1], shots=[shots] if shots else (), **named)
    return Experiment(root=Path("data"), out=Path("out"), **options).stage_1(run)


@pytest.mark.parametrize(
    ("protocol", "method", "dataset", "shots", "epochs", "batch", "tokens"),
    [
        ("base-to-novel", "coop", "dtd", 16, 200, 32, None),
        ("base-to-novel", "coop", "imagenet", 16, 50, 32, None),
        ("cross-dataset", "coop", "imagenet", 16, 50, 32, None),
        ("domain", "coop", "imagenet", 16, 50, 32, None),
        ("base-to-novel", "kgcoop", "dtd", 16, 100, 128, None),
        ("base-to-novel", "kgcoop", "imagenet", 16, 100, 128, None),
        ("few-shot", "coop", "dtd", 1, 50, 32, 16),
        ("few-shot", "coop", "dtd", 2, 100, 32, 16),
        ("few-shot", "coop", "dtd", 4, 100, 32, 16),
        ("few-shot", "coop", "dtd", 8, 200, 32, 16),
        ("few-shot", "coop", "dtd", 16, 200, 32, 16),
        ("few-shot", "coop", "imagenet", 16, 50, 32, 16),
    ],
)
def test_stage_1_is_the_published_one(protocol, method, dataset, shots, epochs, batch, tokens):
    found = settings(protocol, method, dataset, shots)
    assert (found["epochs"], found["batch_size"], found.get("n_ctx")) == (epochs, batch, tokens)
    assert found["precision"] == "float32", "results must not depend on what a machine is fastest at"
    other = settings(protocol, method, dataset, shots, tune={"epochs": 3, "precision": "bfloat16"})
    assert other == found | {"epochs": 3, "precision": "bfloat16"}, "what is given counts"


def test_heads_take_the_defaults_of_tune():
    assert settings("robust", "head", "imagenet", None) == {"method": "head", "precision": "float32"}


def test_the_table_says_how_the_runs_were_trained(tmp_path: Path) -> None:
    icon_clip = f"local-dir:{mergetune.__path__[0]}/assets/icon-clip"
    write_miniature(tmp_path / "data", "eurosat", images_per_class=8, classes=4, size=16)
    place = f"--root {tmp_path / 'data'} --out {tmp_path / 'out'}"
    command = (
        f"reproduce base-to-novel {place} --backbone {icon_clip} --datasets eurosat --seeds 1 --shots 2 "
        "--method coop kgcoop --tune epochs=2 --fit epochs=1 --views 2"
    ).split()
    done = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    said = (tmp_path / "out/base-to-novel/caption.txt").read_text().strip()
    assert said == (
        "Stage 1: CoOp 2 epochs, batch 32; KgCoOp 2 epochs, batch 128. Stage 2: 1 epochs. Text tower: float32. "
        "Views per training image: 2. The last epoch counts: nothing is chosen on validation images. "
        "Incomplete datasets, whose figures cannot stand beside published ones: eurosat: train 16 instead of 13,500, "
        "val 8 instead of 5,400, test 8 instead of 8,100."
    )
    assert said in done.output
    record = json.loads((tmp_path / "out/base-to-novel/eurosat/kgcoop/shots-2/seed-1/run.json").read_text())
    assert record["settings"]["tune"]["batch_size"] == 128 and record["settings"]["views"] == 2
    assert (tmp_path / "out/cache/eurosat/train-shots-2-seed-1-views-2").is_dir()
