"""``python -m rerampile`` is the command ``rerampile``."""

from __future__ import annotations

from rerampile.cli import main

if __name__ == "__main__":
    main()
