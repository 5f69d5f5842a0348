"""``--dry-run`` of the commands: what would be done, and estimates of the time; nothing is written."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergetune.cli.shared import first_rank, print_json, tell

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what would be done, with estimates from a few images and steps; write nothing."
    ),
]


def print_forecast(found: Any, as_json: bool, plan: str) -> None:
    """Prints a forecast.

    Args:
        found: :class:`mergetune.experiments.own_forecast.Forecast`.
        as_json: whether to print JSON.
        plan: what would be run, one sentence.
    """
    from mergetune.experiments.own_forecast import MEASURED_IMAGES, MEASURED_STEPS

    if not first_rank():
        return
    if as_json:
        print_json(found.to_json() | {"plan": plan})
        return
    tell(plan)
    if found.images:
        parts = ", ".join(f"{count:,} {part}" for part, count in found.images.items())
        tell(
            f"Encoding: {parts} images of {found.classes:,} classes, {_size(found.gib)} of features, about "
            f"{_time(found.seconds_encoding)}. Images that are cached already are counted, too."
        )
    for stage, steps in found.steps.items():
        title = {"tune": "Stage 1", "fit": "Stage 2", "kinds": "Other kinds"}[stage]
        tell(f"{title}: {steps:,} steps, about {_time(found.seconds_training[stage])}.")
    tell(
        f"Together about {_time(found.seconds)} on this machine, estimated from {MEASURED_IMAGES} images and "
        f"{MEASURED_STEPS} steps per stage that were measured now. Nothing was written."
    )


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.01 else f"{gib * 1024:.2f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def dry_run_of_tune(clip: Any, data: Any, options: dict[str, Any], plan: str, as_json: bool) -> None:
    """Prints what `mergetune tune` would do on a cache.

    Args:
        clip: the backbone.
        data: the feature cache.
        options: keyword arguments of :func:`mergetune.tune`.
        plan: what would be run, one sentence.
        as_json: whether to print JSON.
    """
    from mergetune.experiments.own_forecast import Stage, nothing_to_encode, with_stages

    found = with_stages(nothing_to_encode(data), clip, data, [Stage("tune", options)])
    print_forecast(found, as_json, plan)


def dry_run_of_fit(clip: Any, data: Any, options: dict[str, Any], plan: str, as_json: bool) -> None:
    """Prints what `mergetune fit` would do on a cache.

    Args:
        clip: the backbone.
        data: the feature cache.
        options: keyword arguments of :func:`mergetune.fit`, with ``tuned``.
        plan: what would be run, one sentence.
        as_json: whether to print JSON.
    """
    from mergetune.experiments.own_forecast import Stage, nothing_to_encode, with_stages

    found = with_stages(nothing_to_encode(data), clip, data, [Stage("fit", options)])
    print_forecast(found, as_json, plan)


def dry_run_of_images(clip: Any, data: Any, asked: dict[str, Any], folder: Any, workers: int, as_json: bool) -> None:
    """Prints what `mergetune fit` would do on images.

    Args:
        clip: the backbone.
        data: the dataset.
        asked: keyword arguments of :func:`mergetune.fit_dataset`.
        folder: folder for the results.
        workers: number of processes that decode images.
        as_json: whether to print JSON.
    """
    from mergetune.experiments.own_forecast import forecast_dataset

    asked = {name: value for name, value in asked.items() if name != "ignored"}
    found = forecast_dataset(clip, data, workers=workers, **asked)
    stages = "stage 2" if asked["tuned"] else "stages 1 and 2"
    plan = f"Would encode the images, run {stages} with the measuring run if there is one, and write into {folder}."
    print_forecast(found, as_json, plan)
