"""Imports point one way: no module needs, directly or not, one that needs it."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imports(packages: list[str]) -> dict[str, set[str]]:
    """What each module of the packages imports of them, anywhere in its text."""
    names = {}
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            names[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                # `from package import module` needs the package's own text only for names that are no modules.
                found[name] |= (below & names.keys()) if below <= names.keys() else {node.module, *below}
        found[name] &= names.keys()
    return found


def test_no_module_imports_itself_by_way_of_others():
    needs = imports(["maskd_kernels", "bench"])
    assert needs["maskd_kernels.functional"] >= {"maskd_kernels.validation", "maskd_kernels.ops.maskd_loss"}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle
