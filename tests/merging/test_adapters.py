"""LoRA adapters: the numbers of PEFT's add_weighted_adapter, scales, full tensors, and what is refused."""

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergetune import merging as m
from mergetune.merging.methods import METHODS

peft = pytest.importorskip("peft", reason="peft is not installed")


class Net(nn.Module):
    """A network with every kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 9), nn.Linear(9, 5)
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(5, 3)


ALL = ["q", "k", "words", "conv"]
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "one scale": [{"lora_alpha": 8}, {"lora_alpha": 8}],
    "two scales": [{"lora_alpha": 8}, {"lora_alpha": 2}],
    "rslora": [{"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 3}],
    "alpha by layer": [{"lora_alpha": 8, "alpha_pattern": {"k": 32}}, {"lora_alpha": 4, "alpha_pattern": {"^q": 1}}],
    "other layers": [{"target_modules": ["q", "k"]}, {"target_modules": ["q", "words"]}],
}
RANKS: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"r": 2}, {"r": 3}],
    "ranks by layer": [{"rank_pattern": {"q": 4}}, {"lora_alpha": 5, "rank_pattern": {"q": 3, "k": 1}}],
}


def save(folder: Path, configs: list[dict[str, Any]]) -> list[Path]:
    """Adapters with random factors, saved by PEFT."""
    paths = []
    for number, config in enumerate(configs):
        settings = {"r": 2, "lora_alpha": 4, "target_modules": ALL, **config}
        torch.manual_seed(0)
        model = peft.get_peft_model(cast("Any", Net()), peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(number + 1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        paths.append(folder / f"adapter-{number}")
        model.save_pretrained(paths[-1])
    return paths


def loaded(paths: list[Path]) -> Any:
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(cast("Any", Net()), paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], 1):
        model.load_adapter(path, str(number))
    return model


def products(model: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to the weight of each layer."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in layers.items()
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    }


def of_peft(paths: list[Path], weights: list[float], kind: str, **options: Any) -> dict[str, Tensor]:
    model = loaded(paths)
    names = [str(number) for number in range(len(paths))]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    config = model.peft_config["merged"]
    if config.use_rslora:  # PEFT keeps this setting, with which alpha = r is another scale than 1
        for layer in model.modules():
            if hasattr(layer, "scaling") and "merged" in layer.scaling:
                layer.scaling["merged"] = 1.0
    return products(model, "merged")


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4)


SAME = [
    ("linear", m.task_arithmetic, {"scale": 1.0}, None, {}),
    ("ties", m.ties, {"density": 0.5}, None, {"density": 0.5}),
    ("ties", m.ties, {"density": 0.4, "sign": "count"}, None, {"density": 0.4, "majority_sign_method": "frequency"}),
    ("dare_linear", m.dare, {"density": 1.0}, None, {"density": 1.0}),
    ("dare_ties", m.dare, {"density": 1.0, "consensus": "sum"}, None, {"density": 1.0}),
    ("svd", m.task_arithmetic, {"scale": 1.0}, "svd", {}),
    ("cat", m.task_arithmetic, {"scale": 1.0}, "cat", {}),
    ("ties_svd", m.ties, {"density": 0.5, "trim": "tensor"}, "svd", {"density": 0.5}),
    ("dare_linear_svd", m.dare, {"density": 1.0}, "svd", {"density": 1.0}),
]


@pytest.mark.parametrize(("kind", "method", "options", "form", "more"), SAME)
@pytest.mark.parametrize("case", [*CONFIGS, *RANKS])
@pytest.mark.filterwarnings("ignore:The density:UserWarning", "ignore:.*rank_pattern.*")
def test_the_numbers_of_peft(kind, method, options, form, more, case: str, tmp_path: Path) -> None:
    paths, weights = save(tmp_path, (CONFIGS | RANKS)[case]), [0.7, -0.4]
    given = {"weights": weights, **options, "lora": form}
    if case in RANKS and form is None:
        with pytest.raises(
            ValueError, match="lora='factors' needs one rank for all adapters.*take lora='svd' or 'cat'"
        ):
            m.merge_files(method, None, paths, tmp_path / "merged", **given)
        return
    if case == "ranks by layer" and form == "svd":
        given["lora_rank"] = 4  # PEFT takes the largest rank of any layer, we that of each layer
    m.merge_files(method, None, paths, tmp_path / "merged", **given)
    close(products(loaded([tmp_path / "merged"]), "0"), of_peft(paths, weights, kind, **more))


@pytest.mark.parametrize("case", [*CONFIGS, *RANKS])
def test_an_average_of_an_adapter_with_itself_is_the_adapter(case: str, tmp_path: Path) -> None:
    path, _ = save(tmp_path, (CONFIGS | RANKS)[case])
    for form in ("svd", "cat"):
        m.merge_files(m.average, None, [path, path], tmp_path / form, lora=form)
        close(products(loaded([tmp_path / form]), "0"), products(loaded([path]), "0"))


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(getattr(m, name), "plan") and name != "lines"])
def test_every_method_merges_the_products(name: str, tmp_path: Path) -> None:
    """At full rank the result is the method on the products themselves, and scales are part of them."""
    paths = save(
        tmp_path, [{"lora_alpha": 8, "target_modules": ["q", "k"]}, {"lora_alpha": 2, "target_modules": ["q"]}]
    )
    if name == "slerp" or METHODS[name].most == 1:
        paths = (paths * 2)[: 2 if name == "slerp" else 1]
    deltas = [{n.removeprefix("base_model.model."): t for n, t in products(loaded([p]), "0").items()} for p in paths]
    full = [{n: d.get(n, torch.zeros_like(t)) for n, t in deltas[0].items()} for d in deltas]
    prefixed = [{f"base_model.model.{n}": t for n, t in d.items()} for d in full]
    positive = [{n: t.abs() for n, t in d.items()} for d in prefixed]
    options: dict[str, Any] = {
        "fisher_average": {"fishers": positive},
        "ota_ffg": {"second_moments": positive},
        "metrics_average": {"metrics": [0.5 + k for k in range(len(paths))]},
        "layerwise": {"coefficients": {n: [0.3] * len(paths) for n in prefixed[0]}},
    }.get(name, {})
    base = {n: torch.zeros_like(t) for n, t in prefixed[0].items()} if METHODS[name].base else None
    expected = getattr(m, name)(base, prefixed, **options)
    m.merge_files(getattr(m, name), None, paths, tmp_path / "merged", lora="svd", lora_rank=9, **options)
    got = products(loaded([tmp_path / "merged"]), "0")
    close(got, expected)


@pytest.mark.parametrize("bias", [{"modules_to_save": ["classifier"]}, {"bias": "lora_only"}, {"bias": "all"}])
def test_whole_tensors_are_no_differences(bias: dict[str, Any], tmp_path: Path) -> None:
    paths = save(tmp_path, [bias, bias])
    states = [load_file(path / "adapter_model.safetensors") for path in paths]
    whole = [name for name in states[0] if "lora_" not in name]
    assert whole
    with pytest.raises(ValueError, match="a whole tensor .modules_to_save or a bias.*ties cannot merge it"):
        m.merge_files(m.ties, None, paths, tmp_path / "merged")
    results = {
        "average": (m.average, {"weights": [1, 3]}, lambda a, b: (a + 3 * b) / 4),
        "base": (m.ties, {"missing": "base"}, lambda a, b: a),
        "equal": (m.ties, {}, lambda a, b: a),
    }
    for name, (method, options, rule) in results.items():
        given = [paths[0]] * 2 if name == "equal" else paths
        m.merge_files(method, None, given, tmp_path / name, **options)
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        for tensor in whole:
            torch.testing.assert_close(found[tensor], rule(states[0][tensor], states[1][tensor]))
        loaded([tmp_path / name])
    m.merge_files(m.ties, None, paths, tmp_path / "dropped", missing="drop")
    assert all("lora_" in name for name in load_file(tmp_path / "dropped" / "adapter_model.safetensors"))
    loaded([tmp_path / "dropped"])


def test_files_without_a_configuration_have_one_unknown_scale(tmp_path: Path) -> None:
    paths = save(tmp_path, CONFIGS["one scale"])
    for number, path in enumerate(paths):
        save_file(load_file(path / "adapter_model.safetensors"), tmp_path / f"{number}.safetensors")
    bare = [tmp_path / f"{number}.safetensors" for number in range(2)]
    m.merge_files(m.task_arithmetic, 0, bare, tmp_path / "out.safetensors", weights=[0.7, 0.3], scale=1.0)
    m.merge_files(m.task_arithmetic, None, paths, tmp_path / "merged", weights=[0.7, 0.3], scale=1.0)
    found, scaled = (
        load_file(tmp_path / "out.safetensors"),
        load_file(tmp_path / "merged" / "adapter_model.safetensors"),
    )
    for name, tensor in scaled.items():
        torch.testing.assert_close(found[name] * math.sqrt(4), tensor)  # alpha / r = 4, half of it in each factor
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="must have adapter_config.json beside it, as the others have"):
        m.merge_files(m.ties, None, [paths[0], bare[1]], tmp_path / "mixed")


def test_names_of_a_model_in_training_are_factors_too(tmp_path: Path) -> None:
    state = {"x.lora_A.default.weight": torch.ones(2, 5), "x.lora_B.default.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "a.safetensors")
    m.merge_files(m.average, None, [tmp_path / "a.safetensors"] * 2, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    product = found["x.lora_B.default.weight"] @ found["x.lora_A.default.weight"]
    torch.testing.assert_close(product, torch.full((4, 5), 2.0))


def test_lora_lego_takes_the_scales_of_the_configurations(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from mergetune.merging.catalogue import merge_files

    linear = {"target_modules": ["q", "k"]}
    paths = save(tmp_path, [{"lora_alpha": 8, **linear}, {"lora_alpha": 2, **linear}])
    merge_files("lora_lego", None, paths, tmp_path / "merged", {})
    expected = m.lora_lego(None, [load_file(p / "adapter_model.safetensors") for p in paths], scales=[4.0, 1.0])
    found = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    with pytest.raises(ValueError, match="lora must be None for lora_lego, which merges the factors"):
        merge_files("lora_lego", None, paths, tmp_path / "again", {}, lora="svd")


def edit(path: Path, **settings: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora must be off.*magnitudes"),
    "bias of B": ({"lora_bias": True}, "lora_bias must be off"),
    **{
        begins: ({"init_lora_weights": begins}, f"init_lora_weights must be true, .*, got '{begins}': save")
        for begins in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "another kind": ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
    "rank": ({"r": 5}, "must have the rank 5 of adapter_config.json, got 2"),
    "rank 0": ({"r": 0}, "r must be a positive number of at most 1e.30, got 0"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha must be a positive number of at most 1e.30, got '8'"),
    "alpha NaN": ({"lora_alpha": math.inf}, "lora_alpha must be a positive number"),
    "alpha of 401 digits": ({"lora_alpha": 10**400}, "lora_alpha must be a positive number of at most 1e"),
    "pattern of 401 digits": (
        {"alpha_pattern": {"q": 10**400}},
        "alpha_pattern must hold positive numbers",
    ),
    "rank of 401 digits": ({"r": 10**400}, "r must be a positive number of at most 1e"),
    "ranks of 401 digits": ({"rank_pattern": {"q": 10**400}}, "rank_pattern must hold positive numbers"),
    "pattern": ({"alpha_pattern": [1]}, "alpha_pattern must hold positive numbers"),
    "slow pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "must hold names of layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_cannot_be_followed_are_refused(name: str, tmp_path: Path) -> None:
    paths = save(tmp_path, CONFIGS["one scale"])
    settings, said = REFUSED[name]
    edit(paths[1], **settings)
    with pytest.raises(ValueError, match=said):
        m.merge_files(m.ties, None, paths, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_factors_that_are_not_pairs_or_not_pefts_are_refused(tmp_path: Path) -> None:
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"x.lora_A.weight": a}, "'x.lora_A.weight' has no 'x.lora_B.weight'"),
        ({"x.lora_A.weight": a, "y.lora_B.weight": b}, "has no"),
        ({"x.lora_A.weight": a, "x.lora_B.weight": torch.ones(4, 3)}, r"must have shapes \[r, n\] and \[m, r\]"),
        ({"x.lora_down.weight": a, "x.lora_up.weight": b}, "must have PEFT's names.*'x.lora_down.weight'"),
        ({"x.w_lora_A": a, "x.w_lora_B": b}, "must have PEFT's names"),
        ({"x.lora.down.weight": a, "x.lora.up.weight": b}, "must have PEFT's names"),
        ({"x.lora_A.weight": torch.ones(0, 5), "x.lora_B.weight": torch.ones(4, 0)}, r"must have shapes \[r, n\]"),
        ({"x.lora_A.weight": torch.ones(1, 20_000), "x.lora_B.weight": torch.ones(20_000, 1)}, "take lora='factors'"),
        (
            {"x.lora_A.weight": a, "x.lora_B.weight": b, "x.lora_magnitude_vector": torch.ones(4)},
            "lora_magnitude_vector",
        ),
    ]
    for state, said in wrong:
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=said):
            m.merge_files(m.average, None, [tmp_path / "a.safetensors"] * 2, tmp_path / "out.safetensors")


def test_places_forms_and_bases_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    paths = save(tmp_path, CONFIGS["one scale"])
    for given, said in (
        ({"method": m.ties, "lora": "cat"}, "lora='cat' .--lora. is for task_arithmetic, negate, average, got ties"),
        ({"method": m.average, "lora": "factors"}, "lora='factors' .* is for task_arithmetic, ties, dare, got average"),
        ({"method": m.ties, "lora": "qr"}, "lora must be one of factors, svd, cat, got 'qr'"),
        ({"method": m.ties, "lora_rank": 2}, "None without lora='svd', got 2 with 'factors'"),
        ({"method": m.average, "lora_rank": 0}, "lora_rank must be at least 1"),
    ):
        method = given.pop("method")
        with pytest.raises(ValueError, match=said):
            m.merge_files(method, None, paths, tmp_path / "merged", **given)
    with pytest.raises(ValueError, match="base_file must be None or 0 for LoRA adapters"):
        m.merge_files(m.ties, 1, paths, tmp_path / "merged")
    with pytest.raises(ValueError, match="must be a folder for adapters with adapter_config.json"):
        m.merge_files(m.ties, None, paths, tmp_path / "merged.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="lora and lora_rank must be None for files without LoRA factors"):
        m.merge_files(m.average, None, [tmp_path / "w.safetensors"], tmp_path / "out.safetensors", lora="svd")
    assert sorted(os.listdir(tmp_path)) == ["adapter-0", "adapter-1", "w.safetensors"]
