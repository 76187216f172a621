"""The frontier benchmark: it resumes, its budgets are exact, its report says what the points say; the real tasks where their data are."""

import json
import math
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from benchmarks.frontier import ours, running
from benchmarks.frontier.__main__ import main
from benchmarks.frontier.job import budget_mib
from benchmarks.frontier.points import KEY, read_points
from benchmarks.frontier.report import report_task
from benchmarks.frontier.tasks import TASKS, Task
from diffq_fx import convert, model_size, prepare
from diffq_fx.methods import STE
from recipes.common.recipe import Lacking

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DIFFQ_FX_DATA", ROOT.parent / "shared" / "data"))


class Tiny(Task):
    """Sums of random numbers: no file needed."""

    name, score_name, higher_is_better = "tiny", "mean squared error", False
    files, steps, rate = (), 4, 1e-2
    penalties: ClassVar = {2: 1.0, 3: 0.1, 4: 0.01}

    def load(self, folder):
        self.x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def make_float_model(self, folder, tell):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = self.x[torch.randint(64, (8,), generator=generator)]
            yield (x,), x[:, :4]

    def criterion(self, output, target):
        return (output - target).square().mean()

    def test_batches(self):
        for x in self.x.split(16):
            yield (x,), x[:, :4]

    def summarize(self, outputs, targets):
        return {"score": float((torch.cat(outputs) - torch.cat(targets)).square().mean())}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", Tiny)


def run(results, task="tiny", *more):
    main(["run", task, "--data", str(DATA), "--results", str(results), *more])


def lines(results, task="tiny"):
    return (results / f"frontier_{task}.jsonl").read_text().splitlines()


