"""Options as data, and packages that import their public names at first use. Needs no torch."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.facts.function_options import (
        CacheOptions,
        CompareOptions,
        FitOptions,
        TuneOptions,
        options_of,
        recorded,
    )
    from mergetune.facts.lazy import make_lazy
    from mergetune.facts.option_kinds import Kind, Option, read_options

__all__ = [
    "CacheOptions",
    "CompareOptions",
    "FitOptions",
    "Kind",
    "Option",
    "TuneOptions",
    "make_lazy",
    "options_of",
    "read_options",
    "recorded",
]

make_lazy(
    __name__,
    {
        "mergetune.facts.function_options": ("CacheOptions CompareOptions FitOptions TuneOptions options_of recorded"),
        "mergetune.facts.lazy": "make_lazy",
        "mergetune.facts.option_kinds": "Kind Option read_options",
    },
)
