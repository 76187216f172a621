"""The report as an HTML page: complete in itself, with every weight, and safe for any name."""

import dataclasses
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from diffq_fx import DiffQConfig, DiffQError, bits_report, convert, prepare
from diffq_fx.cli import app
from diffq_fx.export import export_onnx, save_packed
from diffq_fx.methods import LSQ, STE

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """The text of a page; refuses tags that are not closed, and whatever is loaded from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.widths = [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        values = dict(attrs)
        assert not {"src", "href"} & values.keys()
        if values.get("style", "").startswith("width:"):
            self.widths.append(float(values["style"].split("%")[0].removeprefix("width: ")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert "url(" not in data
        assert "@import" not in data
        self.text += data


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    return convert(prepare(net, torch.zeros(2, 64), {"0": LSQ(bits=3), "*": STE(bits=5)}))


def test_a_page_has_every_weight_size_reason_and_setting(converted, tmp_path):
    report = bits_report(converted)
    page = Reader(report.save_page(tmp_path / "report.html").read_text())
    for expected in (
        "0.weight",
        "2.weight",
        "3 bits: 88.9 %",
        "5 bits: 11.1 %",
        "0: LSQ(bits=3)",
        "STE(bits=5)",
        "1-d: a bias",
        "0.bias (32)",
    ):
        assert expected in page.text
    for size in (report.packed_size, report.container_size, report.float_size):
        assert f"{size.total_mib:.4g} MiB" in page.text
    assert all(0 <= width <= 100 for width in page.widths)


def test_names_are_text_and_never_markup(tmp_path):
    wrapped = nn.Sequential()
    wrapped.add_module("<b>&", nn.Linear(32, 16))
    prepared = prepare(wrapped, torch.zeros(1, 32), DiffQConfig(target_bits=4))
    assert "<b>&.weight" in Reader(bits_report(prepared).save_page(tmp_path / "page.html").read_text()).text


def test_a_page_that_cannot_be_written_leaves_the_old_one(converted, tmp_path):
    with pytest.raises(DiffQError, match="missing"):
        bits_report(converted).save_page(tmp_path / "missing" / "page.html")


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_command_reports_on_onnx_and_packed_files(converted, tmp_path):
    onnx, packed, out = tmp_path / "model.onnx", tmp_path / "model.safetensors", tmp_path / "page.html"
    export_onnx(converted, torch.zeros(2, 64), onnx)
    save_packed(converted, packed)
    assert invoke(onnx, "-o", out).exit_code == 0
    text = Reader(out.read_text()).text
    assert "layout onnxruntime" in text
    assert "0.weight" in text
    assert "3 bits: 88.9 %" in text
    assert "predicted" in text
    assert invoke(packed, "-o", out).exit_code == 0
    text = Reader(out.read_text()).text
    assert "packed format" in text
    assert "2.weight" in text
    assert "5 bits: 11.1 %" in text
    assert invoke(onnx, "-o", out, "--beside", onnx, "--repeats", "3").exit_code == 0
    text = Reader(out.read_text()).text
    assert "1.00 times smaller than model.onnx" in text
    assert "outputs differ from it by at most 0 %" in text


def test_command_never_writes_over_its_input(converted, tmp_path):
    packed = tmp_path / "model.safetensors"
    save_packed(converted, packed)
    before = packed.read_bytes()
    (tmp_path / "link.html").hardlink_to(packed)
    result = invoke(packed, "-o", tmp_path / "link.html")
    assert result.exit_code == 2
    assert "is the same file as" in result.output
    assert packed.read_bytes() == before
    result = invoke(packed, "-o", tmp_path / "page.html", "--beside", packed)
    assert result.exit_code == 2
    assert "does not run by itself" in result.output
    result = invoke(tmp_path / "no.onnx")
    assert result.exit_code == 2
    assert "no.onnx" in result.output


class Drawn(Reader):
    """The pictures of a page: places of circles and of the points of its lines, by the picture's title."""

    def __init__(self, html):
        self.circles, self.lines, self.title = {}, {}, ""
        super().__init__(html)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        values = dict(attrs)
        if tag == "svg":
            self.title = values["aria-label"]
        elif tag == "circle":
            self.circles.setdefault(self.title, []).append(tuple(float(values[name]) for name in ("cx", "cy", "r")))
        elif tag == "polyline":
            self.lines[self.title] = [tuple(map(float, point.split(","))) for point in values["points"].split()]


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(64, 64)

    def forward(self, x):
        return self.first(x) + 0.1 * self.second(x)[:, ::2]


