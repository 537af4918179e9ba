from __future__ import annotations

import dataclasses
import functools
import operator
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile.errors import CapacityError, ConfigError
from rerampile.schemes import Coding
from rerampile.target import PAIR_LAYOUTS, Address, Cell, Stuck, Target, preset_names, preset_text, to_toml

DOCS = Path(__file__).parents[2] / "docs" / "targets.md"
COUNTS = ("arrays_per_core", "cores_per_tile", "tiles_per_chip", "chips")


def table(**changes: Any) -> dict[str, Any]:
    """Return a valid table of keys, changed: ``cell__levels=4`` sets ``cell.levels``, None removes a key."""
    result: dict[str, Any] = {"name": "t", "rows": 8, "columns": 4, "cell": {"g_off": 1e-6, "g_on": 1e-4}}
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            del place[key]
        else:
            place[key] = value
    return result


def make(**changes: Any) -> Target:
    return Target.from_dict(table(**changes), "t.toml")


# Presets


def test_presets_are_the_documented_ones() -> None:
    assert preset_names() == ("hermes", "isaac", "neurram", "paper", "puma")


@pytest.mark.parametrize("name", preset_names())
def test_preset_survives_every_round_trip(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert target.source
    assert Target.from_dict(target.to_dict()) == target
    assert tomllib.loads(to_toml(target)) == target.to_dict()
    assert Target.from_dict(tomllib.loads(to_toml(target))) == target
    assert preset_text(name).startswith("# ")


@pytest.mark.parametrize("name", preset_names())
def test_preset_codes_weights(name: str) -> None:
    target = Target.load(name)
    cell = target.cell
    coding = Coding(
        scheme=target.mapping,
        g_off=cell.g_off,
        g_on=cell.g_on,
        levels=cell.levels,
        level_table=cell.level_table,
        slices=target.slices,
    )
    assert coding.span > 0


@pytest.mark.parametrize(
    ("name", "arrays", "shape", "levels", "slices", "mapping"),
    [
        ("paper", None, (128, 128), None, 1, "differential"),
        ("isaac", 168 * 12 * 8, (128, 128), 4, 8, "offset"),
        ("puma", 138 * 8 * 16, (128, 128), 4, 8, "offset"),
        ("neurram", 48, (256, 256), None, 1, "two_column"),
        ("hermes", 128, (256, 256), None, 1, "two_column"),
    ],
)
def test_preset_has_the_published_size(
    name: str, arrays: int | None, shape: tuple[int, int], levels: int | None, slices: int, mapping: str
) -> None:
    target = Target.load(name)
    one_chip = target if name == "paper" else dataclasses.replace(target, chips=1)
    assert one_chip.arrays == arrays
    assert (target.rows, target.columns) == shape
    assert (target.cell.levels, target.slices, target.mapping) == (levels, slices, mapping)


def test_default_preset_is_the_papers_setting() -> None:
    target = Target.load("paper")
    assert target.cell == Cell(g_off=1e-6, g_on=100e-6)
    assert target.pair_layout == "adjacent"
    assert target.analog
    assert target.cell_steps is None
    assert (target.dac_bits, target.adc_bits) == (None, None)


# Reading and writing


def test_left_out_keys_are_resolved() -> None:
    assert make().to_dict() == {
        "name": "t",
        "source": "",
        "rows": 8,
        "columns": 4,
        "mapping": "differential",
        "slices": 1,
        "pair_layout": "adjacent",
        "arrays_per_core": "unlimited",
        "cores_per_tile": 1,
        "tiles_per_chip": 1,
        "chips": 1,
        "dac_bits": "ideal",
        "adc_bits": "ideal",
        "cell": {
            "g_off": 1e-6,
            "g_on": 1e-4,
            "levels": "analog",
            "level_table": "uniform",
            "stuck_off": {"mean": 1e-6, "spread": 0.0},
            "stuck_on": {"mean": 1e-4, "spread": 0.0},
        },
    }


def test_words_stand_for_none_everywhere() -> None:
    words = make(dac_bits="ideal", adc_bits="ideal", arrays_per_core="unlimited", cell__levels="analog")
    assert words == make()
    cell = words.cell
    assert {words.arrays, words.dac_bits, words.adc_bits, cell.levels, cell.level_table} == {None}


def test_order_of_the_dict_does_not_depend_on_the_order_of_the_file() -> None:
    shuffled = Target.from_dict(dict(reversed(table(slices=1).items())))
    assert list(shuffled.to_dict()) == list(make().to_dict())


def test_python_and_file_give_the_same_target() -> None:
    cell = Cell(g_off=0, g_on=1e-4, levels=3, level_table=(0, 2e-5, 1e-4), stuck_on=Stuck(mean=2e-4, spread=1e-5))
    built = Target(name="t", rows=8, columns=4, slices=2, cell=cell, arrays_per_core=2, chips=3)
    assert (built.cell_steps, built.analog, built.arrays) == (2, False, 6)
    assert Target.from_dict(tomllib.loads(to_toml(built))) == built
    assert built.to_dict()["cell"]["level_table"] == [0.0, 2e-5, 1e-4]


def test_whole_numbers_are_fine_where_conductances_are_expected() -> None:
    cell = make(cell__g_off=0, cell__g_on=1).cell
    assert isinstance(cell.g_off, float)
    assert cell.stuck_on == Stuck(mean=1.0)


def test_stuck_cells_may_lie_outside_the_range_and_keep_their_default_mean() -> None:
    cell = make(cell__stuck_off={"mean": 0.0}, cell__stuck_on={"spread": 2e-5}).cell
    assert cell.stuck_off == Stuck(mean=0.0, spread=0.0)
    assert cell.stuck_on == Stuck(mean=1e-4, spread=2e-5)
    assert make(cell__stuck_on={"mean": 1.2e-3}).cell.stuck_on.mean == 1.2e-3


def test_a_text_with_quotes_and_symbols_survives_toml() -> None:
    target = make(source='the "µS" of C:\\lab, 3 × 4')
    assert Target.from_dict(tomllib.loads(to_toml(target))) == target


def test_targets_are_immutable_values() -> None:
    target = make()
    assert hash(target) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.rows = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"^slices: expected 1 with analog cells"):
        dataclasses.replace(target, slices=2)


