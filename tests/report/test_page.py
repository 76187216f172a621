"""The report as an HTML page: complete in itself, with every weight, and safe for any name."""

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
