"""When progress bars are shown: in a terminal and in a notebook, never in a file or a pipe."""

from __future__ import annotations

import tqdm.auto


def hidden(progress: bool = True) -> bool | None:
    """Returns the value for the argument ``disable`` of a bar of ``tqdm.auto``.

    Args:
        progress: whether the caller wants progress.
    """
    if not progress:
        return True
    # Bars of a terminal go to stderr, and None hides them if stderr is no terminal. Bars of a notebook are widgets.
    return False if any("notebook" in base.__module__ for base in tqdm.auto.tqdm.__mro__) else None
