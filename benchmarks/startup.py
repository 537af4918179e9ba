"""How long `rerampile --help` takes, as a multiple of `python -c "import click"`.

Example:
    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    'python -c "import click"': ["-c", "import click"],
    "rerampile --help": ["-m", "rerampile", "--help"],
    "rerampile compile --help": ["-m", "rerampile", "compile", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each command, in turn (15)")
    options = parser.parse_args()
    rounds = [[seconds(arguments) for arguments in COMMANDS.values()] for _ in range(options.repeats + 1)][1:]
    print("| command | median | ratio |\n|---|---|---|")
    for name, times in zip(COMMANDS, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(mine / base for mine, (base, *_) in zip(times, rounds, strict=True))
        print(f"| `{name}` | {statistics.median(times) * 1000:.0f} ms | **{ratio:.1f} ×** |")


if __name__ == "__main__":
    main()
