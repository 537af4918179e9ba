"""The program ``rerampile``, also as ``python -m rerampile``."""

from __future__ import annotations

from rerampile.interruption import handle_signals

__all__ = ["main"]


def main() -> None:
    """Run the command line, ready for signals before anything large is imported."""
    handle_signals()
    from rerampile.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
