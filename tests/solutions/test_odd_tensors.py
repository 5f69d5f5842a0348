"""Any tensor or value of another kind in a file of others is ignored, or refused in one sentence with the file."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import NAMES, normal, tiny_model

from mergetune.solutions import open_solution, open_taskres, read_clip_lora, read_model

ODD: dict[str, Callable[[torch.Tensor], Any]] = {
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "whole numbers": lambda t: t.long(),
    "a number": lambda t: torch.tensor(1.0),
    "no numbers": lambda t: torch.zeros(0),
    "two numbers": lambda t: torch.zeros(2),
    "infinite": lambda t: t * 0 + torch.inf,
    "text": lambda t: "x" * 5000,
    "nothing": lambda t: None,
}
FACTORS = {"w_lora_A": normal(2, 16), "w_lora_B": normal(16, 2)}
ABOUT = {"r": 2, "alpha": 1, "encoder": "text", "params": ["q"], "position": "all"}
MODEL = tiny_model(text={"context_length": 8, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}).state_dict()
FILES: dict[str, tuple[Callable[..., object], dict]] = {
    "prompt": (
        lambda file: open_solution(file, classnames=NAMES),
        {"ctx": normal(3, 4, 16), "token_prefix": normal(3, 1, 16), "token_suffix": normal(3, 11, 16)},
    ),
    "head": (lambda file: open_solution(file, classnames=NAMES), {"weight": normal(3, 8), "bias": normal(3)}),
    "TaskRes": (
        lambda file: open_taskres(file, classnames=NAMES),
        {"base_text_features": normal(3, 8), "text_feature_residuals": normal(3, 8)},
    ),
    "CLIP-LoRA": (
        read_clip_lora,
        {"weights": {"layer_0": {"q_proj": FACTORS}, "layer_1": {"q_proj": FACTORS}}, "metadata": ABOUT},
    ),
    "opened CLIP-LoRA": (open_solution, {"weights": {"layer_0": {"q_proj": FACTORS}}, "metadata": ABOUT}),
    "whole model": (
        read_model,
        {name: MODEL[name] for name in ("token_embedding.weight", "visual.proj", "logit_scale", "text_projection")},
    ),
}


def places(content: Any, at: tuple = ()) -> Iterator[tuple]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def with_odd(content: dict, place: tuple, change: Callable[[dict, Any], None]) -> dict:
    """The content with one entry changed: ``change`` gets the dict around the entry and its key."""
    made = inside = copy.deepcopy(content)
    for key in place[:-1]:
        inside = inside[key]
    change(inside, place[-1])
    return made


def odd_contents(content: dict) -> Iterator[tuple[str, dict]]:
    for place in places(content):
        for kind, odd in ODD.items():

            def replace(inside: dict, key: Any, odd: Callable = odd) -> None:
                value = inside[key]
                inside[key] = odd(value if isinstance(value, torch.Tensor) else torch.ones(2, 2))

            yield f"{kind} at {place}", with_odd(content, place, replace)
        for key in (None, 0, ("a",), "x" * 3000):
            yield (
                f"the name {key} at {place}",
                with_odd(content, place, lambda d, k, key=key: d.update({key: d.pop(k)})),
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_odd_content_is_refused_in_one_sentence(tmp_path, name):
    read, content = FILES[name]
    file = tmp_path / "f.pt"
    torch.save(content, file)
    read(file)
    refused = 0
    for what, odd in odd_contents(content):
        torch.save(odd, file)
        try:
            read(file)
        except ValueError as error:
            said, refused = str(error), refused + 1
            assert str(file) in said and len(said) < 900 and said.isprintable(), what
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert refused > 10
