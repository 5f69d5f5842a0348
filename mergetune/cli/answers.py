"""What `mergetune eval` writes about single answers, and how it fits temperatures: options, checks and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetune.cli.shared import new_table, open_cache, open_images, out, print_table, tell

ZERO_SHOT = "zero-shot"  # the row of zero-shot CLIP
PICTURES = 30  # on a contact sheet
SHOWN = 5  # mistakes in the terminal
FIGURES = (".png", ".pdf", ".svg")
_WRITTEN = {
    "--confusion": "Confusion matrix",
    "--per-class": "Scores per class",
    "--wrong": "Wrong answers",
    "--contact-sheet": "Contact sheet",
}

ConfusionFile = Annotated[
    Path | None,
    typer.Option(
        "--confusion",
        help="Write the confusion matrix to this file: a figure (.png, .pdf, .svg) or numbers of images (.csv).",
    ),
]
PerClassFile = Annotated[
    Path | None, typer.Option("--per-class", help="Write precision, recall and F1 of each class to this .csv file.")
]
WrongFile = Annotated[
    Path | None,
    typer.Option("--wrong", help="Write all wrongly answered images to this .csv file, the most confident first."),
]
SheetFile = Annotated[
    Path | None,
    typer.Option(
        "--contact-sheet",
        help=f"Draw the {PICTURES} most confident wrong answers as pictures: .png, .pdf or .svg. Needs --images.",
    ),
]
Pictures = Annotated[
    Path | None,
    typer.Option(
        "--images", help="The images that the cache was made of, as given to `mergetune cache`; for --contact-sheet."
    ),
]
FitTemperature = Annotated[
    bool,
    typer.Option(
        "--temperature",
        help="Fit one temperature per solution on the images of --val, show ECE and NLL on the test images before and "
        "after, and save the temperature with each solution. Accuracies do not change.",
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        "--val", help="Feature cache of validation images for --temperature; none of them may be a test image."
    ),
]


@dataclass(frozen=True)
class AnswerFiles:
    """The files that the user asked for; None where not asked.

    Attributes:
        confusion, per_class, wrong, contact_sheet: values of the options.
        images: the images that the cache was made of.
        max_pixels: largest width times height of a picture.
        background: colour under transparent pixels.
    """

    confusion: Path | None
    per_class: Path | None
    wrong: Path | None
    contact_sheet: Path | None
    images: Path | None
    max_pixels: int
    background: str

    @property
    def _asked(self) -> dict[str, tuple[Path, tuple[str, ...]]]:
        """Option -> its file and the suffixes that the file may have."""
        known = {
            "--confusion": (self.confusion, (*FIGURES, ".csv")),
            "--per-class": (self.per_class, (".csv",)),
            "--wrong": (self.wrong, (".csv",)),
            "--contact-sheet": (self.contact_sheet, FIGURES),
        }
        return {option: (file, suffixes) for option, (file, suffixes) in known.items() if file is not None}

    @property
    def scores(self) -> bool:
        """Whether precision, recall, F1 and mistakes are asked for."""
        return self.confusion is not None or self.per_class is not None

    def check(self, solutions: Sequence[str], *, base_novel: bool) -> None:
        """Checks what can be checked before anything is computed: suffixes, folders, and one file per solution."""
        for option, (file, suffixes) in self._asked.items():
            if base_novel:
                raise ValueError(
                    f"{option} needs one list of classes, and --base-novel tests on several: use --classes base, novel "
                    "or all instead"
                )
            if file.suffix.lower() not in suffixes:
                raise ValueError(f"{option} must end in {' or '.join(suffixes)}, got {file}")
            if not file.parent.is_dir():
                raise FileNotFoundError(f"the folder of {option} must exist, got {file}")
            made = {self._of(file, name, solutions): name for name in solutions}
            if len(made) < len(solutions):
                raise ValueError(
                    f"{option} writes one file per solution, named by the last part of --solution, and two of "
                    f"{', '.join(solutions)} have the same last part: give them in separate calls"
                )
        files = [file.resolve() for file, _ in self._asked.values()]
        if len(set(files)) < len(files):
            raise ValueError(f"{' and '.join(self._asked)} must write different files, got one file twice")
        if self.contact_sheet is not None and self.images is None:
            raise ValueError(
                "--contact-sheet needs --images, the images as given to `mergetune cache`: a cache holds file names, "
                "but not the folder of the files"
            )

    def write(self, found: Mapping[str, Any], confusions: Mapping[str, Any]) -> list[str]:
        """Writes the files.

        Args:
            found: name of each solution -> its predictions.
            confusions: name of each solution -> its confusion matrix; empty unless ``scores``.

        Returns:
            A line for the user about each file.
        """
        from mergetune import evaluation

        written = []
        for name, predictions in found.items():
            files = {option: self._of(file, name, list(found)) for option, (file, _) in self._asked.items()}
            title = f"{name}: {predictions.report.accuracy:.1f} % of {len(predictions):,} images are answered correctly"
            for option, file in files.items():
                if option == "--confusion" and file.suffix.lower() == ".csv":
                    confusions[name].save(file)
                elif option == "--confusion":
                    evaluation.plot_confusion(confusions[name], file, title=title)
                elif option == "--per-class":
                    confusions[name].save_scores(file)
                elif option == "--wrong":
                    evaluation.save_wrong_answers(predictions, file)
                elif worst := evaluation.most_confident(predictions, PICTURES):
                    assert self.images is not None
                    self._draw(worst, self.images, file, f"{name}: the most confident wrong answers")
                else:
                    written.append(f"{_WRITTEN[option]}: no file, because {name} answers every image correctly")
                    continue
                written.append(f"{_WRITTEN[option]}: {file}")
        return written

    def _draw(self, worst: Sequence[Any], images: Path, file: Path, title: str) -> None:
        from mergetune import evaluation

        root = images if images.is_dir() else open_images(images).full_train.root
        try:
            evaluation.plot_wrong_answers(
                worst, root, file, title=title, max_pixels=self.max_pixels, background=self.background
            )
        except ValueError as error:
            raise ValueError(
                f"--images must hold the pictures that the cache was made of, got {images}: {error}"
            ) from None

    @staticmethod
    def _of(file: Path, name: str, solutions: Sequence[str]) -> Path:
        """The file of one solution: the file itself if there is one solution, else with the solution's name in it."""
        return file if len(solutions) == 1 else file.with_name(f"{file.stem}-{Path(name).name}{file.suffix}")


