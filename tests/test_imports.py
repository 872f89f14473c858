"""Imports point down only, and what answers before torch is loaded does without it."""

import ast
import subprocess
import sys
from pathlib import Path

import knltrain

PACKAGE = Path(knltrain.__file__).parent

# From the top down; a module may import from lower layers and from its own package.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"sweep", "doctor", "predict", "report", "bench"},
    {"training"},
    {"weights"},
    {"models", "optim"},
    {"data", "comm"},
    {"ops"},
    {"checkpoint", "runlog"},
    {"launch"},
    {"node"},
    {"recipes"},
    {"config"},
    {"files"},
    {"errors", "__init__", "_kernels"},
]
WITHOUT_TORCH = [
    *(f"{package}.{path.stem}"
      for package in ("cli", "config", "recipes", "launch", "node")
      for path in sorted((PACKAGE / package).glob("*.py")) if path.stem != "__init__"),
    "sweep.plan",
    "weights.metadata",
]  # fmt: skip


def package(module):
    """knltrain.data.loader -> data; knltrain -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer(name):
    return next(index for index, packages in enumerate(LAYERS) if name in packages)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "knltrain":
                yield from (f"knltrain.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            there = package(module)
            if module.split(".")[0] == "knltrain" and there != here and layer(there) <= layer(here):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_torchvision_is_imported_only_where_a_user_asks_for_its_models():
    users = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "torchvision" in set(imports(p))}
    assert users == {"models/__init__.py"}


def first_to_load(modules, unwanted):
    """Which of the modules, imported one after the other in a new process, brings one that is not wanted."""
    code = """
import importlib, sys
modules, unwanted = (words.split(",") for words in sys.argv[1:])
for module in modules:
    importlib.import_module(f"knltrain.{module}")
    if found := [name for name in unwanted if name in sys.modules]:
        sys.exit(f"knltrain.{module} loads {found}")
"""
    arguments = [",".join(modules), ",".join(unwanted)]
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True).stderr


def test_answers_without_torch():
    assert first_to_load(WITHOUT_TORCH, ["torch", "numpy"]) == ""


def test_predict_and_report_need_no_torch():
    modules = [
        f"{verb}.{path.stem}" for verb in ("predict", "report") for path in sorted((PACKAGE / verb).glob("*.py"))
    ]
    assert first_to_load(modules, ["torch"]) == ""


def test_reading_metrics_loads_neither_matplotlib_nor_tensorboard():
    assert first_to_load(["runlog.metrics", "runlog.tables", "bench.tune"], ["matplotlib", "tensorboard"]) == ""
    assert first_to_load(["report", "sweep.runner", "training.trainer"], ["tensorboard"]) == ""
    assert "runlog.tensorboard loads ['tensorboard']" in first_to_load(["runlog.tensorboard"], ["tensorboard"])


def test_the_command_starts_without_what_only_prints_or_draws():
    assert first_to_load(["cli.main"], ["rich", "numpy", "PIL", "matplotlib", "jinja2", "tarfile"]) == ""
