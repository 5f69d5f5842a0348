"""Own images in one call: cached, fine-tuned, repaired and tested, with a report and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetune.clip import PLAIN, FrozenClip
from mergetune.data import Dataset, cache_features
from mergetune.evaluation import Report, connectivity, plot
from mergetune.experiments.engine import Together, counted, reports, tested, usual
from mergetune.io import write_json
from mergetune.solutions import Solution, zero_shot_like
from mergetune.training import FitResult, fit, tune


@dataclass(frozen=True)
class FolderResult:
    """What came of it.

    Attributes:
        result: of :func:`mergetune.fit`.
        reports: the classes tested, "all" or "base" and "novel" -> what was tested -> how it did on the test images;
            "seen" and "unseen" are the base and novel images among all classes.
        figure: loss and accuracy on the paths between zero-shot, tuned and merged solution.
    """

    result: FitResult
    reports: dict[str, dict[str, Report]]
    figure: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.result.settings,
            "reports": {part: {k: r.to_json() for k, r in found.items()} for part, found in self.reports.items()},
            "figure": str(self.figure),
        }


def fit_dataset(
    clip: FrozenClip,
    data: Dataset,
    out: str | Path,
    *,
    tuned: Sequence[Solution] = (),
    method: str = "coop",
    classes: str = "all",
    shots: int | None = 16,
    template: str | Sequence[str] = PLAIN,
    seed: int = 1,
    cache: str | Path | None = None,
    tune_options: dict[str, Any] | None = None,
    fit_options: dict[str, Any] | None = None,
    cache_options: dict[str, Any] | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> FolderResult:
    """From images to a saved solution, ``report.json`` and ``paths.png``. Killed, the same call goes on.

    Args:
        clip: the frozen CLIP.
        data: images with a training and a test split, as :func:`mergetune.ImageFolder` makes it.
        out: folder of caches, solutions, report and figure.
        tuned: fine-tuned solutions of the training classes; none: stage 1 makes one.
        method: of stage 1, see :func:`mergetune.tune`.
        classes: "all" to train and test on all classes; "base" to train on the first half and test on both halves.
        shots: training images a class; None is all.
        template: zero-shot text, or several.
        seed: of the draw and the training.
        cache: folder for the feature caches. None is ``out/cache``.
        tune_options, fit_options, cache_options: more keyword arguments of tune, fit and cache_features.
        progress: show bars where stderr is a terminal.
        report: told in a line what is about to be done.
    """
    if classes not in ("all", "base"):
        raise ValueError(f"classes must be all or base, got {classes!r}")
    for solution in tuned:  # what does not belong to the CLIP is refused here, before any image is encoded
        solution.check(clip)
    if not tuned and method != "head":
        _ = clip.text  # likewise a CLIP that takes no prompts
    out = Path(out)
    parts: dict[str, Dataset] = {"all": data}
    if classes == "base":
        base, novel = data.base_novel()
        parts = {"base": base, "novel": novel}
    visible = parts[classes]
    training = visible.few_shot(shots, seed)
    # The draw's own folder: another draw is another cache.
    name = f"train-{classes}-{'all' if shots is None else shots}-seed-{seed}"
    report(f"encoding {len(training)} training and {len(data.test)} test images once")
    options = {**(cache_options or {}), "progress": progress}
    features = cache_features(clip, training, Path(cache or out / "cache") / name, **options)
    test = cache_features(clip, data.test, Path(cache or out / "cache") / "test", **options)
    common = {"zero_shot": template, "seed": seed, "progress": progress}
    solutions = list(tuned)
    if not solutions:
        report(f"{method} on {len(features)} images of {len(features.classnames)} classes")
        words = [template] if isinstance(template, str) else list(template)
        done = tune(
            clip, features, method=method, template=words[0], resume=out / "tuned", **common, **(tune_options or {})
        )
        done.save(out / "tuned")
        solutions = [done.solution]
    report("MERGETUNE")
    result = fit(clip, features, solutions, resume=out, **common, **(fit_options or {}))
    result.save(out)

    tests = {part: test.select(half.test) for part, half in parts.items()}
    if result.solution.classnames is not None:  # it knows the classes that it learned, no others
        tests = {classes: tests[classes]}
    table = usual(*map(Together(clip).classifier, (template, solutions[0], result.solution)), name="fine-tuned")
    by_row = reports(counted(tested(table, tests)), {part: images.classnames for part, images in tests.items()})
    by_part = {part: {row: found[part] for row, found in by_row.items()} for part in by_row["zero-shot"]}
    start = zero_shot_like(clip, result.solution, template)
    walks = {
        f"{part} classes, test images": connectivity(clip, start, solutions[0], result.solution, images)
        for part, images in tests.items()
    }
    plot(walks, out / "paths.png")
    made = FolderResult(result, by_part, out / "paths.png")
    write_json(out / "report.json", made.to_json())
    return made
