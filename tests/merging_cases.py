"""Small state dicts with odd shapes for every merging method."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetune.merging import sources

SHAPES = {
    "blocks.0.weight": (9, 7),
    "blocks.0.bias": (9,),
    "blocks.1.weight": (6, 11),
    "blocks.2.weight": (3, 4, 5),
    "token_embedding.weight": (13, 5),
    "scale": (),
}
EMPTY = "empty"


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor fits one stretch, so that every method meets the seams."""
    monkeypatch.setattr(sources, "STRETCH", 17)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    return state | {
        EMPTY: torch.empty(0, 3, dtype=dtype),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def models(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = draw(0, dtype)
    small = [draw(k + 1, dtype) for k in range(count)]
    moved = [{n: base[n] + 0.3 * e[n] if n in SHAPES else base[n] for n in base} for e in small]
    return base, moved


def positive(seed: int) -> dict[str, Tensor]:
    return {name: t.abs() + 0.01 if name in SHAPES else t for name, t in draw(seed).items()}


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: state[name].double().numpy() for name in SHAPES}


def close(got: dict[str, Tensor], expected: dict[str, np.ndarray], tolerance: float = 1e-10) -> None:
    assert list(got) == [*SHAPES, EMPTY, "steps", "mask"]
    for name in SHAPES:
        np.testing.assert_allclose(got[name].double().numpy(), expected[name], rtol=tolerance, atol=tolerance)


def each(rule: Callable[..., np.ndarray], base: dict[str, Tensor], experts: list) -> dict[str, np.ndarray]:
    """A rule for one tensor, (name, base, [K, ...] experts) -> merged, on all of them."""
    b, es = arrays(base), [arrays(e) for e in experts]
    return {name: rule(name, b[name], np.stack([e[name] for e in es])) for name in SHAPES}


def lora(seed: int, rank: int, centres: Tensor, noise: float = 0.0) -> dict[str, Tensor]:
    """Rank ``rank`` of units [A row, B column] near the first ``rank`` centres [r, 5 + 4]."""
    units = centres[:rank] + noise * torch.randn(rank, 9, generator=torch.Generator().manual_seed(seed))
    return {"x.lora_A.weight": units[:, :5].contiguous(), "x.lora_B.weight": units[:, 5:].T.contiguous()}
