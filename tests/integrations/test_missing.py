"""A part whose library is not installed names the extra that brings it."""

import importlib
import sys

import pytest

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
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'diffq-fx\[{package}\]'"):
        importlib.import_module(f"diffq_fx.{PARTS[package][-1]}")
