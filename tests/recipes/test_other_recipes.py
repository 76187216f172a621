"""Language, separation, sentence pairs and ImageNet: their formats, what is missing or broken, and iPQ."""

import importlib.util
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_data import make_pairs, make_pictures, make_stems, make_text, wav
from safetensors.torch import load_file

from recipes.common.main import main
from recipes.common.recipe import Lacking
from recipes.common.settings import parse
from recipes.data.glue import read_pairs
from recipes.data.imagenet import load_pictures
from recipes.data.stems import load_stems
from recipes.data.wikitext import numbers, read_words, vocabulary
from recipes.glue import Glue
from recipes.imagenet import ImageNet
from recipes.models.language import AdaptiveTransformer
from recipes.separation import Separation, sdr


def test_ipq_rounds_layer_group_by_layer_group_and_resumes(tmp_path, capsys):
    options = ["--data", str(tmp_path), "--method", "pq", "--bits", "4", "--no-onnx", "--epochs", "0.2", "--finetune-epochs", "0.1"]
    options += [*make_pairs(tmp_path), "--batch-size", "2", "--out", str(tmp_path / "run")]
    first = main(Glue, options)
    told = capsys.readouterr().out
    assert all(f"stage {i}" in told for i in range(3))
    again = main(Glue, options)  # all stages are in the checkpoint
    assert "stage" not in capsys.readouterr().out
    assert again["score"] == first["score"]
    assert again["packed"] == first["packed"]


class TestText:
    def test_words_and_their_numbers(self, tmp_path):
        make_text(tmp_path)
        words = list(read_words(tmp_path / "wiki.train.tokens"))
        assert words[:12] == ["=", "Heading", "=", "<eos>", "the", "cat", "sat", "on", "the", "mat", ".", "<eos>"]
        known = vocabulary(words, least=80)
        assert list(known) == ["the", "<eos>", ",", ".", "=", "cat", "<unk>"]
        assert numbers(["cat", "bird"], known).tolist() == [5, 6]

    def test_what_is_missing_or_broken(self, tmp_path):
        with pytest.raises(Lacking, match=r"there is no .*wiki.train.tokens.*\n.*wikitext-103-v1.zip"):
            next(read_words(tmp_path / "wiki.train.tokens"))
        (tmp_path / "cut").write_bytes("é".encode()[:1])
        with pytest.raises(Lacking, match="cut is no text in UTF-8"):
            next(read_words(tmp_path / "cut"))
        (tmp_path / "empty").write_text("\n\n")
        with pytest.raises(Lacking, match="empty has no words"):
            next(read_words(tmp_path / "empty"))

    def test_the_adaptive_softmax_is_a_distribution_of_all_words(self):
        model = AdaptiveTransformer(50, cutoffs=(10, 30), width=32, heads=2, hidden=32, layers=2, context=8).eval()
        ids = torch.randint(50, (2, 8))
        logs = model(ids)
        assert logs.shape == (2, 8, 50)
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, 8))
        later = ids.clone()
        later[:, 5:] = 0
        torch.testing.assert_close(model(later)[:, :5], logs[:, :5])


