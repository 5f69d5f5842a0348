"""Class names and templates: their checks, and how a name goes into a template."""

from __future__ import annotations

from collections.abc import Sequence

#: The zero-shot template where none is given.
PLAIN = "a photo of a {}."


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; each must hold exactly one ``{}``."""
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("templates must hold at least one text, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold exactly one {{}} for the class name, got {template!r}")
    return templates


def words_before(template: str) -> str:
    """The template's words before the class name; a dataset's own may have none: "{} texture."."""
    return template.partition("{}")[0].strip()


def fill(template: str, name: str) -> str:
    """The template with a class name in its place."""
    return template.replace("{}", name)


def check_classnames(classnames: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple: at least one, none empty. Two classes may have one name: CLIP's ImageNet has such pairs."""
    if isinstance(classnames, str):
        raise TypeError(f"classnames must be a list of names, got the text {classnames!r}")
    names = tuple(classnames)
    if not names:
        raise ValueError("classnames must hold at least one name, got none")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classnames must be texts, got {name!r}")
    return names


def check_same_classes(argument: str, got: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse class names that are not those of a solution, in its order."""
    if len(got) != len(expected):
        raise ValueError(
            f"{argument} must be the solution's {len(expected)} classes in its order, got {len(got)} classes"
        )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            raise ValueError(
                f"{argument} must be the solution's classes in its order: class {i} must be {b!r}, got {a!r}"
            )