# Bad values: the whole message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name: missing key (required: name, rows, columns, cell)"),
        ({"cell__g_on": None}, "cell.g_on: missing key (required: g_off, g_on)"),
        ({"row": 3}, "row: unknown key (did you mean rows?)"),
        ({"cell__g_onn": 3}, "cell.g_onn: unknown key (did you mean g_on, g_off?)"),
        ({"cell__stuck_on": {"zzz": 3}}, "cell.stuck_on.zzz: unknown key (known: mean, spread)"),
        ({"name": ""}, "name: expected one line of 1 to 100 printable characters, got ''"),
        ({"name": 3}, "name: expected one line of 1 to 100 printable characters, got 3"),
        ({"source": "a\nb"}, "source: expected one line of 0 to 1000 printable characters, got 'a\\nb'"),
        ({"rows": 0}, "rows: expected an integer from 1 to 65536, got 0"),
        ({"rows": 8.0}, "rows: expected an integer from 1 to 65536, got 8.0"),
        ({"columns": True}, "columns: expected an integer from 1 to 65536, got True"),
        ({"columns": 65537}, "columns: expected an integer from 1 to 65536, got 65537"),
        ({"columns": "unlimited"}, "columns: expected an integer from 1 to 65536, got 'unlimited'"),
        (
            {"mapping": "diferential"},
            "mapping: expected one of two_column, differential, offset, balanced, optimal, auto, got 'diferential'",
        ),
        ({"pair_layout": ["twin"]}, "pair_layout: expected one of adjacent, twin, got ['twin']"),
        ({"chips": "many"}, "chips: expected an integer from 1 to 1048576 or \"unlimited\", got 'many'"),
        ({"dac_bits": 0}, 'dac_bits: expected an integer from 1 to 32 or "ideal", got 0'),
        ({"adc_bits": 33}, 'adc_bits: expected an integer from 1 to 32 or "ideal", got 33'),
        ({"slices": 25}, "slices: expected an integer from 1 to 24, got 25"),
        ({"slices": 2}, "slices: expected 1 with analog cells (set cell.levels for more), got 2"),
        (
            {"slices": 13, "cell__levels": 4},
            "slices: expected at most 12 with 4 levels (levels ** slices <= 16777216), got 13",
        ),
        (
            {"slices": 17, "cell__levels": 2, "cell__level_table": [1e-6, 1e-4]},
            "slices: expected at most 16 with 2 measured levels (levels ** slices <= 65536), got 17",
        ),
        ({"cell": 3}, "cell: expected a table of keys, got 3"),
        ({"cell__stuck_on": 1e-4}, "cell.stuck_on: expected a table of keys, got 0.0001"),
        ({"cell__levels": 1}, 'cell.levels: expected an integer from 2 to 65536 or "analog", got 1'),
        (
            {"cell__g_on": 100},
            "cell.g_on: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got 100",
        ),
        (
            {"cell__g_off": -1e-6},
            "cell.g_off: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got -1e-06",
        ),
        (
            {"cell__g_off": float("nan")},
            "cell.g_off: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got nan",
        ),
        (
            {"cell__stuck_off": {"mean": float("inf")}},
            "cell.stuck_off.mean: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got inf",
        ),
        (
            {"cell__stuck_on": {"spread": "wide"}},
            "cell.stuck_on.spread: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got 'wide'",
        ),
        ({"cell__g_on": 1e-6}, "cell.g_on: expected at least 0.1 % (and 1 fS) above g_off = 1e-06, got 1e-06"),
        (
            {"cell__g_on": 1.0001e-6},
            "cell.g_on: expected at least 0.1 % (and 1 fS) above g_off = 1e-06, got 1.0001e-06",
        ),
        (
            {"cell__g_off": 0, "cell__g_on": 1e-50},
            "cell.g_on: expected at least 0.1 % (and 1 fS) above g_off = 0.0, got 1e-50",
        ),
        (
            {"cell__level_table": [1e-6, 1e-4]},
            "cell.level_table: expected as many values as levels = analog, got 2",
        ),
        (
            {"cell__levels": 3, "cell__level_table": [1e-6, 1e-4]},
            "cell.level_table: expected as many values as levels = 3, got 2",
        ),
        (
            {"cell__levels": 2, "cell__level_table": "linear"},
            "cell.level_table: expected a list of conductances in siemens or \"uniform\", got 'linear'",
        ),
        (
            {"cell__levels": 2, "cell__level_table": [1e-6, "x"]},
            "cell.level_table[1]: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6), got 'x'",
        ),
        (
            {"cell__levels": 4, "cell__level_table": [1e-6, 5e-5, 5e-5, 1e-4]},
            "cell.level_table[2]: expected ascending values, above 5e-05, got 5e-05",
        ),
        (
            {"cell__levels": 2, "cell__level_table": [2e-6, 1e-4]},
            "cell.level_table[0]: expected g_off = 1e-06, got 2e-06",
        ),
        (
            {"cell__levels": 2, "cell__level_table": [1e-6, 9e-5]},
            "cell.level_table[1]: expected g_on = 0.0001, got 9e-05",
        ),
        (
            {"chips": 2},
            'chips: expected 1, never exceeded because arrays_per_core = "unlimited", got 2',
        ),
        (
            {"arrays_per_core": 2, "cores_per_tile": "unlimited", "chips": "unlimited"},
            "chips: expected 1, never exceeded because cores_per_tile = \"unlimited\", got 'unlimited'",
        ),
    ],
)
def test_bad_table_says_where_what_was_expected_and_what_was_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert str(caught.value) == f"t.toml: {message}"


