"""Which way imports point (CONTRIBUTING.md, "Layers"), and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

# The longest matching prefix wins.
LAYERS = {
    "ldm": 0, "ldm.util": 0, "ldm.errors": 0,
    "ldm.config": 1, "ldm.prompt": 1, "ldm.checkpoint": 1, "ldm.lr_scheduler": 1,
    "ldm.image": 1, "ldm.sampling": 1, "ldm.data": 1, "ldm.download": 1,
    "ldm.modules": 2,
    "ldm.models": 3,
    "ldm.adapters": 4, "ldm.compiled": 4, "ldm.memory": 4, "ldm.safety": 4,
    "ldm.generation": 5, "ldm.training": 5, "ldm.evaluation": 5, "ldm.doctor": 5,
    "ldm.web": 6,
}  # fmt: skip
HEAVY = ("torch", "numpy", "transformers", "omegaconf", "PIL", "tqdm", "pytorch_lightning", "cv2")


def part(module: str) -> str:
    """The row of the table that a module belongs to."""
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next(prefix for prefix in prefixes if prefix in LAYERS)


def imports(path: Path) -> set[str]:
    """The modules of ldm that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if (ROOT / (name.replace(".", "/") + ".py")).exists() or name in LAYERS else node.module
                      for name in submodules}
    return {name for name in found if name.split(".")[0] == "ldm"}


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_its_own_layer_or_a_lower_one(path):
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for module in imports(path):
        other = part(module)
        assert LAYERS[other] <= LAYERS[own], f"{module} is above {own}"
        assert not (LAYERS[own] == 4 and other != own and LAYERS[other] == 4), f"{own} imports its sibling {other}"


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `code`."""
    probe = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split())


def test_importing_the_package_and_its_requests_loads_nothing_heavy():
    assert loaded_by("import ldm, ldm.errors, ldm.generation, ldm.generation.request, ldm.generation.options") == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_loads_nothing_heavy_and_shows_the_options(script):
    code = (f"import sys, runpy\nsys.argv = [{str(script)!r}, '--help']\n"
            f"try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end: assert end.code == 0")
    assert loaded_by(code) == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_a_thin_face(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


def test_drawing_loads_neither_lightning_nor_opencv():
    assert loaded_by("import ldm.generation.loading") & {"pytorch_lightning", "cv2"} == set()
