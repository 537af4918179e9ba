"""The README tells the truth: its code blocks run, in order, as a reader would type them.

`bash` blocks and the `$` lines of `console` blocks run in bash, `python` blocks in one shared namespace, all in a
temporary folder that sees the checkout's `models/`. What a `console` block shows below its commands has to come out,
`...` standing for anything. An HTML comment before a block changes that, and has to say why:

    <!-- test: skip: sets up a whole environment -->
    <!-- test: any output: times differ -->
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BLOCK = re.compile(
    r"^(?:<!-- test: (?P<how>skip|any output): (?P<why>.+?) -->\n+)?"
    r"^```(?P<language>bash|console|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced code block: its language, its text, the line of the file it starts on and what its comment asks."""

    language: str
    code: str
    line: int
    how: str | None


def test_the_readme_runs(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _blocks((project_root / "README.md").read_text(encoding="utf-8"))
    assert any(block.how != "skip" for block in blocks), "the README has no block that runs"
    # Link by link: what a block writes into models/ stays in the temporary folder.
    (tmp_path / "models").mkdir()
    for path in (project_root / "models").iterdir():
        (tmp_path / "models" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("COLUMNS", "120")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.how != "skip":
            _run(block, namespace)


def test_every_marker_is_understood(project_root: Path) -> None:
    text = (project_root / "README.md").read_text(encoding="utf-8")
    used = sum(match["how"] is not None for match in BLOCK.finditer(text))
    assert text.count("<!-- test:") == used, "a marker is misspelt, gives no reason, or stands before no block"


def test_blocks_and_markers_are_found() -> None:
    text = "# x\n\n```python\na = 1\n```\n\n<!-- test: skip: slow -->\n\n```bash\nls\n```\n\n```toml\nb = 2\n```\n"
    assert _blocks(text) == [
        Block(language="python", code="a = 1\n", line=4, how=None),
        Block(language="bash", code="ls\n", line=10, how="skip"),
    ]


@pytest.mark.parametrize(
    ("language", "code"),
    [("bash", "false\ntrue\n"), ("console", "$ echo one\ntwo\n"), ("console", "$ false\n"), ("python", "1 / 0\n")],
)
def test_a_block_that_lies_fails(language: str, code: str) -> None:
    with pytest.raises((pytest.fail.Exception, ZeroDivisionError)):
        _run(Block(language=language, code=code, line=1, how=None), {})


def test_console_output_is_compared_command_by_command() -> None:
    code = "$ echo one \\\n    1\none 1\n$ echo two 2.31 s\ntwo ... s\n$ true\n"
    _run(Block(language="console", code=code, line=1, how=None), {})


def _blocks(text: str) -> list[Block]:
    return [
        Block(
            language=match["language"],
            code=match["code"],
            line=text.count("\n", 0, match.start("code")) + 1,
            how=match["how"],
        )
        for match in BLOCK.finditer(text)
    ]


def _run(block: Block, namespace: dict[str, object]) -> None:
    if block.language == "python":
        # Empty lines in front, so that a traceback names the line of the README.
        exec(compile("\n" * (block.line - 1) + block.code, "README.md", "exec"), namespace)
    elif block.language == "bash":
        _bash(block.code, block.line)
    else:
        for command, shown in _commands(block.code):
            printed = _bash(command, block.line)
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            if block.how != "any output" and not doctest.OutputChecker().check_output(shown, printed, options):
                pytest.fail(
                    f"README.md:{block.line}: $ {command}\n--- the README shows\n{shown}\n--- printed\n{printed}"
                )


def _commands(code: str) -> list[tuple[str, str]]:
    """Each `$` command of a console block, with its continued lines, and the output shown below it."""
    return [
        (match["command"], match["shown"])
        for match in re.finditer(
            r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<shown>(?:(?!\$ ).*\n)*)",
            code,
            re.MULTILINE,
        )
    ]


def _bash(script: str, line: int) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"README.md:{line}: exit {done.returncode}: {script}\n{done.stdout}")
    return done.stdout
