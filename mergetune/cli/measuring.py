"""`mergetune eval` and `mergetune path` measure saved solutions on cached features."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.answers import (
    ZERO_SHOT,
    AnswerFiles,
    ConfusionFile,
    FitTemperature,
    PerClassFile,
    Pictures,
    SheetFile,
    Validation,
    WrongFile,
    check_temperature,
    fit_temperatures,
    open_validation,
    print_answers,
    print_mistakes,
    print_temperatures,
    save_temperatures,
)
from mergetune.cli.clip_choice import clip_for
from mergetune.cli.options import (
    AllowTorchscript,
    BackboneIfNeeded,
    Background,
    Cache,
    Classes,
    Device,
    HeadClassNames,
    HeadName,
    Json,
    MaxPixels,
    Position,
    Precision,
    Pretrained,
    Space,
    Templates,
)
from mergetune.cli.running import suggest
from mergetune.cli.shared import (
    HALVES,
    announce,
    errors,
    names_of_rows,
    new_table,
    open_cache,
    out,
    print_json,
    print_table,
    read_solution,
    tell,
)
from mergetune.facts.function_options import BACKGROUND, MAX_PIXELS

_SOLUTION = typer.Option("--solution", help="Folder of a saved solution, for example the --out of `mergetune fit`.")


def evaluate(
    features: Cache,
    solution: Annotated[list[str], _SOLUTION] = [],
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    classes: Classes = "all",
    base_novel: Annotated[
        bool,
        typer.Option("--base-novel", help="Show base and novel classes, apart and joint, and harmonic means (HM)."),
    ] = False,
    template: Templates = ["a photo of a {}."],
    position: Position = "end",
    weight: HeadName = None,
    names: HeadClassNames = None,
    confusion: ConfusionFile = None,
    per_class: PerClassFile = None,
    wrong: WrongFile = None,
    contact_sheet: SheetFile = None,
    images: Pictures = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    background: Background = BACKGROUND,
    temperature: FitTemperature = False,
    val: Validation = None,
    as_json: Json = False,
) -> None:
    """Show the accuracy of zero-shot CLIP and of saved solutions on cached test features.

    ECE is the expected calibration error: the mean distance between probability and accuracy, in percent. Files of
    single answers are written for each --solution, or for zero-shot CLIP if none is given.
    """
    import mergetune as mt

    with errors():
        wanted = AnswerFiles(confusion, per_class, wrong, contact_sheet, images, max_pixels, background)
        wanted.check(solution or [ZERO_SHOT], base_novel=base_novel)
        check_temperature(temperature, val, base_novel=base_novel)
        test = open_cache(features, "base" if base_novel else classes, split="test")
        called = names_of_rows(names)
        opened = {path: read_solution(path, test, position, classnames=called, name=weight) for path in solution}
        for path, found in opened.items():  # what the names decide is said before the model is loaded
            known = test.classnames if found.classnames is None or found.kind == "residual" else found.classnames
            if unknown := [label for label in test.classnames if label not in known]:
                raise ValueError(
                    f"--solution must know the classes of --cache, got the {found.kind} {path}, which does not know "
                    f"{unknown[0]!r}"
                )
        clip = clip_for(
            backbone,
            pretrained,
            device=device,
            precision=precision,
            allow_torchscript=allow_torchscript,
            caches=[test],
            solutions=opened,
            only_heads=True,
        )
        entries = {} if isinstance(clip, mt.FeatureSpace) else {ZERO_SHOT: mt.classifier(clip, template)}
        entries |= {path: mt.classifier(clip, found) for path, found in opened.items()}
        # Class weights are computed once per list of classes.
        entries = {row: replace(found, weights=functools.cache(found.weights)) for row, found in entries.items()}
        at = {row: mt.temperature_of(opened.get(row, template)) for row in entries}
        if base_novel:
            halves = _base_novel(entries, at, test, open_cache(features, "novel", split="test"))
            if as_json:
                print_json(halves)
            else:
                _print_halves(halves)
            return
        found = {name: mt.predict_features(entries[name], test, temperature=at[name]) for name in entries}
        fitted = {}
        if val is not None:
            validation = open_validation(val, classes, test, opened)
            asked = {name: entries[name] for name in solution or [ZERO_SHOT]}
            fitted = fit_temperatures(asked, found, validation, test)
            found |= {name: fit.after for name, fit in fitted.items() if fit.saved}
        chosen = {name: found[name] for name in solution or [ZERO_SHOT]}
        confused = {name: mt.confusion(one) for name, one in chosen.items()} if wanted.scores else {}
        written = wanted.write(chosen, confused)
        if fitted:
            save_temperatures(opened, fitted)
    if as_json:
        report = {name: one.report.to_json() | one.calibration() for name, one in found.items()}
        for name, one in confused.items():
            report[name] |= one.to_json()
        for name, fit in fitted.items():
            report[name]["fitted_temperature"] = fit.to_json()
        print_json(report)
        return
    print_answers(found)
    for name, one in confused.items():
        print_mistakes(name, one)
    if fitted:
        print_temperatures(fitted, val)
    for line in written:
        tell(line)


def _base_novel(entries: dict[str, Any], temperatures: dict[str, float], base: Any, novel: Any) -> dict[str, Any]:
    """Returns accuracies of each classifier on both halves; ECE and NLL where the classes are those of one half."""
    import mergetune as mt

    report = {}
    for name, classify in entries.items():
        report[name] = mt.base_to_novel(classify, base, novel).to_json()
        for half, images in (("base", base), ("novel", novel)):
            found = mt.predict_features(classify, images, temperature=temperatures[name])
            report[name][half] |= found.calibration()
    return report


def _print_halves(report: dict[str, Any]) -> None:
    rows = []
    for name, found in report.items():
        values = {column: found[part] for column, part in HALVES.items()}
        cells = {c: f"{v['accuracy'] if isinstance(v, dict) else v:.2f}" for c, v in values.items()}
        rows.append((name, cells, None))
    print_table("", rows)


def path(
    features: Cache,
    tuned: Annotated[str, typer.Option("--tuned", help="Fine-tuned solution or CoOp checkpoint.")],
    solution: Annotated[str, _SOLUTION],
    backbone: BackboneIfNeeded = None,
    pretrained: Pretrained = None,
    allow_torchscript: AllowTorchscript = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    classes: Classes = "all",
    template: Annotated[
        str, typer.Option(help="Zero-shot template; {} stands for the class name.")
    ] = "a photo of a {}.",
    points: Annotated[int, typer.Option(min=2, help="Number of points on each path, with both ends.")] = 21,
    space: Space = "embedding",
    figure: Annotated[Path, typer.Option(help="File of the figure: .png, .pdf or .svg.")] = Path("paths.png"),
    plane: Annotated[
        Path | None,
        typer.Option(help="Also draw the plane through the three solutions into this file: .png, .pdf or .svg."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML report with paths, plane and curvature to this file.")
    ] = None,
    curvature: Annotated[
        int,
        typer.Option(
            min=0, help="With --report: number of points on each path where the Hessian is measured; 0 skips it."
        ),
    ] = 5,
    position: Position = "end",
    weight: HeadName = None,
    names: HeadClassNames = None,
    as_json: Json = False,
) -> None:
    """Measure loss, accuracy and barriers on the straight paths between three solutions, and draw them.

    The solutions are zero-shot CLIP, the fine-tuned solution (--tuned) and the merged solution (--solution).
    """
    import mergetune as mt
    from mergetune import evaluation
    from mergetune.solutions import zero_shot_like

    with errors():
        if curvature == 1:
            raise ValueError("--curvature must be 0 or at least 2 (both ends of a path count), got 1")
        data = open_cache(features, classes, split="test")
        called = names_of_rows(names)
        merged, start = (
            read_solution(path, data, position, classnames=called, name=weight) for path in (solution, tuned)
        )
        clip = clip_for(
            backbone, pretrained, device=device, precision=precision, allow_torchscript=allow_torchscript,
            caches=[data], solutions={tuned: start, solution: merged},
        )  # fmt: skip
        zero_shot = zero_shot_like(clip, merged, template)
        walks = mt.connectivity(clip, zero_shot, start, merged, data, points=points, space=space)
        images, way = f"{classes} classes", {"zero-shot": zero_shot, "MERGETUNE": merged, "fine-tuned": start}
        mt.plot({images: walks}, figure)
        found = {name: walk.to_json() for name, walk in walks.items()}
        planes, spectra = {}, {}
        if plane or report:
            three = {name: way[name] for name in ("zero-shot", "fine-tuned", "MERGETUNE")}
            try:
                planes[images] = evaluation.plane(clip, three, data, space=space)
                found["plane"] = planes[images].to_json()
            except ValueError as error:  # a weight average lies on the line of the other two
                if plane:
                    raise
                announce(as_json)(f"the report has no plane: {error}")
        if plane:
            evaluation.plot_plane(planes, plane)
        if report and curvature:
            spectra[images] = evaluation.spectrum(clip, way, data, points=curvature, space=space)
            found["curvature"] = spectra[images].to_json()
        if report:
            settings = {
                "backbone": clip.name, "cache": features, "images": len(data), "classes": len(data.classnames),
                "fine-tuned": tuned, "MERGETUNE": solution, "template": template, "space": space,
            }  # fmt: skip
            evaluation.report(report, {images: walks}, planes=planes, spectra=spectra, settings=settings)
    if as_json:
        print_json(found)
        return
    of = ("--classes", None if classes == "all" else classes)
    suggest("eval", "--cache", features, "--solution", tuned, "--solution", solution, of)
    table = new_table("", "loss at start", "highest", "at end", "barrier")
    for name, walk in walks.items():
        table.add_row(name, *(f"{v:.4f}" for v in (walk.loss[0], max(walk.loss), walk.loss[-1], walk.barrier)))
    out.print(table)
    for name, file in (("Figure", figure), ("Plane", plane), ("Report", report)):
        if file:
            tell(f"{name}: {file}")