def _windows_by_formula(target, estimate, rate):
    """Of sources, samples and channels; shape (sources, windows)."""
    found = np.full((len(target), target.shape[1] // rate), np.nan)
    for i in range(found.shape[1]):
        true, made = (each[:, i * rate : (i + 1) * rate].astype(float) for each in (target, estimate))
        if true.any((1, 2)).all() and made.any((1, 2)).all():
            found[:, i] = 10 * np.log10((true**2).sum((1, 2)) / ((true - made) ** 2).sum((1, 2)))
    return found


def _windows_by_museval(target, estimate, rate):
    spec = importlib.util.find_spec("museval")
    if spec is None:
        pytest.skip("museval is not installed")
    path = Path(spec.origin).with_name("metrics.py")  # the package itself asks for ffmpeg
    own = importlib.util.spec_from_file_location("museval_metrics", path)
    metrics = importlib.util.module_from_spec(own)
    own.loader.exec_module(metrics)
    return metrics.bss_eval(target, estimate, window=rate, hop=rate, filters_len=64)[0]


class TestStems:
    def test_wav_files_stay_on_disk_and_end_in_zeros(self, tmp_path):
        make_stems(tmp_path)
        train, test, rate = load_stems(tmp_path)
        assert (len(train), len(test), rate, len(train[0])) == (2, 2, 800, 2000)
        assert isinstance(train[0].sources[1], np.memmap)
        with wave.open(str(tmp_path / "train" / "a" / "bass.wav")) as file:
            expected = np.frombuffer(file.readframes(2000), "<i2").reshape(2000, 2)
        part = train[0].part(1, 1990, 20)
        assert np.array_equal(part[:, :10] * 32768, expected[1990:].T)
        assert not part[:, 10:].any()

    def test_what_is_missing_or_broken(self, tmp_path):
        with pytest.raises(Lacking, match=r"train has no folders of tracks.*\n.*MUSDB18-HQ at"):
            load_stems(tmp_path)
        make_stems(tmp_path)
        bass = tmp_path / "test" / "b" / "bass.wav"
        content = bass.read_bytes()
        for broken, says in ((content[:10], "no WAV file"), (content[:-100], "no WAV file"), (None, "there is no .*bass.wav")):
            bass.unlink()
            if broken is not None:
                bass.write_bytes(broken)
            with pytest.raises(Lacking, match=says):
                load_stems(tmp_path)
            bass.write_bytes(content)
        wav(bass, np.zeros((10, 2)), bits=8)
        with pytest.raises(Lacking, match="has 8 bits a sample, expected 16"):
            load_stems(tmp_path)

    def test_sdr_is_that_of_each_second_in_which_no_source_is_silent(self):
        target = torch.randn(1, 2, 2, 30)
        estimate = target.clone()
        estimate[..., :10] *= 0.9
        estimate[..., 10:20] *= 0.5
        target[:, 1, :, 20:] = 0
        found = sdr(estimate, target, 10, 3)
        torch.testing.assert_close(found[0, :, :2], torch.tensor([20.0, 6.0206]).expand(2, 2), rtol=1e-4, atol=1e-3)
        assert found[0, :, 2].isnan().all()

    @pytest.mark.parametrize("windows", [_windows_by_formula, _windows_by_museval])
    def test_the_score_is_that_of_museval(self, tmp_path, windows):
        """Tracks of two seconds and a half: the rest is no window, and the median of two is their mean."""
        make_stems(tmp_path)
        recipe = Separation(parse(Separation.settings_type, ["--data", str(tmp_path)], ""), torch.device("cpu"))
        recipe.pieces[0][0].sources[2] = np.zeros((2000, 2), np.int16)
        recipe.pieces[0][0].sources[2][900:] = 700

        def separate(mixture):
            return torch.stack([mixture * (0.2 + 0.1 * i) for i in range(4)], 1)

        tracks = []
        for track, _ in recipe.pieces:
            target = np.stack([track.part(source, 0, 2000) for source in range(4)])
            estimate = separate(torch.from_numpy(target.sum(0))[None])[0].numpy()
            tracks.append(np.nanmedian(windows(target.transpose(0, 2, 1), estimate.transpose(0, 2, 1), 800), 1))
        of_sources = np.median(tracks, 0)
        found = recipe.evaluate(separate)
        assert found == pytest.approx({"score": of_sources.mean(), **{f"source {i}": each for i, each in enumerate(of_sources)}}, abs=1e-4)


class TestPairs:
    def test_pairs_without_a_label_are_left_out(self, tmp_path):
        make_pairs(tmp_path)
        pairs, labels = read_pairs(tmp_path / "train.tsv")
        assert labels[:6] == [0, 1, 2, 0, 1, 2]
        assert pairs[3] == ('A "man number 4 walks .', "Somebody moves 4 times .")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, r"there is no .*x.tsv.*\n.*MNLI.zip at"),
            ("index\tsentence1\tsentence2\n", "it lacks gold_label.*test files of GLUE"),
            ("sentence1\tsentence2\tgold_label\na\tb\n", "line 2 has 2 cells, the first line 3"),
            ("sentence1\tsentence2\tgold_label\na\tb\tyes\n", "line 2 has the label 'yes'"),
        ],
    )
    def test_what_is_missing_or_broken(self, tmp_path, content, says):
        if content is not None:
            (tmp_path / "x.tsv").write_text(content)
        with pytest.raises(Lacking, match=says):
            read_pairs(tmp_path / "x.tsv")


class TestPictures:
    def test_folders_are_classes(self, tmp_path):
        make_pictures(tmp_path)
        pictures = load_pictures(tmp_path / "train")
        assert pictures.classes == ["n01440764", "n01443537"]
        assert pictures.labels.tolist() == [0] * 10 + [1] * 10
        whole, crop = (pictures.read([0, 7], 16, crops)[1].result() for crops in (None, np.full((2, 4), 0.3)))
        assert whole.shape == crop.shape == (3, 16, 16)
        assert load_pictures(tmp_path / "train", 2).labels.tolist() == [0, 1]

    def test_what_is_missing_or_broken(self, tmp_path):
        with pytest.raises(Lacking, match=r"train has no folders of classes.*\n.*https://image-net.org"):
            load_pictures(tmp_path / "train")
        make_pictures(tmp_path)
        (tmp_path / "train" / "n01440764" / "0_1.JPEG").write_bytes(b"no picture")
        with pytest.raises(Lacking, match="0_1.JPEG is no picture"):
            load_pictures(tmp_path / "train").read([1], 16, None)[0].result()
        (tmp_path / "train" / "n5").mkdir()
        with pytest.raises(Lacking, match="classes without a picture .*: n5"):
            load_pictures(tmp_path / "train")

    def test_both_heads_of_a_net_with_a_distillation_token_follow_the_float_model(self, tmp_path, monkeypatch):
        options = ["--data", str(tmp_path), *make_pictures(tmp_path), "--no-onnx", "--batch-size", "4", "--epochs", "0.4", "--lr", "0.01"]
        main(ImageNet, [*options, "--method", "float", "--out", str(tmp_path / "float")])
        start = tmp_path / "float" / "float.safetensors"
        monkeypatch.setattr(ImageNet, "criterion", lambda *args: pytest.fail("labels were used"))
        main(ImageNet, [*options, "--method", "lsq", "--distil", "--start", str(start), "--out", str(tmp_path / "run")])
        before, after = load_file(start), torch.load(tmp_path / "run" / "checkpoint.pt")["model"]
        heads = [name for name in before if "head" in name and name.endswith("weight")]
        assert len(heads) == 2
        assert all((after[name] - before[name]).abs().amax() > 1e-3 for name in heads)
