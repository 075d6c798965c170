"""The rooms of ebft_utils: which may import which."""

import ast
from pathlib import Path

import pytest

from helpers import ROOT

ROOMS = {
    "config": set(),
    "algorithm": set(),
    "model_files": {"config"},
    "text_decoders": {"config", "model_files"},
    "models": {"config", "algorithm", "model_files", "text_decoders"},
    "trial": {"algorithm"},
    "proof": {"algorithm", "model_files", "trial"},
    "layouts": {"config", "algorithm", "model_files", "models", "proof"},
    "data": {"config", "algorithm"},
    "run": {"config", "algorithm", "model_files", "text_decoders", "models", "proof", "layouts", "data"},
    "server": {"config", "algorithm", "model_files", "text_decoders", "models", "data", "run"},
}
FILES = sorted((ROOT / "ebft_utils").glob("**/*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of what a file imports, relative imports made whole; also from inside of functions."""
    package, found = file.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_arrow_points_down(file):
    """Guards against a circle, an algorithm that knows the configuration, and a package that imports a script."""
    parts = file.relative_to(ROOT / "ebft_utils").parts
    room = parts[0].removesuffix(".py")
    names = imported(file)
    assert not [name for name in names if name.startswith(("train_", "serve_", "tests", "examples"))]
    rooms = {name.split(".")[1] for name in names if name.startswith("ebft_utils.")}
    assert rooms <= ROOMS.get(room, set()) | {room}, f"{room} may import {ROOMS.get(room)}"


def test_every_room_is_known_and_says_what_it_is_for():
    folders = {path.parent for path in FILES} - {ROOT / "ebft_utils"}
    alone = {"models", "model_files", "text_decoders", "trial", "proof", "layouts"}
    assert {path.name for path in folders} | alone == set(ROOMS)
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert "import" in text
        listed = {line.split()[0] for line in text.splitlines() if "  " in line.strip()}
        assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= listed


def test_the_algorithm_needs_torch_and_little_else():
    """Its files can be copied on their own: no accelerate, no peft, no datasets; transformers only for the types of
    models.
    """
    for file in FILES:
        if "algorithm" in file.parts:
            foreign = {name.split(".")[0] for name in imported(file)} & {
                "accelerate",
                "peft",
                "datasets",
                "yaml",
                "requests",
            }
            assert not foreign, (file, foreign)
