"""What a report looks like: plain text, rich tables, pictures."""

import io
import struct
import zlib
from dataclasses import replace

import matplotlib
import pytest
import torch
from rich.console import Console
from torch import nn

from diffq_fx import BitsReport, DiffQConfig, DiffQError, bits_report, prepare_diffq
from diffq_fx.report import WeightBits
from diffq_fx.report.picture import MOST_ROWS, picture_rows
from diffq_fx.weights import SkippedWeight


def weight(name, histogram=None, numel=64):
    histogram = histogram or {3: numel // 2, 4: numel - numel // 2}
    return WeightBits(
        name=name,
        shape=(8, numel // 8),
        consumer="linear",
        grid="affine",
        histogram=histogram,
        scale_bits=300,
        coding_bits=8,
        container_bits=4,
        container_scale_bits=288,
        float_bits=32 * numel,
    )


def report_of(*weights, skipped=()):
    return BitsReport(
        model="Net",
        stage="prepared",
        method="DiffQConfig",
        scope="model",
        scope_reason="",
        weights=weights,
        skipped=skipped,
        rest_bits=64,
        rest_float_bits=64,
        target_bits=4,
    )


def blocks(count):
    return [weight(f"encoder.layers.{i // 4}.{part}.weight") for i, part in zip(range(count), "qkvo" * count, strict=False)]


def in_rich(report, width=200):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report)
    return console.file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def check_png(path):
    """Every chunk of a PNG has the right checksum, and the picture its declared size."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds, pixels = 8, [], b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        place += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", data[16:24])
    assert len(zlib.decompress(pixels)) == height * (4 * width + 1)
    return width, height


class TestText:
    def test_every_weight_and_every_size(self):
        shown = str(report_of(*blocks(300), skipped=[SkippedWeight("norm.bias", (8,), "1-d")]))
        for each in blocks(300):
            assert each.name in shown
        for part in ("bit-packed (exact)", "ONNX (estimate)", "float", "norm.bias (8)", "1-d", "target: 4 bits", "scope: model"):
            assert part in shown
        assert shown.isascii()

    def test_numbers_of_a_row(self):
        row = next(line for line in str(report_of(weight("a", {2: 16, 6: 48}))).splitlines() if line.startswith("a "))
        assert row.split() == "a 8x8 linear 64 5.00 2-6 2:25% 6:75% 0.000038 0.000037 4 bits 0.000065 0.000244".split()

    def test_the_grids_of_the_weights(self):
        assert "\ngrid: half\n" in str(report_of(*(replace(weight(name), grid="half") for name in "ab")))
        mixed = report_of(weight("a"), replace(weight("b"), grid="codebook"), weight("c"))
        assert "\ngrid: affine (2), codebook (1)\n" in str(mixed)
        assert [entry["grid"] for entry in mixed.as_dict()["weights"]] == ["affine", "codebook", "affine"]

    def test_a_tied_weight_shows_all_its_names(self):
        assert "embed.weight = head.weight" in str(report_of(replace(weight("embed.weight"), aliases=("head.weight",))))

    def test_of_a_real_model(self):
        shown = str(bits_report(prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64), DiffQConfig(penalty=2))))
        assert "lambda: 2 loss per MiB" in shown
        assert "scope: model (the default, and faithful for this model)" in shown


class TestRich:
    def test_every_weight_is_shown(self):
        shown = in_rich(report_of(*blocks(300)))
        assert all(each.name in shown for each in blocks(300))

    def test_square_brackets_are_not_markup(self):
        shown = in_rich(report_of(weight("heads[red].weight"), skipped=[SkippedWeight("b[bold]", (8,), "excluded by '[b]*'")]))
        assert "heads[red].weight" in shown
        assert "b[bold]" in shown
        assert "excluded by '[b]*'" in shown

    @pytest.mark.parametrize("width", [80, 100, 120, 200])
    def test_narrow_consoles_lose_columns_but_no_number(self, width):
        shown = in_rich(report_of(*blocks(3)), width)
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= width
        assert ("float MiB: not shown" in shown) == (width < 140)
        for each in blocks(3):
            row = next(line for line in shown.splitlines() if each.name in line)
            assert "3.50" in row

    def test_histogram_as_blocks(self):
        assert "▁·▇" in in_rich(report_of(weight("a", {2: 8, 4: 56})))


class TestPicture:
    def test_one_weight(self, tmp_path):
        path = report_of(weight("only.weight")).save_picture(tmp_path / "one.png")
        width, height = check_png(path)
        assert (width, height < 700) == (1650, True)

    def test_names_and_numbers_are_in_the_figure(self):
        shown = texts(report_of(weight("a.weight"), weight("b$x$.weight"), skipped=()).figure())
        assert {"a.weight", "b$x$.weight", "3.50 bits"} <= set(shown)
        assert any(text.startswith("Net, prepared: 3.50 bits a weight") for text in shown)

    def test_bars_are_as_long_as_the_weights_are_large(self):
        figure = report_of(weight("a", {2: 10, 5: 30}), weight("b", {5: 7})).figure()
        _, sizes, shares = figure.axes
        assert sorted(bar.get_width() for bar in sizes.patches if bar.get_width()) == [7, 10, 30]
        assert sorted(bar.get_width() for bar in shares.patches if bar.get_width()) == pytest.approx([25, 75, 100])
        colors = {bar.get_width(): bar.get_facecolor() for bar in sizes.patches}
        assert colors[7] == colors[30] != colors[10]

    def test_the_three_sizes(self):
        report = report_of(weight("a"), weight("b"))
        ends = {}
        for bar in report.figure().axes[0].patches:
            place = round(bar.get_y() + bar.get_height() / 2)
            ends[place] = max(ends.get(place, 0), bar.get_x() + bar.get_width())
        sizes = (report.packed_size, report.container_size, report.float_size)
        assert ends == {place: pytest.approx(size.total_mib) for place, size in enumerate(sizes)}

    def test_300_weights_are_shown_by_module(self):
        figure = report_of(*blocks(300)).figure()
        assert figure.get_figheight() < 24
        shown = texts(figure)
        assert all(f"encoder.layers.{i} (4 tensors)" in shown for i in range(75))

    def test_300_weights_without_modules_are_shown_in_runs(self):
        rows = picture_rows([weight(f"{i}.weight") for i in range(300)])
        assert len(rows) == 75
        assert rows[0].label == "0.weight ... 3.weight (4 tensors)"

    @pytest.mark.parametrize("count", [1, MOST_ROWS, MOST_ROWS + 1, 1000])
    def test_no_weight_is_lost(self, count):
        weights = blocks(count)
        rows = picture_rows(weights)
        assert len(rows) <= MOST_ROWS
        assert sum(row.numel for row in rows) == sum(each.numel for each in weights)

    def test_all_widths_from_1_to_16(self):
        shown = texts(report_of(weight("a", dict.fromkeys(range(1, 17), 4))).figure())
        assert {"1 (6%)", "16 (6%)"} <= set(shown)

    def test_other_formats_and_no_suffix(self, tmp_path):
        report = report_of(weight("a.weight"))
        assert "<svg" in report.save_picture(tmp_path / "picture.svg").read_text()
        assert report.save_picture(str(tmp_path / "picture")) == tmp_path / "picture.png"
        check_png(tmp_path / "picture.png")

    def test_what_cannot_be_written_leaves_the_old_file(self, tmp_path):
        report = report_of(weight("a.weight"))
        old = tmp_path / "picture.xyz"
        old.write_text("old")
        with pytest.raises(ValueError, match="xyz"):
            report.save_picture(old)
        assert old.read_text() == "old"
        with pytest.raises(DiffQError, match="cannot write '.*nowhere.*': No such file"):
            report.save_picture(tmp_path / "nowhere" / "picture.png")
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(DiffQError, match=r"cannot write '.*folder\.png': it is a folder"):
            report.save_picture(tmp_path / "folder.png")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "picture.xyz"]