def print_answers(found: Mapping[str, Any]) -> None:
    """Prints accuracies and calibration on the test images, one row per solution.

    Top-5 accuracy is left out for 5 classes or fewer, and temperatures if all of them are 1.
    """
    rows = []
    for name, predictions in found.items():
        report = predictions.report
        numbers = {"accuracy": report.accuracy, "mean of classes": report.mean_per_class, "top 5": predictions.top5}
        numbers["ECE"] = predictions.ece
        cells = {column: f"{value:.2f}" for column, value in numbers.items() if value is not None}
        if any(other.temperature != 1 for other in found.values()):
            cells["temperature"] = f"{predictions.temperature:.4g}"
        rows.append((name, cells | {"images": str(report.images)}, None))
    print_table("", rows)


def print_mistakes(name: str, confusion: Any) -> None:
    """Prints mean F1 and the most frequent mistakes of a solution."""
    tell(f"{name}: mean F1 {confusion.macro_f1:.2f}; most frequent mistakes:")
    table = new_table("true class", "images", "share")
    table.add_column("predicted class", overflow="fold")
    for mistake in confusion.mistakes[:SHOWN]:
        images, share = str(mistake.images), f"{mistake.share:.1f} %"
        table.add_row(mistake.true, images, share, mistake.predicted)
    out.print(table)