def test_a_huge_value_is_not_printed_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        make(name="x" * 10**6, cell__levels=10**400)
    assert len(str(caught.value)) < 200


def test_something_other_than_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^plan\.json: target: expected a table of keys, got \[1\]$"):
        Target.from_dict([1], "plan.json: target")  # type: ignore[arg-type]


# Files


def test_load_reads_a_path_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(to_toml(make()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path.with_suffix("").write_bytes(path.read_bytes())
    for given_as in (path, str(path), "chip.toml", "./chip", Path("chip")):
        assert Target.load(given_as) == make()


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(to_toml(make()).replace("rows = 8", "rows = -8"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Target.load(path)
    assert str(caught.value) == f"{path}: rows: expected an integer from 1 to 65536, got -8"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"rows = 3\ncolumns 4\n",
            "not valid TOML: Expected '=' after a key in a key/value pair (at line 2, column 9)",
        ),
        (b"rows = " + b"9" * 5000, "not valid TOML: Exceeds the limit (4300 digits)"),
        (b"rows = " + b"[" * 100_000, "not valid TOML: "),
        (b"name = '\xff'", "expected UTF-8 text, got byte 0xff at 8"),
        (b"#" * 1_000_001, "expected a target file of at most 1000000 bytes, got 1000001 bytes"),
    ],
    ids=["syntax", "long number", "deep", "bytes", "large"],
)
def test_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "chip.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Target.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            Target.load(path)
        assert str(caught.value) == f"{path}: no such target file"


def test_unknown_preset_names_the_near_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        Target.load("issac")
    assert str(caught.value) == (
        "unknown target 'issac' (did you mean isaac?): name a preset or the path of a .toml file"
    )
    with pytest.raises(ConfigError, match=r"known: hermes, isaac, neurram, paper, puma"):
        Target.load("zzz")


# Addresses


@st.composite
def grouped(draw: st.DrawFn) -> Target:
    counts: list[int | None] = [draw(st.integers(1, 5)) for _ in COUNTS]
    unlimited = draw(st.none() | st.integers(0, 3))
    if unlimited is not None:
        counts[unlimited:] = [None] + [1] * (3 - unlimited)
    changes: dict[str, Any] = dict(zip(COUNTS, counts, strict=True))
    return dataclasses.replace(make(), **changes)


@given(grouped(), st.integers(0, 10**9))
def test_addresses_and_indices_are_inverse(target: Target, number: int) -> None:
    index = number if target.arrays is None else number % target.arrays
    assert target.index(target.address(index)) == index


@given(grouped())
def test_addresses_count_array_core_tile_chip_without_gap(target: Target) -> None:
    count = target.arrays or 200
    addresses = [target.address(index) for index in range(count)]
    assert addresses == sorted(set(addresses))
    for level, key in zip(Address._fields, reversed(COUNTS), strict=True):
        limit = getattr(target, key)
        seen = {getattr(address, level) for address in addresses}
        assert seen == set(range(len(seen)))
        assert limit is None or max(seen) < limit
        assert target.arrays is None or len(seen) == limit
    if target.arrays is not None:
        with pytest.raises(CapacityError, match=f"array {count} does not exist"):
            target.address(count)


def test_addresses_by_hand() -> None:
    target = make(arrays_per_core=2, cores_per_tile=3, tiles_per_chip=5, chips="unlimited")
    assert target.address(0) == (0, 0, 0, 0)
    assert target.address(3) == Address(chip=0, tile=0, core=1, array=1)
    assert target.address(2 * 3 * 5 * 7 + 2 * 3 * 4 + 5) == Address(chip=7, tile=4, core=2, array=1)
    assert target.index((7, 4, 2, 1)) == 2 * 3 * 5 * 7 + 2 * 3 * 4 + 5


def test_addresses_outside_the_target_are_refused() -> None:
    target = make(arrays_per_core=2, cores_per_tile=3, tiles_per_chip=1, chips=1)
    with pytest.raises(CapacityError) as caught:
        target.address(6)
    assert str(caught.value) == "target t: array 6 does not exist (arrays = 6, counted from 0)"
    with pytest.raises(CapacityError, match=r"array -1 does not exist"):
        make().address(-1)
    with pytest.raises(CapacityError) as caught:
        target.index((0, 0, 3, 0))
    assert str(caught.value) == "target t: core 3 does not exist (cores_per_tile = 3, counted from 0)"
    with pytest.raises(CapacityError, match=r"array -1 does not exist \(arrays_per_core = unlimited"):
        make().index((0, 0, 0, -1))


# The page that documents all this


def leaves(prefix: str, plain: dict[str, Any]) -> set[str]:
    keys: set[str] = set()
    for key, value in plain.items():
        keys |= leaves(f"{prefix}{key}.", value) if isinstance(value, dict) else {prefix + key}
    return keys


def test_docs_list_every_key_with_its_default_and_the_example_loads() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.+?) \| [^|]+ \|$", text, re.MULTILINE)
    documented = {key: default.strip("`") for key, default in rows if key not in preset_names()}
    plain = make(failed_cells={"response": "bounded"}).to_dict()
    assert documented.keys() == leaves("", plain)
    required = {key for key, default in documented.items() if default == "required"}
    assert required == {"name", "rows", "columns", "cell.g_off", "cell.g_on"}
    plain["failed_cells"]["response"] = "unbounded"
    for key in documented.keys() - required:
        if key.startswith("cell."):
            continue
        value = functools.reduce(operator.getitem, key.split("."), plain)
        assert documented[key].strip('"') == str(value), key

    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert [Target.from_dict(tomllib.loads(example)).name for example in examples] == ["my-chip"]
    for name in (*preset_names(), *PAIR_LAYOUTS):
        assert f"`{name}`" in text
