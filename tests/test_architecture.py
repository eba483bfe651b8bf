"""Who may import whom, read from the source: a wrong direction fails here before it becomes a habit."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("protocol", "ps", "workers", "deploy")

# what each package may import of ours, beside itself
MAY = {"protocol": set(), "ps": {"protocol"}, "workers": {"protocol"}}
# deploy may import protocol; of its modules, these know the two sides
SIDES = {
    "deploy.launch": {"ps", "workers"},
    "deploy.settings": {"ps", "workers"},
    "deploy.importing": {"ps", "workers"},  # the bare packages, to see where they lie
    "deploy.checking": {"workers"},
    "deploy.run": {"workers"},
}
RAY = {"ps.actor", "workers.actor"}  # and anything in deploy
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "jsonpickle"}
# state machines and the protocol have no clock, no I/O and no randomness of their own
FORKS = {"protocol.kernels.threads": {"os"}}  # only to be told of a fork
PURE = (
    "protocol",
    *(f"ps.{name}" for name in ("aggregate", "answers", "barrier", "checks", "log", "membership", "optimizer")),
    *(f"ps.{name}" for name in ("plan", "server", "state", "steering", "vitals")),
    "workers.feedback",
)
IMPURE = {
    "time",
    "datetime",
    "random",
    "secrets",
    "uuid",
    "os",
    "pathlib",
    "io",
    "socket",
    "asyncio",
    "subprocess",
    "logging",
}


def modules():
    """Name -> path of every module of ours."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("name", MODULES)


def imports(source, name="", is_package=False):
    """Every module that a source imports, wherever in it, as ``a.b.c``; ``from a import b`` gives ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".")
            base = here[: len(here) - node.level + is_package] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imported(name):
    path = MODULES[name]
    return imports(path.read_text(), name, path.name == "__init__.py")


def tops(names):
    return {name.partition(".")[0] for name in names}


def test_the_walk_sees_every_form_of_import():
    source = """
import a.b as c, d
from e import f
from . import g
from ..h import i
def late():
    if True:
        import j
"""
    assert imports(source, "x.y.z") == {"a.b", "d", "e", "e.f", "x.y", "x.y.g", "x.h", "x.h.i", "j"}
    assert imports("from . import g", "x.y", is_package=True) == {"x.y", "x.y.g"}


def test_the_walk_finds_the_modules():
    assert {"protocol", "protocol.kernels.cpu", "ps.server", "workers.feedback.ef", "deploy.launch"} <= set(MODULES)


@every_module
def test_imports_go_in_the_right_direction(name):
    package = name.partition(".")[0]
    used = tops(imported(name)) & set(OURS) - {package}
    if package == "deploy":
        assert used <= {"protocol"} | SIDES.get(name, set())
    else:
        assert used <= MAY[package]
    assert not tops(imported(name)) & {"tests", "examples", "benchmarks"}


def test_only_the_launcher_and_the_settings_know_both_sides():
    """So nothing else can depend on server and workers being in one process."""
    both = {name for name in MODULES if {"ps", "workers"} <= tops(imported(name))}
    assert both == {"deploy.launch", "deploy.settings", "deploy.importing"}
    inside = {m for m in imported("deploy.importing") if m.startswith(("ps.", "workers."))}
    assert not inside, "it only asks where the packages lie"


@every_module
def test_ray_stays_in_the_actors_and_in_deploy(name):
    if "ray" in tops(imported(name)):
        assert name in RAY or name.startswith("deploy.")


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("deploy")])
def test_nothing_that_arrives_can_be_unpickled(name):
    assert not tops(imported(name)) & UNSAFE
    assert "torch.load" not in MODULES[name].read_text()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(PURE)])
def test_state_machines_have_no_clock_no_files_and_no_randomness(name):
    assert not tops(imported(name)) & IMPURE - FORKS.get(name, set())


@pytest.mark.parametrize("package", ["protocol", "workers", "deploy"])
def test_public_names_are_few_and_exist(package):
    module = importlib.import_module(package)
    assert 0 < len(module.__all__) <= 12
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert list(module.__all__) == sorted(module.__all__)


def test_neither_side_needs_ray():
    """As the imports happen, not as they are written."""
    code = "import sys, ps.server, ps.inline, ps.metrics, workers.runner; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
