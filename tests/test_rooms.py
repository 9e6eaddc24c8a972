"""Rooms of the package: imports run one way, what a room never knows it does not import, and tests have the same rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import oialr_peft

PACKAGE = Path(oialr_peft.__file__).parent
TESTS = Path(__file__).resolve().parent
# each imports only from itself and from those before it
ROOMS = ["linalg", "parallel", "files", "tuner", "engine", "storage", "report", "trainer"]
# what a room never imports, at any depth of a function or under `TYPE_CHECKING`
UNKNOWN_TO = {
    "linalg": {"peft", "transformers", "accelerate", "huggingface_hub", "torch.distributed"},
    "parallel": {"peft", "huggingface_hub"},
    "files": {"transformers", "accelerate", "torch.distributed"},
    "engine": {"huggingface_hub", "transformers.trainer"},
}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever the import stands, by its full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def room_of(module: str) -> str | None:
    """The room of a module of the package; `None` for other packages, and for names of the package itself."""
    package, _, inside = module.partition(".")
    room = inside.partition(".")[0]
    return room if package == "oialr_peft" and room in ROOMS else None


def files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))


def test_every_module_is_in_a_room():
    assert {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"} == {"__init__.py", "__main__.py"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_to_rooms_before_ones_own(path):
    own = ROOMS.index(path.relative_to(PACKAGE).parts[0])
    rooms = {module: room_of(module) for module in imports(path)}
    assert {module for module, room in rooms.items() if room is not None and ROOMS.index(room) > own} == set()
    # a public name is imported from where it is, since the package's own `__init__` imports nearly all rooms
    assert {module for module in rooms if module == "oialr_peft"} == set()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_does_not_know_what_it_says_it_does_not(path):
    unknown = UNKNOWN_TO.get(path.relative_to(PACKAGE).parts[0], set())
    imported = imports(path)
    assert {name for name in unknown for module in imported if f"{module}.".startswith(f"{name}.")} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_is_inside_and_what_never_is(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    assert "Never here:" in text


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_tests_have_the_rooms_of_the_package():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "support", "data", "wheel"}
    assert [path for room in ROOMS for path in (TESTS / room).rglob("*.py") if not path.name.startswith("test_")] == []
    assert list((TESTS / "support").rglob("test_*.py")) == []


def test_names_of_files_with_tests_are_unique():
    names = [path.name for path in TESTS.rglob("test_*.py")]  # pytest imports them by name alone
    assert len(names) == len(set(names))


def test_test_modules_do_not_import_each_other():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    assert {
        (path.name, module) for path in TESTS.rglob("*.py") for module in imports(path) if module.split(".")[0] in tests
    } == set()
