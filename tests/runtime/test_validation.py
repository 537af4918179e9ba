"""Chips of a real deployment: the same results whatever happens on the way, and what the report says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from rerampile import ConfigError, DataError, Deployment, PlanFormatError, Target, compile_model
from rerampile.cli import main
from rerampile.runtime.data import Batch, DataSource, write_first_image
from rerampile.runtime.fault_map import ChipGeometry, write_fault_maps
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.pictures import most_hit_array
from rerampile.runtime.predict import Prediction, predict_beside
from rerampile.runtime.report import write_report
from rerampile.runtime.validation import Requirement, ValidationReport, validate


@pytest.fixture(scope="module")
def deployment(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return compile_model(small_model, out=tmp_path_factory.mktemp("validation") / "small.deployment")


@pytest.fixture
def experiment(deployment: Deployment) -> Experiment:
    rates = tuple(FaultModel.of_rate(rate) for rate in (0.0, 0.02, 0.2))
    return Experiment(folder=deployment.folder, faults=rates, images=24, batch=8, seed=3)


def plain(report: ValidationReport) -> dict[str, object]:
    return json.loads(msgspec.json.encode(report))


def test_no_faults_is_the_clean_model_and_more_faults_are_worse(experiment: Experiment, tmp_path: Path) -> None:
    report = validate(experiment, tmp_path / "j", runs=4)
    none, some, many = (rate.metrics["output_error"].mean for rate in report.rates)
    assert none == 0.0
    assert 0.0 < some < many
    assert next(rate.metrics["top1_agreement"].mean for rate in report.rates) == 100.0
    counts = report.rates[1].faults
    spread = np.sqrt(counts.cells * 0.02)
    assert (counts.observed_off + counts.observed_on) * counts.cells == pytest.approx(
        0.02 * counts.cells, abs=5 * spread
    )


def test_worker_count_and_interruption_change_nothing(experiment: Experiment, tmp_path: Path) -> None:
    whole = plain(validate(experiment, tmp_path / "whole", runs=3))
    assert plain(validate(experiment, tmp_path / "two", runs=3, jobs=2)) == whole
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:4]) + lines[4][:7])
    seen: list[int] = []
    resumed = validate(experiment, tmp_path / "cut", runs=3, progress=lambda done, *_: seen.append(done))
    assert plain(resumed) == whole
    assert seen == [3, 4, 5, 6, 7, 8, 9]


def test_journal_of_other_options_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    validate(experiment, tmp_path / "j", runs=1)
    with pytest.raises(DataError, match="journal of another run: seed was 3, now 4"):
        validate(replace(experiment, seed=4), tmp_path / "j", runs=1)


def test_journal_of_another_deployment_is_refused(
    experiment: Experiment, small_model: onnx.ModelProto, tmp_path: Path
) -> None:
    validate(experiment, tmp_path / "j", runs=1)
    cell = {"g_off": 1e-6, "g_on": 100e-6, "stuck_on": {"mean": 300e-6}}
    other = compile_model(
        small_model, out=tmp_path / "other", target=Target(name="other", rows=128, columns=128, cell=cell)
    )
    with pytest.raises(DataError, match="journal of another run: target was"):
        validate(replace(experiment, folder=other.folder), tmp_path / "j", runs=1)
    shifted = onnx.ModelProto()
    shifted.CopyFrom(small_model)
    bias = next(tensor for tensor in shifted.graph.initializer if tensor.name == "fc_bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(10, np.float32), "fc_bias"))
    other = compile_model(shifted, out=tmp_path / "shifted")
    with pytest.raises(DataError, match="journal of another run: model was"):
        validate(replace(experiment, folder=other.folder), tmp_path / "j", runs=1)
    with pytest.raises(DataError, match="journal of another run: batch was 8, now 4"):
        validate(replace(experiment, batch=4), tmp_path / "j", runs=1)
    with pytest.raises(DataError, match="journal of another run: data was"):
        validate(replace(experiment, data="generated:30"), tmp_path / "j", runs=1)


def test_a_changed_deployment_is_refused(experiment: Experiment, small_model: onnx.ModelProto, tmp_path: Path) -> None:
    folder = compile_model(small_model, out=tmp_path / "changed").folder
    cells = bytearray((folder / "conductances.safetensors").read_bytes())
    cells[-100] ^= 1
    (folder / "conductances.safetensors").write_bytes(cells)
    with pytest.raises(PlanFormatError, match="conductances"):
        validate(replace(experiment, folder=folder), tmp_path / "j", runs=1)


def test_drawn_maps_replay_what_was_drawn(experiment: Experiment, deployment: Deployment, tmp_path: Path) -> None:
    model, geometry = experiment.faults[1], ChipGeometry.of(deployment)
    chips = [draw_faults(geometry, model, deployment.target, seed=3, run=run) for run in range(3)]
    write_fault_maps(tmp_path / "chips.safetensors", chips, deployment)
    drawn = validate(experiment, tmp_path / "a", runs=3).rates[1]
    replayed = validate(replace(experiment, faults=(), fault_map=tmp_path / "chips.safetensors"), tmp_path / "b").rates[
        0
    ]
    assert replayed.metrics == drawn.metrics
    measured = replace(experiment, faults=(), fault_map=tmp_path / "chips.safetensors")
    with pytest.raises(ConfigError, match="--precision-points: a fault map holds as many chips as it does"):
        validate(measured, tmp_path / "c", precision_points=1.0)
    with pytest.raises(ConfigError, match="--require: holds for a failure rate, and chips of a fault map have none"):
        validate(measured, tmp_path / "c", requirements=[Requirement.parse("output_error <= 1 @ 0.1")])


def test_each_chip_sees_images_of_its_own(experiment: Experiment, tmp_path: Path) -> None:
    report = validate(replace(experiment, images_per_run=6), tmp_path / "j", runs=8)
    found = report.rates[2].metrics["output_error"]
    assert found.chip_deviation is not None
    assert found.image_deviation is not None
    assert found.image_deviation > 0
    bench = Bench(replace(experiment, images_per_run=6))
    assert len({tuple(bench.images_of(run)) for run in range(8)}) == 8
    with pytest.raises(ConfigError, match="--images-per-run 25: expected 1 to 24"):
        validate(replace(experiment, images_per_run=25), tmp_path / "k", runs=1)


def test_chips_until_the_mean_is_known(experiment: Experiment, tmp_path: Path) -> None:
    report = validate(experiment, tmp_path / "j", precision_points=3.0)
    for rate in report.rates:
        interval = rate.metrics["top1_agreement"].interval
        assert interval is not None
        assert (interval[1] - interval[0]) / 2 <= 3.0 + 1e-9
        drop = rate.metrics["top1_agreement"].drop_interval  # all chips see the same images, so it is as wide
        assert drop is not None
        assert drop[1] - drop[0] == pytest.approx(interval[1] - interval[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top1", "expected METRIC >= NUMBER @ RATE"),
        ("top1 >= ninety @ 0.1", "expected METRIC >= NUMBER @ RATE"),
        ("top1_agreement >= 1 @ 0.5", "failure rate 0.5 is not run, expected one of 0, 0.02, 0.2"),
        ("top1 >= 1 @ 0.02", "no metric 'top1', expected one of top1_agreement, output_error"),
    ],
)
def test_requirements_that_do_not_fit(experiment: Experiment, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(experiment, tmp_path / "j", runs=1, requirements=[Requirement.parse(text)])


def test_the_report_is_one_page_that_needs_nothing_else(experiment: Experiment, tmp_path: Path) -> None:
    report = validate(experiment, tmp_path / "j", runs=3)
    written = {
        path.name for path in write_report(tmp_path, report, command="a <b>", picture=most_hit_array(experiment))
    }
    assert written >= {"report.html", "report.json", "accuracy.svg", "accuracy.png", "array.png"}
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert "src=" not in page
    assert 'href="http' not in page
    assert page.count("<figure>") == 3
    assert "top1_agreement by class" in page
    assert f"{report.rates[2].metrics['output_error'].mean:.2f}" in page
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=ValidationReport) == report


def test_the_command_ends_with_three_where_a_requirement_fails(deployment: Deployment, tmp_path: Path) -> None:
    arguments = ["validate", str(deployment.folder), "--runs", "2", "--images", "8", "-o", str(tmp_path / "out"), "-q"]
    rate = ["--failure-rate", "0.2"]
    done = CliRunner().invoke(main, [*arguments, *rate, "--require", "output_error <= 1000 @ 0.2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["requirements"][0]["met"] is True
    failed = CliRunner().invoke(main, [*arguments, *rate, "--require", "output_error <= 0 @ 0.2"])
    assert failed.exit_code == 3
    assert "not met" in failed.stdout
    refused = CliRunner().invoke(
        main, ["validate", str(deployment.folder), "--failure-rate", "1.5", "-o", str(tmp_path)]
    )
    assert refused.exit_code == 1
    assert "--failure-rate 1.5: expected a fraction from 0 to 1" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--failure-rate", "0.5"], "--failure-rate: the chips of --fault-map are not drawn; leave one of the two out"),
        (["--runs", "3"], "--runs: the chips of --fault-map are not drawn"),
        (["--distribution", "line"], "--distribution: the chips of --fault-map are not drawn"),
    ],
)
def test_measured_chips_are_not_drawn(deployment: Deployment, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["validate", str(deployment.folder), "--fault-map", "m.csv", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_rate_is_there_once(deployment: Deployment) -> None:
    done = CliRunner().invoke(main, ["validate", str(deployment.folder), "--failure-rate", "0.01,0.02,0.010"])
    assert done.exit_code == 2
    assert "--failure-rate: a rate is there twice, expected different ones" in done.stderr


def test_reports_replace_nothing_of_others(deployment: Deployment, tmp_path: Path) -> None:
    def run(out: Path) -> str:
        done = CliRunner().invoke(main, ["validate", str(deployment.folder), "--runs", "1", "-o", str(out), "-q"])
        assert done.exit_code == 1
        return done.stderr

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    assert "holds a 'report.html' of something else, which would be lost; name another folder with -o" in run(
        tmp_path / "mine"
    )
    assert (tmp_path / "mine" / "report.html").read_text() == "mine"
    assert "a deployment, expected a folder for the report" in run(deployment.folder)
    assert "cannot be used as a folder: File exists" in run(tmp_path / "mine" / "report.html")


def test_drawing_and_showing_fault_maps(deployment: Deployment, tmp_path: Path) -> None:
    chips, picture = tmp_path / "chips.csv", tmp_path / "array.png"
    folder = str(deployment.folder)
    drawn = CliRunner().invoke(
        main, ["faults", "draw", folder, "--failure-rate", "0.1", "--runs", "2", "-o", str(chips)]
    )
    assert drawn.exit_code == 0, drawn.output
    shown = CliRunner().invoke(main, ["faults", "show", folder, str(chips), "--png", str(picture)])
    assert shown.stdout.count("cells stuck off") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_other_rates_use_the_chips_that_are_there(experiment: Experiment, tmp_path: Path) -> None:
    validate(experiment, tmp_path / "j", runs=2)
    more = replace(experiment, faults=(FaultModel.of_rate(0.01), *experiment.faults[:0:-1]))
    seen: list[int] = []
    report = validate(more, tmp_path / "j", runs=2, progress=lambda done, *_: seen.append(done))
    assert seen == [4, 5, 6]
    assert plain(report) == plain(validate(more, tmp_path / "fresh", runs=2))


def test_the_report_ranks_the_layers_by_prediction(deployment: Deployment, tmp_path: Path) -> None:
    options = ["--runs", "2", "--images", "8", "-q", "--json", "--failure-rate", "0.01,0.05"]
    reports = []
    for name in ("once", "again"):
        arguments = ["validate", str(deployment.folder), *options, "-o", str(tmp_path / name)]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        reports.append((tmp_path / name / "report.json").read_bytes())
    assert reports[0] == reports[1]
    report = msgspec.json.decode(reports[0], type=ValidationReport)
    assert isinstance(report.prediction, Prediction)
    assert report.prediction.images == 8
    (rate,) = report.prediction.rates
    assert rate.rate == pytest.approx(0.05)
    assert sum(layer.share for layer in rate.layers) == pytest.approx(1)
    page = (tmp_path / "once" / "report.html").read_text()
    assert page.count("<figure>") == 4
    assert "share of the predicted squared output error" in page
    assert "src=" not in page
    assert (tmp_path / "once" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_where_no_layer_is_ranked_the_report_says_why(
    experiment: Experiment, deployment: Deployment, tmp_path: Path
) -> None:
    lines = replace(experiment, faults=(FaultModel.of_rate(0.01, distribution="line"),))
    assert predict_beside(lines) == "the closed forms hold for independent faults, not for --distribution line"
    assert predict_beside(replace(experiment, faults=experiment.faults[:1])) == "no cell is stuck"
    maps = replace(experiment, faults=(), fault_map=tmp_path / "chips.csv")
    assert predict_beside(maps) == "chips are measured, not drawn"
    assert "unknown adapter" in str(predict_beside(replace(experiment, data="cifar11:x")))

    arguments = ["validate", str(deployment.folder), "--runs", "1", "--images", "4", "-q", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--distribution", "line"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>no chart of layers</dt><dd>the closed forms hold for independent faults" in page
    assert not (tmp_path / "out" / "layers.svg").exists()


def test_the_first_image_is_not_written_into_a_deployment(deployment: Deployment) -> None:
    with pytest.raises(DataError, match=r"--first-image m.onnx: expected a name that ends in .png"):
        write_first_image(None, Path("m.onnx"))  # type: ignore[arg-type]
    inside = deployment.folder / "first.png"
    with pytest.raises(ConfigError, match=r"first.png: lies in the deployment .*; name another place"):
        Bench(Experiment(folder=deployment.folder, first_image=inside, images=2))
    assert not inside.exists()


def test_rates_a_weight_are_told_as_what_they_mean_for_cells(experiment: Experiment, tmp_path: Path) -> None:
    faults = (FaultModel.of_rate(0.2, rate_unit="weight"),)
    found = validate(replace(experiment, faults=faults), tmp_path / "j", runs=10).rates[0]
    assert found.rate_unit == "weight"
    asked, observed = found.faults.stuck_on, found.faults.observed_on
    assert asked == pytest.approx(found.faults.stuck_off * 5.2)
    deviation = (asked / found.faults.cells) ** 0.5
    assert abs(observed - asked) < 5 * deviation
    assert asked < 0.1  # a pair has two cells


def test_images_that_cannot_be_read_are_told_and_do_not_count(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    from PIL import Image

    net = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] x) => (float[N, 2] y) {
        a = Flatten (x)
        y = Gemm <transB = 1> (a, w)
    }
    """
    weights = np.random.default_rng(0).standard_normal((2, 192)).astype(np.float32)
    folder = compile_model(parse_model(net, w=weights), out=tmp_path / "net.deployment").folder
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number,) * 3).save(tmp_path / "images" / label / f"{number}.png")
    (tmp_path / "images" / "b" / "1.png").write_bytes(b"no image")
    words = ["validate", folder, "--data", f"imagefolder:{tmp_path / 'images'}", "--preprocess", "raw", "--runs", 2]
    words += ["--failure-rate", "0.1", "--skip-bad", "-q", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["images"] == record["rates"][0]["images"] == 5
    ((name, reason),) = record["skipped"].items()
    assert name.endswith("1.png")
    assert "cannot identify" in reason
    assert "5; 1 left out, such as" in " ".join(done.stdout.split())
    assert "images left out" in (tmp_path / "out" / "report.html").read_text()


def test_more_chips_than_anybody_runs(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--runs 1000000000000: expected 1 to 1,000,000"):
        validate(experiment, tmp_path / "j", runs=10**12)
    faults = (FaultModel.of_rate(0.2),)
    for points in (1e-9, 1e-300):
        with pytest.raises(ConfigError, match=r"needs more than 1,000,000 chips, by how the first 20 differ; ask for"):
            validate(replace(experiment, faults=faults), tmp_path / "k", precision_points=points)


def test_an_entry_that_is_no_result(experiment: Experiment, tmp_path: Path) -> None:
    validate(experiment, tmp_path / "j", runs=1)
    text = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(text.replace('"clean"', '"cleam"'))
    with pytest.raises(DataError, match=r"an entry is no result of a chip: .*clean.*; remove the file to start anew"):
        validate(experiment, tmp_path / "j", runs=1)


@pytest.mark.parametrize(
    ("op", "sign", "reason"),
    [
        ("Log", -1, "not finite on these inputs without faults"),
        ("Sqrt", 1, "errors in its layers make outputs that are"),
    ],
)
def test_outputs_that_are_not_finite_are_counted_and_not_predicted(
    op: str, sign: int, reason: str, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    x, data = np.eye(16, dtype=np.float32), tmp_path / "data.npz"
    np.savez(data, x=x, labels=np.arange(16) % 3)
    np.savez(tmp_path / "x.npz", x=x)
    weights = np.outer([1] + [1e-3] * 15, [sign, 1, 1]).astype(np.float32)
    net = f"g (float[N,16] x) => (float[N,3] y) {{ m = MatMul (x, W) y = {op} (m) }}"
    model = parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {net}', W=weights)
    folder = compile_model(model, out=tmp_path / "net", inputs=tmp_path / "x.npz").folder
    words = [str(folder), "-q", "--data", f"npz:{data}", "--failure-rate", "0.4"]
    done = CliRunner().invoke(main, ["validate", *words, "--runs", "3", "-o", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert reason in report["prediction"]
    assert report["rates"][0]["non_finite"] > 0
    done = CliRunner().invoke(main, ["predict", *words])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert reason in done.output


def test_a_report_is_not_written_over_another_kind_or_into_a_deployment(deployment: Deployment, tmp_path: Path) -> None:
    short = ["--runs", "1", "--images", "4", "-q", "-o"]
    compared = ["compare", str(deployment.folder), str(deployment.folder), *short]
    place = tmp_path / "report"
    assert CliRunner().invoke(main, ["validate", str(deployment.folder), *short, str(place)]).exit_code == 0
    (tmp_path / "other.deployment").mkdir()
    for path in deployment.folder.iterdir():
        (tmp_path / "other.deployment" / path.name).write_bytes(path.read_bytes())
    compared[2] = str(tmp_path / "other.deployment")
    done = CliRunner().invoke(main, [*compared, str(place)])
    assert done.exit_code == 1
    assert "holds a 'report.html' of something else, which would be lost" in done.output
    assert CliRunner().invoke(main, [*compared, str(tmp_path / "compared")]).exit_code == 0
    done = CliRunner().invoke(main, ["validate", str(deployment.folder), *short, str(tmp_path / "compared")])
    assert "holds a 'report.html' of something else" in done.output
    done = CliRunner().invoke(main, ["validate", str(deployment.folder), *short, str(deployment.folder / "sub")])
    assert "sub: lies in the deployment '" in done.output
    assert not (deployment.folder / "sub").exists()


def test_chips_of_other_versions_are_not_mixed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate(experiment, tmp_path / "j", runs=1)
    monkeypatch.setattr("rerampile.runtime.monte_carlo.np.__version__", "0.1")
    with pytest.raises(DataError, match=r"journal of another run: versions was .*; remove it to start anew"):
        validate(experiment, tmp_path / "j", runs=1)


class _Radar:
    """A data set of a package of the user's."""

    name, kind, classes, digest = "radar", "labels", 10, "0" * 64

    def __init__(self, source: DataSource) -> None:
        self.skipped: dict[int, str] = {}
        (self._input,) = source.session.get_inputs()
        self._count = int(source.where)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, indices: np.ndarray | None = None) -> Iterator[Batch]:
        wanted = np.arange(self._count) if indices is None else indices
        shape = [length if isinstance(length, int) else 1 for length in self._input.shape[1:]]
        for chunk in np.split(wanted, range(size, len(wanted), size)):
            yield Batch({self._input.name: np.ones((len(chunk), *shape), np.float32)}, chunk % 10, chunk)


def test_adapters_of_other_packages(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("radar", f"{__name__}:_Radar", "rerampile.data")
    monkeypatch.setattr("rerampile.runtime.data.entry_points", lambda group: [point] if "rerampile" in group else [])
    report = validate(replace(experiment, data="radar:7"), tmp_path / "j", runs=2)
    assert report.images == 7
    assert set(report.clean) == {"top1", "top5"}
    with pytest.raises(DataError, match=r"'radar:many': the adapter .*:_Radar failed: ValueError: invalid literal"):
        validate(replace(experiment, data="radar:many"), tmp_path / "k", runs=2)
    point = EntryPoint("radar", "builtins:repr", "rerampile.data")
    with pytest.raises(DataError, match="the adapter builtins:repr gave a str, expected a data set"):
        validate(replace(experiment, data="radar:7"), tmp_path / "k", runs=2)
    with pytest.raises(ConfigError, match=r"unknown adapter 'rader' .did you mean radar"):
        validate(replace(experiment, data="rader:7"), tmp_path / "k", runs=2)
