"""The rules of the tree: who may import whom, and one import namespace."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("deployment", "kernels", "router", "workers")
VOCABULARY = {
    "block_hash",
    "config",
    "config_loading",
    "errors",
    "listening",
    "messages",
    "metrics",
    "request_timing",
    "tracing",
    "vllm_names",
}
MAY_IMPORT = {
    "kernels": {"errors"},
    "router": {"block_hash", "config", "errors", "messages"},
    "workers": {*VOCABULARY, "kernels"},
    "deployment": {*VOCABULARY, "router", "workers"},
}
SERVE_ADAPTER = ROOT / "router/serve_discovery.py"  # the one place of the router that knows Ray
FORBIDDEN_THIRD_PARTY = {"kernels": {"ray"}, "router": {"ray", "torch"}, "workers": {"ray"}}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            names.add(node.module or "")
            if node.module == "antiphon":
                names |= {f"antiphon.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_import_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in _imports(path):
            top, _, rest = name.partition(".")
            if top == "antiphon" and rest:
                inner = rest.split(".")[0]
                assert inner == package or inner in MAY_IMPORT[package] | {"__version__"}, (
                    f"{path}: {name}"
                )
            if path != SERVE_ADAPTER:
                assert top not in FORBIDDEN_THIRD_PARTY.get(package, ()), f"{path}: {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_linked_into_the_namespace(package):
    assert (ROOT / "src/antiphon" / package).resolve() == ROOT / package


def test_no_top_level_packages_are_installed():
    code = (
        "import importlib.util as u, sys; import antiphon;"
        f"found = {{n: u.find_spec(n) for n in {PACKAGES!r}}};"
        f"bad = [n for n, s in found.items() if s and {str(ROOT)!r} in str(s.origin)];"
        "sys.exit(f'leaked: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=True)
