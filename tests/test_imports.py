"""Imports point one way: no module needs, directly or not, one that needs it, nor one of a layer above its own."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(folder: Path, *packages: str) -> dict[str, set[str]]:
    """What each module of the packages in a folder, or of its scripts, imports of them, anywhere in its text."""
    paths = [path for package in packages for path in (folder / package).rglob("*.py")] or folder.glob("*.py")
    names = {}
    for path in paths:
        names[".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")] = path
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
    needs = imports(ROOT, "maskd_kernels", "bench")
    assert needs["maskd_kernels.functional"] >= {"maskd_kernels.validation", "maskd_kernels.ops.maskd_loss"}
    assert needs["bench.__main__"]
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


@pytest.mark.parametrize("folder", ["examples", "tests", "docs"])
def test_no_script_imports_itself_by_way_of_others(folder):
    needs = imports(ROOT / folder)
    assert folder == "docs" or any(needs.values())
    graphlib.TopologicalSorter(needs).prepare()


def test_no_module_imports_from_a_layer_above_its_own():
    """The layers are those that CONTRIBUTING names; what it does not name has none, nor has ``ops/layout.py``."""
    order = re.search(r"^`(cli → .*)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M)[1]
    layers = {name: height for height, names in enumerate(order.split("→")) for name in re.findall(r"\w+", names)}
    assert layers["cli"] < layers["commands"] < layers["integrations"] < layers["distill"] < layers["ops"]

    def layer(module):
        return layers.get(module.split(".")[1] if "." in module else "")

    for module, needed in imports(ROOT, "maskd_kernels").items():
        for other in needed - {"maskd_kernels.ops.layout"}:
            above = None not in (layer(module), layer(other)) and layer(other) < layer(module)
            assert not above, f"{module} imports {other}"
