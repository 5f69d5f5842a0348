"""Python in a clone after `pip install .` imports the sources: the installed core serves it, or it says why not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mergetune import _C

HOUSE = Path(__file__).resolve().parents[2]
RUN = """
import mergetune, torch
from mergetune import kernels, ops
print(mergetune.__file__, kernels.__file__, ops.build_info()["file"], ops.self_test()["lmc_loss"] < 1e-9, sep="\\n")
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A clone that was never built, and the folder of an installed mergetune with a core of the same sources."""
    folder = tmp_path_factory.mktemp("places")
    for part in ("mergetune", "kernels", "csrc"):
        shutil.copytree(
            HOUSE / part, folder / "clone" / part, ignore=shutil.ignore_patterns("*.so", "assets", "__pycache__")
        )
    shutil.copy(HOUSE / "CMakeLists.txt", folder / "clone")
    (folder / "site" / "mergetune").mkdir(parents=True)
    (folder / "site" / "mergetune" / "__init__.py").write_text(
        "raise ImportError('the installed package was imported')"
    )
    shutil.copy(_C.__file__, folder / "site" / "mergetune")
    return folder


def run_in(folder: Path, *installed: Path, code: str = RUN):
    """Runs Python in a folder; without the .pth files of this environment, which may install mergetune as editable."""
    others = [entry for entry in sys.path if entry and not (Path(entry) / "mergetune").is_dir()]
    paths = os.pathsep.join(map(str, [*installed, *others]))
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


def test_a_clone_uses_the_installed_core(places):
    done = run_in(places / "clone", places / "site")
    assert done.returncode == 0, done.stderr
    package, kernels, core, right = done.stdout.splitlines()
    assert Path(package).parent == places / "clone" / "mergetune" and right == "True"
    assert Path(kernels).parent == places / "clone" / "kernels"
    assert Path(core).parent == places / "site" / "mergetune"


def test_a_core_of_other_sources_is_refused(places, tmp_path):
    changed = tmp_path / "clone"
    shutil.copytree(places / "clone", changed)
    (changed / "csrc" / "checks.h").write_text("// another version\n")
    done = run_in(changed, places / "site")
    said = done.stderr.splitlines()[-1]
    assert f"source folder {changed}, whose C++ files differ from those of the installed core" in said
    assert str(places / "site") in said and f"Run `pip install .` again in {changed}" in said
    shutil.rmtree(changed / "csrc" / "tests")
    shutil.copy(places / "clone" / "csrc" / "checks.h", changed / "csrc" / "checks.h")
    assert run_in(changed, places / "site").returncode == 0  # the tests of the core are not part of it


def test_a_clone_without_any_core_says_what_to_do(places):
    done = run_in(places / "clone")
    assert re.search(
        rf"source folder {re.escape(str(places / 'clone'))}, which has no compiled core, and no mergetune is installed "
        r"for this Python \(.*\)\. Run `pip install \.` in ",
        done.stderr.splitlines()[-1],
    )
    assert run_in(places / "clone", code="import mergetune; print(mergetune.__version__)").returncode == 0


def test_an_installed_package_looks_nowhere_else(places, tmp_path):
    shutil.copytree(places / "clone" / "mergetune", tmp_path / "site" / "mergetune")  # no csrc beside it
    said = run_in(tmp_path, tmp_path / "site", places / "site").stderr.splitlines()[-1]
    assert "native core could not be loaded" in said and "pip install --force-reinstall mergetune" in said
