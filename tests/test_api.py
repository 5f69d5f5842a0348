"""docs/api.py: what it says of a made-up module and made-up commands, and what it says of a change."""

import enum
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import pytest
import typer

SCRIPT = Path(__file__).parents[1] / "docs" / "api.py"


@pytest.fixture(scope="module")
def api():
    spec = importlib.util.spec_from_file_location("api_of_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Color(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Box:
    width: int
    names: "tuple[str, ...]" = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    _hidden: int = 0

    def area(self, scale: float = 1.0) -> float:
        return scale * self.width

    @classmethod
    def load(cls, path: "str | Path" = Path("a/b")) -> "Box":
        return cls(1)

    @property
    def half(self) -> float:
        return self.width / 2

    @cached_property
    def twice(self) -> int:
        return 2 * self.width

    def __len__(self) -> int:
        return self.width

    def _inner(self) -> None: ...


class Plain(Sequence):
    def __init__(self, count: int = 3) -> None: ...
    def __getitem__(self, i: int) -> int: ...
    def __len__(self) -> int: ...


def paint(box: Box, /, *more: Box, color: Color = Color.RED, by=len, **rest: object) -> "None": ...


def many(first_argument: int, second_argument: int, *, third_argument: Sequence[object] = ("one", 2.0)) -> None: ...


def module(**names):
    made = types.ModuleType("made.up")
    vars(made).update(names)
    made.__all__ = list(names)
    return made


def test_a_module_is_described_name_by_name(api):
    everything = module(
        paint=paint,
        Box=Box,
        Plain=Plain,
        many=many,
        WORDS={"b": 1, "a": 2},
        LIMIT=4,
        Rows=Mapping[str, int],
        again=paint,
    )
    everything.hidden = paint  # not in __all__
    assert (
        "\n".join(api.describe(everything))
        == """\
dataclass made.up.Box
    field width: int
    field names: tuple[str, ...] = ()
    field notes: Mapping[str, int] = <made anew>
    method __len__(self) -> int
    method area(self, scale: float = 1.0) -> float
    property half: float
    classmethod load(path: str | Path = Path('a/b')) -> Box
    property twice: int
value made.up.LIMIT: int = 4
class made.up.Plain(Sequence)
    __init__(self, count: int = 3) -> None
    method __getitem__(self, i: int) -> int
    method __len__(self) -> int
alias made.up.Rows = Mapping[str, int]
value made.up.WORDS: dict of b, a
function made.up.again(box: Box, /, *more: Box, color: Color = Color.RED, by = len, **rest: object) -> None
function made.up.many(
    first_argument: int
    second_argument: int
    *
    third_argument: Sequence[object] = ('one', 2.0)
) -> None
made.up.paint is made.up.again"""
    )


def test_a_module_without_all_has_no_public_names(api):
    assert not list(api.describe(types.ModuleType("made.up")))


def test_commands_are_described_option_by_option(api):
    app = typer.Typer()

    @app.command("eat")
    def _(
        what: Annotated[str, typer.Argument(help="What.")],
        out: Annotated[Path, typer.Option("--out", help="Where.")],
        more: Annotated[list[str] | None, typer.Argument()] = None,
        times: Annotated[int, typer.Option("-n", "--times", min=1, max=9)] = 2,
        seeds: Annotated[list[int], typer.Option("--seed")] = [1, 2],  # noqa: B006
        quiet: bool = False,
    ) -> None: ...

    @app.command()
    def fall_asleep(hours: float = 0.5) -> None: ...

    assert (
        "\n".join(api.describe_commands("day", app))
        == """\
command day eat
    WHAT: str, required
    --out: Path, required
    MORE: list[str] | None = None
    -n/--times: int >= 1 <= 9 = 2
    --seed: list[int] = [1, 2]
    --quiet/--no-quiet: bool = False
command day fall-asleep
    --hours: float = 0.5"""
    )


def test_a_change_is_told_in_a_few_lines_with_what_to_do(api, tmp_path):
    def changed(value: int = 2) -> None: ...

    def before(value: int = 1) -> None: ...

    file = tmp_path / "api.txt"
    file.write_text("\n".join(api.describe(module(f=before, g=paint))))
    assert api.check(file.read_text(), file) == []
    told = api.check("\n".join(api.describe(module(f=changed, g=paint))), file)
    assert told[:2] == [
        "-function made.up.f(value: int = 1) -> None",
        "+function made.up.f(value: int = 2) -> None",
    ]
    assert len(told) == 3 and "python docs/api.py --write" in told[2] and "CHANGELOG.md" in told[2]
    many = api.check("\n".join(map(str, range(1000))), file)
    assert len(many) == 22 and many[20].startswith("... and ") and "CHANGELOG.md" in many[21]
    assert api.check("anything", tmp_path / "missing.txt")


def test_check_exits_with_1_where_the_file_differs(api, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api, "FILE", tmp_path / "api.txt")
    monkeypatch.setattr(api, "text", lambda: "one\n")
    assert api.main(["--check"]) == 1
    assert "+one\n" in capsys.readouterr().err
    assert api.main(["--write"]) == 0 and api.main(["--check"]) == 0


def test_the_library_is_described_alike_on_every_machine(api):
    found = api.text()
    for line in (
        "dataclass mergetune.Prompt(Solution)\n",
        "function mergetune.fit(\n",
        "command mergetune merge\n",
        "--out: Path",
    ):
        assert line in found
    assert " at 0x" not in found and "PosixPath" not in found and str(Path.home()) not in found and found == api.text()
