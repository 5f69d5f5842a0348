"""Class names and templates: checks, and insertion of a class name into a template."""

from __future__ import annotations

from collections.abc import Sequence

#: The default zero-shot template.
PLAIN = "a photo of a {}."


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple.

    Args:
        templates: one template or several, each with exactly one ``{}`` for the class name.

    Raises:
        ValueError: no template, or one without exactly one ``{}``.

    Example:
        >>> from mergetune.clip import check_templates
        >>> check_templates("a photo of a {}.")
        ('a photo of a {}.',)
    """
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("templates must hold at least one text, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold exactly one {{}} for the class name, got {template!r}")
    return templates


def words_before(template: str) -> str:
    """The words before the class name in a template; "" for templates such as "{} texture."."""
    return template.partition("{}")[0].strip()


def fill(template: str, name: str) -> str:
    """The template with ``{}`` replaced by the class name."""
    return template.replace("{}", name)


def check_classnames(classnames: Sequence[str]) -> tuple[str, ...]:
    """The class names as a tuple. Two classes may have the same name, as in CLIP's names for ImageNet.

    Raises:
        TypeError: a single text instead of a list.
        ValueError: no name, or an empty one.
    """
    if isinstance(classnames, str):
        raise TypeError(f"classnames must be a list of names, got the text {classnames!r}")
    names = tuple(classnames)
    if not names:
        raise ValueError("classnames must hold at least one name, got none")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classnames must be non-empty texts, got {name!r}")
    return names


def check_same_classes(argument: str, got: Sequence[str], expected: Sequence[str]) -> None:
    """Raise ValueError unless ``got`` are the classes of a solution, in the same order.

    Args:
        argument: name of the argument, for the message.
        got: the given class names.
        expected: the class names of the solution.
    """
    if len(got) != len(expected):
        raise ValueError(
            f"{argument} must be the {len(expected)} classes of the solution in the same order, got {len(got)} classes"
        )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            raise ValueError(
                f"{argument} must be the classes of the solution in the same order: class {i} must be {b!r}, got {a!r}"
            )