# -- temperatures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A temperature, with predictions on the test images before and after.

    Attributes:
        before: predictions with the temperature that the solution had.
        after: predictions with the fitted temperature.
        validation_images: number of images that the temperature was fitted on.
        saved: whether the temperature is saved: the name is the folder of a saved solution.
    """

    before: Any
    after: Any
    validation_images: int
    saved: bool

    def to_json(self) -> dict[str, Any]:
        """Temperatures, ECE and NLL on the test images, JSON-able."""
        sides = {"before": self.before, "after": self.after}
        found = {side: {"temperature": p.temperature, "ece": p.ece, "nll": p.nll} for side, p in sides.items()}
        return {**found, "validation_images": self.validation_images, "saved": self.saved}


def check_temperature(wanted: bool, val: Path | None, *, base_novel: bool) -> None:
    """Checks that --temperature, --val and --base-novel go together."""
    if wanted and base_novel:
        raise ValueError(
            "--temperature needs one list of classes, and --base-novel tests on several: use --classes instead"
        )
    if wanted and val is None:
        raise ValueError(
            "--temperature needs --val, a feature cache of validation images: a folder val that `mergetune cache` wrote"
        )
    if val is not None and not wanted:
        raise ValueError(f"--val is for --temperature, got --val {val} without it: add --temperature")


def open_validation(folder: Path, classes: str, test: Any, solutions: Mapping[str, Any]) -> Any:
    """Returns the cache of validation images; refuses images that were used for testing or training.

    Args:
        folder: value of --val.
        classes: value of --classes.
        test: the test images.
        solutions: the solutions by name, which know the images that they were trained on.
    """
    val = open_cache(folder, classes, split="val", option="--val")
    if val.classnames != test.classnames:
        raise ValueError(
            f"--val must have the {len(test.classnames):,} classes of --cache, in the same order, got other classes in "
            f"{folder}: take the caches of one dataset"
        )
    if val.fingerprint != test.fingerprint:
        raise ValueError(f"--val must come from the model that made --cache, got features of another model in {folder}")
    if shared := len(test.shared_with(val)):
        raise ValueError(
            f"--val must hold no test image, got {shared:,} of {len(val):,} images in {folder} that are in --cache as "
            "well: a temperature fitted on them would make the test look better than it is"
        )
    for name, solution in solutions.items():
        settings = solution.notes.get("settings")
        if isinstance(settings, dict) and settings.get("features") == val.digest:
            raise ValueError(
                f"--val must hold other images than {name} was trained on, got the same in {folder}: a solution is "
                "more certain on its training images than on new ones"
            )
    return val


def fit_temperatures(
    classifiers: Mapping[str, Any], before: Mapping[str, Any], val: Any, test: Any
) -> dict[str, Fitted]:
    """Returns one temperature per classifier.

    Args:
        classifiers: the classifiers by name.
        before: their predictions on the test images.
        val: validation images.
        test: test images.
    """
    import mergetune as mt

    fitted = {}
    for name, classify in classifiers.items():
        try:
            t = mt.fit_temperature(classify, val)
        except ValueError as error:
            raise ValueError(f"--val, for {name}: {error}") from None
        after = mt.predict_features(classify, test, temperature=t)
        fitted[name] = Fitted(before[name], after, len(val), (Path(name) / "solution.json").is_file())
    return fitted


def save_temperatures(solutions: Mapping[str, Any], fitted: Mapping[str, Fitted]) -> None:
    """Saves the temperatures with the solutions whose names are folders of saved solutions."""
    import mergetune as mt
    from mergetune.solutions import write_notes

    for name, solution in solutions.items():
        if fitted[name].saved:
            write_notes(name, mt.with_temperature(solution, fitted[name].after.temperature).notes)


def print_temperatures(found: Mapping[str, Fitted], val: Path | None) -> None:
    """Prints the temperatures with ECE and NLL before and after, and where they are saved."""
    table = new_table("", "temperature", "ECE before", "after", "NLL before", "after")
    for name, fit in found.items():
        numbers = (fit.before.ece, fit.after.ece), (fit.before.nll, fit.after.nll)
        cells = [f"{value:.{digits}f}" for pair, digits in zip(numbers, (2, 4), strict=True) for value in pair]
        table.add_row(name, f"{fit.after.temperature:.4g}", *cells)
    out.print(table)
    images = next(iter(found.values())).validation_images
    tell(f"Temperatures were fitted on the {images:,} images of {val}; ECE and NLL are those of the test images.")
    tell("A temperature changes probabilities only: accuracies, paths and merges stay as they are.")
    for name, fit in found.items():
        pairs = {"ECE": (fit.before.ece, fit.after.ece), "NLL": (fit.before.nll, fit.after.nll)}
        if worse := [measure for measure, (before, after) in pairs.items() if after > before]:
            reason = "the validation images are few, or unlike the test images"
            tell(f"{name}: {' and '.join(worse)} on the test images got worse: {reason}")
    for name, fit in found.items():
        if fit.saved:
            tell(f"Saved: {Path(name) / 'solution.json'}")
        elif name != ZERO_SHOT:
            tell(f"Not saved: {name} is not the folder of a saved solution")
