"""What is trained, a prompt or a head: saved, loaded, read from others' files, exported."""

from typing import TYPE_CHECKING

from mergetune.facts.lazy import make_lazy

if TYPE_CHECKING:
    from mergetune.solutions.base import Encoder, inputs
    from mergetune.solutions.checkpoints import HeadFile, PromptFile, read_head, read_prompt
    from mergetune.solutions.exports import push_to_hub, to_coop, to_head, to_hub, zero_shot_classifier
    from mergetune.solutions.head import Head
    from mergetune.solutions.kinds import (
        Solution,
        check_compatible,
        check_same_text,
        interpolate,
        load_solution,
        open_solution,
        zero_shot_like,
    )
    from mergetune.solutions.prompt import Prompt

__all__ = [
    "Encoder",
    "Head",
    "HeadFile",
    "Prompt",
    "PromptFile",
    "Solution",
    "check_compatible",
    "check_same_text",
    "inputs",
    "interpolate",
    "load_solution",
    "open_solution",
    "push_to_hub",
    "read_head",
    "read_prompt",
    "to_coop",
    "to_head",
    "to_hub",
    "zero_shot_classifier",
    "zero_shot_like",
]

make_lazy(
    __name__,
    {
        "mergetune.solutions.base": "Encoder inputs",
        "mergetune.solutions.checkpoints": "HeadFile PromptFile read_head read_prompt",
        "mergetune.solutions.exports": "push_to_hub to_coop to_head to_hub zero_shot_classifier",
        "mergetune.solutions.head": "Head",
        "mergetune.solutions.kinds": (
            "Solution check_compatible check_same_text interpolate load_solution open_solution zero_shot_like"
        ),
        "mergetune.solutions.prompt": "Prompt",
    },
)
