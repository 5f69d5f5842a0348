"""`mergetune eval` and `mergetune path` measure saved solutions on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.options import (
    AllowTorchscript,
    BackboneIfNeeded,
    Cache,
    Classes,
    Device,
    Json,
    Position,
    Precision,
    Pretrained,
    Space,
    Templates,
)
from mergetune.cli.shared import (
    HALVES,
    announce,
    clip_for,
    errors,
    new_table,
    open_cache,
    out,
    print_json,
    print_table,
    read_solution,
    tell,
)

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
    as_json: Json = False,
) -> None:
    """Show the accuracy of zero-shot CLIP and of saved solutions on cached test features."""
    import mergetune as mt

    with errors():
        test = open_cache(features, "base" if base_novel else classes, split="test")
        found = {name: read_solution(name, test, position) for name in solution}
        clip = clip_for(
            backbone,
            pretrained,
            device=device,
            precision=precision,
            allow_torchscript=allow_torchscript,
            caches=[test],
            solutions=found,
        )
        entries = {"zero-shot": mt.classifier(clip, template)}
        entries |= {name: mt.classifier(clip, opened) for name, opened in found.items()}
        novel = open_cache(features, "novel", split="test") if base_novel else None
        report: dict[str, Any] = {}
        for name, classify in entries.items():
            if novel is not None:
                report[name] = mt.base_to_novel(classify, test, novel).to_json()
            else:
                report[name] = mt.accuracy(classify, test).to_json()
    if as_json:
        print_json(report)
        return
    rows = []
    for name, found in report.items():
        if base_novel:
            values = {column: found[part] for column, part in HALVES.items()}
            cells = {c: f"{v['accuracy'] if isinstance(v, dict) else v:.2f}" for c, v in values.items()}
        else:
            values = {"accuracy": found["accuracy"], "mean of classes": found["mean_per_class"]}
            cells = {c: f"{v:.2f}" for c, v in values.items()} | {"images": str(found["images"])}
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
        merged, start = read_solution(solution, data, position), read_solution(tuned, data, position)
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
    table = new_table("", "loss at start", "highest", "at end", "barrier")
    for name, walk in walks.items():
        table.add_row(name, *(f"{v:.4f}" for v in (walk.loss[0], max(walk.loss), walk.loss[-1], walk.barrier)))
    out.print(table)
    for name, file in (("Figure", figure), ("Plane", plane), ("Report", report)):
        if file:
            tell(f"{name}: {file}")
