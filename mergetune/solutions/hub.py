"""A folder for the Hugging Face Hub: the saved solution and a model card with base model, results and an example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import EvalResult, HfApi, ModelCardData

from mergetune.io import (
    not_reached,
    quiet_retries,
    read_json,
    scratch_folder,
    unreachable,
    write_atomically,
    writing_in,
)
from mergetune.solutions.base import Solution
from mergetune.solutions.kinds import known_classes
from mergetune.solutions.published import HUB, architecture, published

TASK = "zero-shot-image-classification"
SHOWN = 100  # class names that a card lists
PARTS = {"all": "test images", "base": "test images, base classes", "novel": "test images, novel classes"}
REPORT, RESULT = "report.json", "result.json"  # what `mergetune fit` and a run leave beside a solution


def to_hub(
    solution: Solution,
    folder: str | Path,
    *,
    license: str | None = None,
    repo_id: str = "name/repository",
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a folder for the Hugging Face Hub: the saved solution and a model card, README.md with YAML metadata.

    ``mergetune.load_solution`` reads the folder, also after a download from the Hub. The folder holds no path of this
    computer: a backbone that is a local folder or weight file is left out of ``solution.json``, and the card says how
    to give it. Its fingerprint stays, so another CLIP is refused.

    Args:
        solution: the solution to write.
        folder: created if it does not exist; its README.md is replaced.
        license: license in the card's metadata, as the Hub spells it, for example "mit".
        repo_id: future repository, "name/repository", for the code example in the card.
        metrics: accuracy in percent by the name of the images, for the card; see :func:`recorded_metrics`.

    Example:
        >>> import mergetune as mt, os, tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> mt.to_hub(mt.Head(torch.eye(2), ("cat", "dog")), folder, license="mit", metrics={"my test photos": 91.5})
        >>> sorted(os.listdir(folder))
        ['README.md', 'solution.json', 'solution.safetensors']
    """
    folder = Path(folder)
    card = _card(solution, license, repo_id, metrics or {})
    with writing_in(folder):
        published(solution).save(folder)
        write_atomically(folder / "README.md", card.encode())


def push_to_hub(
    solution: Solution,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    commit_message: str = "Upload with mergetune",
) -> str:
    """Upload the folder of :func:`to_hub` to the Hugging Face Hub. The repository is created if it does not exist.

    Args:
        solution: the solution to upload.
        repo_id: "name/repository".
        private: whether a new repository is private; None takes the default of the account.
        token: access token of the Hub; None takes the token that ``hf auth login`` stored.
        license: see :func:`to_hub`.
        metrics: see :func:`to_hub`.
        commit_message: message of the upload's commit.

    Returns:
        URL of the repository.
    """
    api = HfApi(token=token)
    with scratch_folder() as folder:
        to_hub(solution, folder, license=license, repo_id=repo_id, metrics=metrics)
        try:
            with quiet_retries():
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except Exception as error:  # the HTTP library has its own types of error
            if not unreachable(error):
                raise
            way_on = "write the folder with to_hub and upload it later"
            raise not_reached(f"{repo_id} could not be uploaded", error, way_on=way_on) from None
    return str(url)


def recorded_metrics(folder: str | Path) -> dict[str, float]:
    """Accuracies in percent by the name of the images, from ``report.json`` or ``result.json`` beside a solution.

    Returns:
        The accuracies on test images in ``report.json``, which ``mergetune fit`` on images writes; without it the
        accuracy on validation images of the chosen epoch in ``result.json``; empty if neither holds accuracies.
    """
    found: dict[str, float] = {}
    content = _content(Path(folder) / REPORT)
    chosen = content.get("row", "MERGETUNE")  # the row of the saved solution
    for part, rows in (_entry(content, "reports") or {}).items():
        row = _entry(rows, str(chosen)) or {}
        if isinstance(accuracy := row.get("accuracy"), int | float):
            found[PARTS.get(part, f"test images, {part} classes")] = float(accuracy)
    if found:
        return found
    history = _content(Path(folder) / RESULT).get("history")
    epochs = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    validated = [e["val_accuracy"] for e in epochs if isinstance(e.get("val_accuracy"), int | float)]
    return {"validation images": float(max(validated))} if validated else {}


