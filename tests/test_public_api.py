"""What `import rerampile` offers is exactly what it promises."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types

import pytest

import rerampile
import rerampile.errors

REMEDY = "add it to rerampile.__all__, or make it private with a leading underscore"


def test_names_are_unique() -> None:
    assert len(rerampile.__all__) == len(set(rerampile.__all__))


@pytest.mark.parametrize("name", rerampile.__all__)
def test_a_promised_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(rerampile, name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        # A class of its own text: inherited docstrings say nothing about it.
        assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__, f"{name} has no docstring"
    elif not name.startswith("__"):
        # A constant has no docstring of its own, so the package's has to speak of it.
        assert re.search(rf"\b{name}\b", rerampile.__doc__ or ""), f"the docstring of rerampile does not explain {name}"


def test_dir_shows_every_promised_name_before_it_is_used() -> None:
    probe = "import rerampile; print(*sorted(set(rerampile.__all__) - set(dir(rerampile))))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_nothing_public_is_left_out() -> None:
    public = {
        name
        for name, thing in vars(rerampile).items()
        if not name.startswith("_")
        and not isinstance(thing, types.ModuleType)
        and name not in {"annotations", "TYPE_CHECKING"}
    }
    assert public <= set(rerampile.__all__), REMEDY


def test_every_error_can_be_caught_by_its_public_name() -> None:
    errors = {
        name
        for name, thing in vars(rerampile.errors).items()
        if inspect.isclass(thing) and issubclass(thing, Exception) and not name.startswith("_")
    }
    assert errors <= set(rerampile.__all__), REMEDY


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rerampile.no_such_name  # type: ignore[attr-defined]