@pytest.mark.usefixtures("tiny")
class TestRunning:
    def test_a_second_run_measures_nothing_and_changes_nothing(self, tmp_path, monkeypatch):
        run(tmp_path, "tiny", "--systems", "float,ste,lsq", "--bits", "4,3", "--seeds", "0,1")
        before = lines(tmp_path)
        assert len(before) == 1 + 2 * 2 * 2
        monkeypatch.setattr(running, "_point", lambda *args: pytest.fail("measured again"))
        run(tmp_path, "tiny", "--systems", "float,ste,lsq", "--bits", "4,3", "--seeds", "0,1")
        assert lines(tmp_path) == before

    def test_a_run_that_was_stopped_measures_what_is_missing(self, tmp_path):
        run(tmp_path, "tiny", "--systems", "ste,lsq", "--bits", "4,3")
        whole = lines(tmp_path)
        (tmp_path / "frontier_tiny.jsonl").write_text("\n".join(whole[:2]) + "\n")
        run(tmp_path, "tiny", "--systems", "ste,lsq", "--bits", "4,3")
        again = lines(tmp_path)
        assert again[:2] == whole[:2]

        def without_seconds(texts):
            points = [json.loads(text) for text in texts]
            return [{name: value for name, value in point.items() if name not in ("seconds", "cpu_seconds")} for point in points]

        assert without_seconds(again) == without_seconds(whole)

    def test_other_steps_rates_and_penalties_are_other_points(self, tmp_path):
        run(tmp_path, "tiny", "--systems", "ste", "--bits", "3")
        run(tmp_path, "tiny", "--systems", "ste", "--bits", "3", "--steps", "2")
        run(tmp_path, "tiny", "--systems", "ste", "--bits", "3", "--rate", "0.5")
        run(tmp_path, "tiny", "--systems", "ours-paper", "--bits", "3", "--penalty", "7")
        points = read_points(tmp_path, "tiny")
        assert len({tuple(point[name] for name in KEY) for point in points}) == 4
        assert points[-1]["penalty"] == 7
        assert "penalty=7" in points[-1]["setting"]

    def test_every_system_of_ours_makes_a_point_with_its_size_setting_and_versions(self, tmp_path):
        systems = "float-trained,ours,ours-widths,ours-paper,ours-uniform,ours-noise,ste,lsq,quant-noise,lc"
        run(tmp_path, "tiny", "--systems", systems, "--bits", "3")
        points = {point["system"]: point for point in read_points(tmp_path, "tiny")}
        assert list(points) == systems.split(",")
        for point in points.values():
            assert point["mib"] > 0
            assert point["score"] > 0
            assert point["versions"]["torch"] == torch.__version__
            assert point["setting"]
        assert points["ste"]["mib"] == points["ste"]["budget_mib"]
        assert points["ours"]["mib"] <= points["ours"]["budget_mib"]

    def test_through_onnx_scores_the_file_as_the_model(self, tmp_path):
        run(tmp_path, "tiny", "--systems", "ste,ours-paper", "--bits", "4", "--onnx")
        ste, paper = read_points(tmp_path, "tiny")
        assert ste["onnx"]["exact_score"] == pytest.approx(ste["score"], rel=1e-5)
        assert ste["onnx"]["fast_score"] == pytest.approx(ste["score"], rel=0.1)
        assert "ONNX" in paper["onnx"]["refused"]

    def test_uniform_bits_are_the_same_for_all_groups_and_stay_so(self, tmp_path, monkeypatch):
        widths = []
        monkeypatch.setattr(ours, "convert", lambda model: (widths.append(model.compression.width_T()), convert(model))[1])
        run(tmp_path, "tiny", "--systems", "ours,ours-uniform", "--bits", "4", "--steps", "40")
        learned, uniform = widths
        assert len(set(learned.tolist())) > 2
        assert len(set(uniform.tolist())) <= 2
        assert float(uniform.max() - uniform.min()) <= 1

    def test_a_missing_package_and_a_system_that_cannot_are_one_line_each(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(running, "missing_package", lambda system: "diffq" if "diffq" in system.packages else None)
        monkeypatch.setattr(Tiny, "has_convolutions", True)
        run(tmp_path, "tiny", "--systems", "ste,diffq,ort-int4", "--bits", "3")
        said = capsys.readouterr().err
        assert "diffq: skipped, diffq is not installed here\n" in said
        assert "ort-int4: not applicable to tiny: onnxruntime's 4-bit quantizer takes MatMul and Gather alone" in said
        assert [point["system"] for point in read_points(tmp_path, "tiny")] == ["ste"]

    def test_a_system_that_does_not_exist_is_refused_with_the_names(self, tmp_path):
        with pytest.raises(SystemExit, match="no system our; there are float, float-trained, ours"):
            run(tmp_path, "tiny", "--systems", "our")

    def test_a_line_that_was_cut_off_is_named(self, tmp_path):
        (tmp_path / "frontier_tiny.jsonl").write_text('{"system": "ste", ')
        with pytest.raises(SystemExit, match="line 1 is no JSON"):
            run(tmp_path, "tiny", "--systems", "ste")


def test_the_budget_is_the_exact_size_of_ste_and_lies_between_for_a_fraction():
    task = Tiny(Path())
    sizes = {bits: model_size(prepare(task.float_model, task.example, STE(bits=bits)), exact=True) for bits in (2, 3)}
    assert budget_mib(task, 2) == sizes[2]
    assert budget_mib(task, 2.25) == pytest.approx(0.75 * sizes[2] + 0.25 * sizes[3])


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_file_is_one_clear_line(name, tmp_path):
    with pytest.raises(SystemExit, match=f"lacks .*{TASKS[name].files[0]}.*, which the task {name} reads: put them there.$"):
        TASKS[name](tmp_path)


def point(system, seed, score, mib, **more):
    key = {"system": system, "bits": 3.0, "seed": seed, "steps": 4, "rate": 0.1, "penalty": None, "bits_rate": 0.05}
    rest = {"budget_mib": 0.5, "setting": "as is", "seconds": 2.0, "threads": 1, "quick": False}
    return {**key, "mib": mib, "score": score, **rest, "versions": {"torch": "2.13.0", "diffq": "0.2.4"}, **more}


def test_a_picture_has_the_newer_points_of_each_system(tiny, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("benchmarks.frontier.report._draw", lambda groups, *_: drawn.extend(groups.values()))
    for folder, points in {"old": [point("ste", 0, 1.0, 0.5), point("ours", 0, 2.0, 0.5)], "new": [point("ours", 0, 3.0, 0.5)]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "frontier_tiny.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    folders = f"{tmp_path / 'old'},{tmp_path / 'new'}"
    main(["picture", "tiny", str(tmp_path / "out.png"), "--results", folders, "--systems", "ours,ste"])
    assert {found[0]["system"]: [each["score"] for each in found] for found in drawn} == {"ours": [3.0], "ste": [1.0]}


def test_the_report_shows_mean_spread_and_versions(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", Tiny)
    onnx = {"exact_score": 1.25, "fast_score": 1.5, "file_mib": 0.75}
    points = [point("ste", 0, 1.0, 0.5, packed_mib=0.25), point("ste", 1, 2.0, 0.25, onnx=onnx), point("diffq", 0, 4.0, 0.625)]
    (tmp_path / "frontier_tiny.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    path = report_task(tmp_path, Tiny)
    text = path.read_text()
    assert "| ste | 3 | 4 | 0.1 | 0.3750 ± 0.1768 | 0.2500 | 1.500 ± 0.707 | 2 | 2 | as is |" in text
    assert "| diffq | 3 | 4 | 0.1 | 0.6250 |  | 4.000 | 1 | 2 | as is |" in text
    assert "| ste | 3 | 1 | 2.0000 | 1.2500 | 1.5000 | 0.7500 |" in text
    assert "diffq 0.2.4, torch 2.13.0" in text
    assert "python -m benchmarks.frontier report" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_quick_run_of_each_task(name, tmp_path):
    try:
        run(tmp_path, name, "--quick", "--systems", "float,ste,ours", "--bits", "4", "--steps", "2")
    except Lacking as lacking:
        pytest.skip(str(lacking))
    points = read_points(tmp_path, name)
    assert [point["system"] for point in points] == ["float", "ste", "ours"]
    assert all(point["quick"] for point in points)
    assert points[1]["mib"] < points[0]["mib"] / 4
    assert points[2]["mib"] <= points[2]["budget_mib"] == points[1]["mib"]


def test_the_perplexity_of_a_whole_text_counts_each_window_once():
    task = TASKS["language-whole"].__new__(TASKS["language-whole"])
    losses, rows = [torch.tensor(loss) for loss in (1.0, 2.0, 3.0, 4.0, 8.0)], (4, 4, 4, 4, 1)
    found = task.summarize(losses, [torch.zeros(count, 3) for count in rows])
    assert found == pytest.approx({"score": math.exp(48 / 17), "first_4_windows": math.e, "first_16_windows": math.exp(2.5)})


def test_budgets_are_met_and_the_report_says_how_nearly(tiny, tmp_path, monkeypatch):
    from benchmarks.frontier import budgets

    monkeypatch.setattr(budgets, "SETTINGS", (("bits", 4, 1.0), ("bits", 4, 1e4)))
    arguments = ["budgets", "tiny", "--data", str(tmp_path), "--results", str(tmp_path), "--threads", "1"]
    main(arguments)
    points = [json.loads(line) for line in (tmp_path / "budgets_tiny.jsonl").read_text().splitlines()]
    assert len(points) == 2 * len(budgets.BITS)
    assert all(-0.05 < point["off"] <= 0 for point in points), "576 weights: one channel's bit is 1 to 3 % of the size"
    (report,) = tmp_path.glob("budgets_tiny*.md")
    rows = [line.split(" | ") for line in report.read_text().splitlines() if line.startswith("| bits | 4 ")]
    assert [row[-2] for row in rows] == ["yes", "yes"]
    main(arguments)  # nothing is missing any more
    assert len((tmp_path / "budgets_tiny.jsonl").read_text().splitlines()) == len(points)


@pytest.mark.usefixtures("tiny")
def test_wins_are_counted_over_the_points_that_both_have(tmp_path, capsys):
    shared = {"steps": 4, "rate": 0.01}
    scores = [("ours", 2.0, 0, 0.5), ("ste", 2.0, 0, 0.7), ("ours", 2.0, 1, 0.6), ("ste", 2.0, 1, 0.5), ("ours", 3.0, 0, 0.1)]
    points = [{"system": name, "bits": bits, "seed": seed, "score": score, **shared} for name, bits, seed, score in scores]
    (tmp_path / "frontier_tiny.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    main(["wins", "ours", "ste", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| tiny | 2 | 0.550 | 0.600 | 0.050 | +0.200, -0.100 | 1/2 |" in said  # less is better here
    assert "ours is ahead of ste in 1 of 2 points." in said
    assert "| 3 |" not in said