def _content(file: Path) -> dict[str, Any]:
    """The object in a JSON document; empty if there is none."""
    if not file.is_file():
        return {}
    content = read_json(file)
    return content if isinstance(content, dict) else {}


def _entry(content: Any, name: str) -> dict[str, Any] | None:
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def _card(solution: Solution, license: str | None, repo_id: str, metrics: Mapping[str, float]) -> str:
    """The model card: description, backbone, classes, results, and an example that classifies a picture."""
    shared, title, tag, what = published(solution), *solution.card()
    model, option, base = _backbone(shared.backbone, architecture(solution.backbone), bool(solution.backbone))
    data = ModelCardData(
        library_name="mergetune",
        pipeline_tag=TASK,
        tags=["clip", "open_clip", "mergetune", tag],
        license=license,
        base_model=_repository(shared.backbone),
        model_name=title if metrics else None,
        eval_results=[
            EvalResult(
                TASK, "images", name, "accuracy", round(value, 2), dataset_config=name, metric_name="Accuracy (%)"
            )
            for name, value in metrics.items()
        ]
        or None,
    )
    classes = known_classes(solution) or ()
    names = "" if classes else ', classnames=["cat", "dog"]'
    listed = f"{', '.join(classes[:SHOWN])}{', ...' if len(classes) > SHOWN else ''}"
    trained = "Classes" if solution.classnames is not None else "Trained on the classes (it serves others, too)"
    table = "".join(f"| {name} | {value:.2f} |\n" for name, value in metrics.items())
    results = f"\n## Results\n\n| images | accuracy (%) |\n|---|---:|\n{table}" if metrics else ""
    section = f"\n## Classes\n\n{trained}: {listed}\n" if classes else ""
    option += "" if classes else " --classnames NAMES.txt"
    return f"""---
{data.to_yaml().strip()}
---

# {title}

{what} Made for {base} with mergetune ([arXiv 2601.10497](https://arxiv.org/abs/2601.10497)).

## Use

```python
import mergetune as mt
from huggingface_hub import snapshot_download

solution = mt.load_solution(snapshot_download({repo_id!r}))
clip = {model}
predict = mt.Predictor(clip, solution{names})
print(predict("cat.jpg").label)
```

or, for many pictures: `mergetune predict FOLDER{option} PICTURES`, where FOLDER is this repository on your computer.
{results}{section}"""


def _repository(backbone: str | None) -> str | None:
    """The Hub repository of a backbone, as far as its name or open_clip's table of weights tells."""
    if (backbone or "").startswith(HUB):
        return (backbone or "").removeprefix(HUB)
    model, _, tag = (backbone or "").partition("/")
    return open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").strip("/") or None


def _backbone(name: str | None, architecture: str | None, recorded: bool) -> tuple[str, str, str]:
    """Code that loads the backbone, the options of a command for it, and its name in a sentence."""
    if name is not None:
        model, _, weights = (name, "", "") if name.startswith(HUB) else name.partition("/")
        code = f"mt.load_clip({model!r}, pretrained={weights!r})" if weights else f"mt.load_clip({model!r})"
        return code, f" --backbone {model}{f' --pretrained {weights}' if weights else ''}", name
    if architecture is not None:
        code = f'mt.load_clip({architecture!r}, pretrained="PATH/TO/WEIGHTS.pt")  # your copy of the weights'
        said = f"open_clip's {architecture} with weights that are not published here"
        return code, f" --backbone {architecture} --pretrained WEIGHTS", said
    said = "a CLIP that is not published here" if recorded else "an unrecorded CLIP"
    return 'mt.load_clip("local-dir:PATH/TO/CLIP")  # your copy of the CLIP', " --backbone local-dir:PATH", said