@pytest.fixture(scope="module")
def trained():
    """Two weights of which the output needs the first more, after 100 steps; the second is the larger one."""
    torch.manual_seed(0)
    prepared = prepare(TwoBranches(), torch.zeros(2, 64), DiffQConfig(target_bits=4, training_steps=400))
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for _ in range(100):
        loss = prepared(torch.randn(16, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prepared.compression.log(loss=loss)
    return prepared


def test_a_page_draws_bits_against_sensitivity_and_the_curves_of_the_training(trained, tmp_path):
    for model in (trained, convert(trained)):
        report = bits_report(model)
        page = Drawn(report.save_page(tmp_path / "report.html").read_text())
        first, second = page.circles["Bits against sensitivity"]
        assert report.weights[0].sensitivity > report.weights[1].sensitivity
        assert report.weights[0].average_bits > report.weights[1].average_bits
        assert (first[0] > second[0], first[1] < second[1], first[2] < second[2]) == (True, True, True)  # y goes down
        assert len(page.lines["loss"]) == len(report.curves["loss"]) == 100
        assert len(page.lines["lambda, loss per MiB"]) == 40  # until the bits are final
        steps = [x for x, _ in page.lines["loss"]]
        assert steps == sorted(steps)
        losses, heights = [value for _, value in report.curves["loss"]], [y for _, y in page.lines["loss"]]
        assert losses.index(max(losses)) == heights.index(min(heights))


def test_bits_spread_when_the_sensitivity_is_known(trained):
    spread = dict(bits_report(trained).curves["bits a weight, standard deviation"])
    assert max(spread[step] for step in range(1, 20)) < 0.3 * min(spread[step] for step in range(21, 41))


def test_without_a_training_there_is_no_picture(converted, tmp_path):
    page = Drawn(bits_report(converted).save_page(tmp_path / "report.html").read_text())
    assert "Sensitivity" not in page.text
    assert not page.lines
    assert not page.circles


def test_curves_with_values_that_are_not_finite_or_all_the_same_are_drawn(trained, tmp_path):
    curves = {
        "same": [[0, 2.0], [5, 2.0]],
        "none": [[0, float("nan")], [1, float("inf")]],
        "some": [[0, 1.0], [1, float("nan")], [2, -3.0]],
    }
    report = dataclasses.replace(bits_report(trained), curves=curves)
    page = Drawn(report.save_page(tmp_path / "report.html").read_text())
    assert {name: len(points) for name, points in page.lines.items() if name in curves} == {"same": 2, "some": 2}


def test_measurements_are_a_table_of_literal_text(converted, tmp_path):
    rows = [{"file": "<float>", "ms": 9.71}, {"file": "ours", "ms": "4.4 [4.3, 4.6]"}]
    page = Reader(bits_report(converted).save_page(tmp_path / "report.html", measurements=rows).read_text())
    for expected in ("Measured", "file", "<float>", "9.71", "4.4 [4.3, 4.6]"):
        assert expected in page.text
    with pytest.raises(ValueError, match=r"headings \['file', 'ms'\], one has \['file'\]"):
        bits_report(converted).save_page(tmp_path / "other.html", measurements=[*rows, {"file": "third"}])
    assert not (tmp_path / "other.html").exists()
