"""A part whose library is not installed names the extra that brings it."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from diffq_fx import PackedFileError

PARTS = {
    "transformers": ("integrations.hf_folders", "integrations.trainer", "integrations.transformers"),
    "lightning": ("integrations.lightning",),
    "torchao": ("integrations.torchao",),
    "gguf": ("export.gguf",),
}


@pytest.mark.parametrize("package", PARTS)
def test_a_missing_library_is_named_with_its_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in (package, f"pytorch_{package}")]:
        monkeypatch.delitem(sys.modules, name)
    for name in (package, f"pytorch_{package}"):
        monkeypatch.setitem(sys.modules, name, None)
    for part in PARTS[package]:
        monkeypatch.delitem(sys.modules, f"diffq_fx.{part}", raising=False)
    with pytest.raises(ImportError, match=rf"needs the package {package} \(.*\): pip install 'diffq-fx\[{package}\]'"):
        importlib.import_module(f"diffq_fx.{PARTS[package][-1]}")


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0.dev0", "5.22.3"])
def test_a_version_of_transformers_that_is_too_old_is_named_with_the_one_that_is_needed(version, monkeypatch):
    pytest.importorskip("transformers")
    from diffq_fx.integrations.hf_folders import PackedWeights, PackedWeightsQuantizer

    monkeypatch.delitem(sys.modules, "diffq_fx.integrations.transformers", raising=False)
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else found(name))
    says = f"needs transformers 5.23 or newer, found {version}: pip install 'diffq-fx\\[transformers\\]'"
    with pytest.raises(ImportError, match=says):
        importlib.import_module("diffq_fx.integrations.transformers")
    with pytest.raises(PackedFileError, match=says):
        PackedWeightsQuantizer(PackedWeights()).is_serializable(safe_serialization=True)


def test_the_version_that_is_needed_is_that_of_the_extra():
    pytest.importorskip("transformers")
    from diffq_fx.integrations.hf_folders import NEEDED

    assert f'"transformers>={NEEDED}"' in Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
