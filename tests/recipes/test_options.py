"""Options that cannot be, or change nothing, end in one sentence before the training; a result names those that had an effect."""

import subprocess
from dataclasses import fields

import pytest
from recipe_data import RECIPES, make_mnist

from recipes.common.main import main
from recipes.common.processes import held
from recipes.common.settings import _RANGES, parse
from recipes.mnist import Mnist, MnistSettings
from recipes.table import table

ONLY_FOR = {
    "--method ste --mib 1": "--mib is for --method diffq, which is ste here",
    "--method lsq --penalty 5": "--penalty is for --method diffq, diffq-paper, which is lsq",
    "--method float --bits 4": "--bits is for --method",
    "--method diffq-paper --bits 4": "--bits is for --method",
    "--method diffq --codebook binary": "--codebook is for --method lc",
    "--method pq --group 8": "--group is for --method",
    "--method lc --codebook binary --bits 1": "--bits is for an adaptive codebook, not for binary",
    "--mib 1 --bits 4": "--bits has no effect beside --mib",
    "--mib 1 --penalty 5": "--mib has no effect beside --penalty",
    "--momentum 0.5": "--momentum is for --optimizer sgd, which is adam here",
    "--drop-by 0.5": "--drop-by is for --schedule steps",
}
NONSENSE = {
    "--penalty 0": "--penalty must lie",
    "--limit -5": r"--limit must lie in \[0, inf\), got -5",
    "--ema 1": r"--ema must lie in \[0, 1\), got 1.0",
    "--clip-norm -1": "--clip-norm must lie",
    "--optimizer sgd --momentum 2": "--momentum must lie",
    "--bits-lr -1": "--bits-lr must lie",
    "--warm-up 1": "--warm-up must lie",
    "--method lc --turns 0": "--turns must lie",
    "--method lc --mu-start 0": "--mu-start must lie",
    "--evaluate-every -1": "--evaluate-every must lie",
    "--save-every -1": "--save-every must lie",
    "--method pq --finetune-epochs -1": "--finetune-epochs must lie",
    "--stop-after -1": "--stop-after must lie",
    "--epochs inf": "--epochs must lie",
    "--epochs nan": "--epochs must lie",
    "--weight-decay 1e300": "--weight-decay must lie",
    "--schedule steps --drop-every 0": "--drop-every must lie",
    "--seed 99999999999999999999": "--seed must lie",
    "--method ste --bits 2.5": "--bits must be a whole number with --method ste, got 2.5",
    "--method lsq --group 0": "--group must be channel, tensor or a number from 1, got '0'",
    "--method diffq-paper --group tensor": "--group must be a number from 1, got 'tensor'",
}
OF_THE_LIBRARY = {
    "--method ste --bits 30": "--method ste: .*30",
    "--mib 0.0001": "--method diffq: .*0.0001",
}


@pytest.mark.parametrize("given", [*ONLY_FOR, *NONSENSE])
def test_it_is_refused_by_name(given):
    with pytest.raises(SystemExit, match={**ONLY_FOR, **NONSENSE}[given]):
        parse(MnistSettings, given.split(), "")


@pytest.mark.parametrize("given", ["--device foo", "--method lc --codebook foo"])
def test_a_name_that_is_none_of_the_choices(given, capsys):
    with pytest.raises(SystemExit):
        parse(MnistSettings, given.split(), "")
    assert "invalid choice: 'foo'" in capsys.readouterr().err


def test_every_number_has_a_range():
    for recipe, _ in RECIPES.values():
        plain = recipe.settings_type()
        numbers = {each.name for each in fields(plain) if type(getattr(plain, each.name)) in (int, float)}
        assert numbers <= _RANGES.keys(), recipe
        plain.check(())


@pytest.mark.parametrize("given", OF_THE_LIBRARY)
def test_what_the_library_says_is_one_error_without_a_traceback(given, tmp_path):
    make_mnist(tmp_path)
    with pytest.raises(SystemExit, match=OF_THE_LIBRARY[given]):
        main(Mnist, ["--data", str(tmp_path), "--out", str(tmp_path / "run"), *given.split()])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--method float", set()),
        ("--method diffq-paper", {"penalty", "group"}),
        ("--mib 0.2", {"mib"}),
        ("--method ste --bits 3", {"bits"}),
        ("--method lc --codebook binary --epochs 2", {"codebook"}),
    ],
)
def test_a_result_names_what_had_an_effect(given, named, tmp_path):
    make_mnist(tmp_path)
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--no-onnx", "--epochs", "1", *given.split()]
    result = main(Mnist, options)
    of_size = {"bits", "mib", "penalty", "group", "codebook"}
    assert of_size & result["settings"].keys() == named
    assert result["settings"].get("penalty") == (5 if "penalty" in named else None)


def test_a_folder_is_of_one_training_at_a_time(tmp_path):
    make_mnist(tmp_path)
    with held(tmp_path / "run"), pytest.raises(SystemExit, match="another process trains there"):
        main(Mnist, ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--method", "float"])
    with held(tmp_path / "run"):
        pass


def test_a_file_that_was_not_written_is_an_empty_cell(tmp_path):
    make_mnist(tmp_path)
    result = main(Mnist, ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--epochs", "1", "--method", "diffq-paper"])
    assert result["onnx"].startswith("not written")
    assert "not written" not in table([result])


def test_smoke_removes_nothing_but_its_own_folder(tmp_path, monkeypatch):
    make_mnist(tmp_path)
    kept, gone = tmp_path / "run" / "result.json", tmp_path / "run" / "smoke" / "old"
    gone.parent.mkdir(parents=True)
    kept.write_text("{}")
    gone.write_text("")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: subprocess.CompletedProcess(args, 1))
    with pytest.raises(SystemExit, match="the first process was to be killed"):
        main(Mnist, ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--smoke"])
    assert kept.read_text() == "{}"
    assert not gone.exists()
