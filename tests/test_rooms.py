"""The rooms of the library: imports point down the ladder; each file is short, has one purpose and a name of its own.

``pytest -s`` prints the rooms with the imports between them counted.
"""

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

import mergetune

HOUSE = Path(__file__).resolve().parents[1]
# From the bottom. A file imports from its own room and from lower floors; the face is mergetune/__init__.py.
FLOORS = (
    ("facts",),
    ("io", "kernels"),
    ("ops",),
    ("merging",),
    ("clip",),
    ("data",),
    ("solutions",),
    ("evaluation",),
    ("serving",),
    ("training",),
    ("experiments",),
    ("the face",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 430
LONGER = {
    "mergetune/merging/methods.py": "a table with one entry per method",
}


def source_files() -> list[Path]:
    found = [*(HOUSE / "mergetune").rglob("*.py"), *(HOUSE / "kernels").glob("*.py")]
    return sorted(path.relative_to(HOUSE) for path in found if "assets" not in path.parts)


def module_of(path: Path) -> str:
    parts = ["mergetune", *path.parts] if path.parts[0] == "kernels" else [*path.parts]
    parts[-1] = parts[-1].removesuffix(".py")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in source_files()}


def room_of(module: str) -> str:
    room = (module.split(".") + ["the face"])[1]
    room = "ops" if room == "_C" else room
    return "cli" if room == "__main__" else room


def imports(module: str, *, at_import_only: bool = False) -> list[tuple[int, str]]:
    """Line and module of each import of the library's own modules, also those in functions and for type checkers."""
    tree = ast.parse((HOUSE / MODULES[module]).read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not at_import_only else iter(tree.body)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "mergetune"]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{MODULES[module]}:{node.lineno} must name the module that it imports from"
            if (node.module or "").split(".")[0] == "mergetune":
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    found.append((node.lineno, full if full in MODULES or full == "mergetune._C" else node.module))
    return found


def test_every_file_stands_in_a_room():
    assert {room_of(module) for module in MODULES} == FLOOR.keys()
    assert len(FLOOR) <= 15


def test_imports_point_downward():
    wrong = [
        f"{MODULES[module]}:{line} imports {target}"
        for module in MODULES
        for line, target in imports(module)
        if (here := room_of(module)) != (there := room_of(target)) and FLOOR[there] >= FLOOR[here]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_through_others():
    """Within a room too. A name that only type checkers need may come from a file that stands higher."""
    needs = {module: {target for _, target in imports(module, at_import_only=True)} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in needs.get(module, ()):
                visit(target, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_module_has_the_name_of_a_public_function():
    """Importing ``mergetune.fit`` would put the module in the function's place."""
    public = {name for name in mergetune.__all__ if f"mergetune.{name}" not in MODULES or name != "merging"}
    assert not [str(path) for module, path in MODULES.items() if module.split(".")[-1] in public]


@pytest.mark.parametrize("room", [room for room in FLOOR if room not in ("kernels", "the face", "cli")])
def test_what_a_room_gives_is_there(room):
    """And where names are imported at their first use, no file of the room has the name of one of them."""
    package = importlib.import_module(f"mergetune.{room}")
    names = [name for name in dir(package) if not name.startswith("_")]
    assert names and all(hasattr(package, name) for name in names)
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018
    given = {name for name in names if not isinstance(getattr(package, name), type(ast))}
    assert "make_lazy" not in vars(package) or not [name for name in given if f"mergetune.{room}.{name}" in MODULES]


@pytest.mark.parametrize("path", [path for path in MODULES.values() if path.name == "__init__.py"], ids=str)
def test_type_checkers_see_the_names_that_a_room_gives(path):
    """They are listed twice: to be imported when they are first used, and for type checkers."""
    tree = ast.parse((HOUSE / path).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "make_lazy"]
    listed = {item for call in calls for names in call.args[1].values for item in names.value.split()}
    typed = {
        f"{name.asname}={name.name}" if name.asname else name.name
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in node.body
        for name in inner.names
    }
    packages = {ast.literal_eval(word.value) for call in calls for word in call.keywords if word.arg == "packages"}
    assert not calls or listed == typed - {name for names in packages for name in names}


def test_files_are_short():
    lines = {path: len((HOUSE / path).read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES and str(path) not in LONGER}


def test_each_file_says_its_purpose_in_its_first_line():
    first = {path: (HOUSE / path).read_text(encoding="utf-8").split("\n", 1)[0] for path in MODULES.values()}
    assert not [str(path) for path, line in first.items() if not line.startswith('"""') or len(line) < 20]


def test_the_rooms_are_counted():
    """With ``-s``: each room, its files and lines, and how many of its imports go to which other room."""
    arrows = Counter(
        (room_of(module), room_of(target))
        for module in MODULES
        for _, target in imports(module)
        if room_of(module) != room_of(target)
    )
    print()
    for floor in reversed(FLOORS):
        for room in floor:
            paths = [path for module, path in MODULES.items() if room_of(module) == room]
            lines = sum(len((HOUSE / path).read_text(encoding="utf-8").splitlines()) for path in paths)
            others = ", ".join(f"{b} {n}" for (a, b), n in sorted(arrows.items()) if a == room)
            print(f"{room:12} {len(paths):3} files {lines:6} lines -> {others or 'nothing'}")
    upward = sum(n for (a, b), n in arrows.items() if FLOOR[b] >= FLOOR[a])
    print(f"{len(FLOOR)} rooms, {len(arrows)} arrows ({sum(arrows.values())} imports), {upward} upward")
    assert arrows and not upward
