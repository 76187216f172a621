"""The C kernel is built once, kept in the user's cache, and done without wherever it cannot be built."""

import logging
import os
import stat

import pytest
import torch

from diffq_fx.kernels import add_noise, build

fresh = build.library.__wrapped__


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DIFFQ_FX_KERNELS", raising=False)
    return tmp_path / "diffq_fx"


@pytest.fixture
def _compiler():
    if build.library() is None:
        pytest.skip("no C compiler is at hand")


@pytest.mark.usefixtures("_compiler")
def test_it_is_built_once_and_found_again(cache, monkeypatch):
    assert fresh() is not None
    (built,) = cache.iterdir()
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert fresh() is not None
    assert [built] == list(cache.iterdir())


@pytest.mark.usefixtures("_compiler")
def test_a_changed_processor_or_flag_builds_another(cache, monkeypatch):
    fresh()
    monkeypatch.setattr(build, "_processor", lambda: "another")
    fresh()
    assert len(list(cache.iterdir())) == 2


def test_without_a_compiler_torch_does_it(cache, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert fresh() is None
    monkeypatch.setattr(build, "library", fresh)
    assert add_noise(torch.zeros(4, 8), torch.ones(4, 1), axis=0, block=8).abs().max() < 0.5
    assert not cache.exists()


def test_a_compiler_that_fails_is_done_without_and_leaves_nothing(cache, tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level(logging.INFO, "diffq_fx"):
        assert fresh() is None
    assert "could not build the kernels" in caplog.text
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("_compiler")
def test_a_cache_that_cannot_be_written_to(cache, tmp_path, monkeypatch):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    os.mkdir(tmp_path / "tmp")
    assert fresh() is not None


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "torch")
    assert fresh() is None
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "cuda")
    with pytest.raises(ValueError, match='DIFFQ_FX_KERNELS must be "native" or "torch", got \'cuda\''):
        fresh()
