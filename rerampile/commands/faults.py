"""The command ``faults``: fault maps of chips. Only click is imported before a command runs."""

from __future__ import annotations

from pathlib import Path

import click

from rerampile.commands.chip_options import AskedFault, chip_fault_options, seed_option
from rerampile.commands.options import PATH, examples
from rerampile.interruption import cleaned_up

__all__ = ["fault_maps"]


@click.group("faults", epilog=examples("rerampile faults draw model.deployment --failure-rate 0.01 -o chips.csv"))
def fault_maps() -> None:
    """Write fault maps, and look at them."""


@fault_maps.command(epilog=examples("rerampile faults draw out --failure-rate 0.01 --runs 8 -o chips.safetensors"))
@click.argument("folder", type=PATH)
@chip_fault_options
@seed_option
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Chips.")
@click.option("-o", "--out", metavar="FILE", type=PATH, required=True, help="A .safetensors or .csv file.")
def draw(folder: Path, faults: AskedFault, seed: int, runs: int, out: Path) -> None:
    """Draw the stuck cells of chips of a deployment, as 'validate' would, and write them to a file."""
    from rerampile.checks import check_checksums
    from rerampile.deployment import load_deployment
    from rerampile.runtime.copy_places import refuse_weight_rates
    from rerampile.runtime.fault_map import ChipGeometry, write_fault_maps
    from rerampile.runtime.faults import draw_faults

    deployment = load_deployment(folder)
    check_checksums(deployment)
    deployment.require_outside(out)
    model = faults(deployment.target)
    refuse_weight_rates(deployment, [model])
    geometry = ChipGeometry.of(deployment)
    chips = [draw_faults(geometry, model, deployment.target, seed=seed, run=run) for run in range(runs)]
    with cleaned_up():
        write_fault_maps(out, chips, deployment, notes={"seed": str(seed), "model": str(model)})
    cells = sum(len(chip) for chip in chips)
    click.echo(f"{out}: {runs} chips, {cells:,} stuck of {runs * geometry.cells:,} cells", err=True)


@fault_maps.command("show", epilog=examples("rerampile faults show out chips.safetensors --array 0 --png faults.png"))
@click.argument("folder", type=PATH)
@click.argument("file", type=PATH)
@click.option("--chip", type=click.IntRange(0), default=0, show_default=True, help="Number of the chip.")
@click.option("--array", "array_id", type=click.IntRange(0), default=0, show_default=True, help="Id of the array.")
@click.option("--png", metavar="FILE", type=PATH, help="Draw the array's stuck cells.")
def show_faults(folder: Path, file: Path, chip: int, array_id: int, png: Path | None) -> None:
    """Count the stuck cells of a fault map, and picture those of one array."""
    from rerampile.checks import check_checksums
    from rerampile.deployment import load_deployment
    from rerampile.errors import ConfigError
    from rerampile.runtime.fault_map import read_fault_maps
    from rerampile.runtime.pictures import array_picture, render, stuck_picture

    deployment = load_deployment(folder)
    check_checksums(deployment)
    deployment.array_plan(array_id)
    if png is not None:
        deployment.require_outside(png)
    chips = read_fault_maps(file, deployment)
    if chip >= len(chips):
        raise ConfigError(f"{file}: no chip {chip}, expected 0 to {len(chips) - 1}")
    for number, found in enumerate(chips):
        click.echo(f"chip {number}: {found.counts_text}")
    if png is not None:
        picture = array_picture(deployment, chips[chip], array_id, f"array {array_id} of chip {chip}")
        png.write_bytes(render(stuck_picture(picture))[1])
        click.echo(str(png), err=True)
