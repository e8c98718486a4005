"""What the project says of itself in several places must agree."""

import ast
import re
from pathlib import Path

import yaml

import ldm

ROOT = Path(__file__).parent.parent
SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))


def assigned(name: str):
    """A literal that setup.py gives to a name."""
    nodes = [node for node in SETUP.body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in nodes if getattr(node.targets[0], "id", "") == name)


def project(requirement: str) -> str:
    return re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-")


def test_conda_installs_what_setup_asks_for():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    listed = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert listed == [*assigned("REQUIRES"), "-e ."]


def test_every_dependency_is_bounded_below_and_pinned():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {project(line) for line in constraints if "==" in line}
    for requirement in [*assigned("REQUIRES"), *assigned("EXTRAS")["train"]]:
        assert ">=" in requirement, f"{requirement} has no lower bound"
        assert project(requirement) in pinned, f"{requirement} is not in constraints.txt"


def test_the_version_is_the_same_everywhere():
    call = next(node.value for node in SETUP.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    assert next(ast.literal_eval(word.value) for word in call.keywords if word.arg == "version") == ldm.__version__


def test_the_readme_installs_and_tests_as_the_ci_does():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    install = "pip install -c constraints.txt -e '.[test]'"
    assert install in readme
    assert install.replace("pip install", "pip install --quiet") in ci
    assert "&& pytest -n 2\n" in readme
    assert "pytest -q -n 2" in ci
