"""Arguments of the wrong type of public functions: one sentence with the function's name, before anything is done."""

import inspect
from importlib import import_module, util
from pathlib import Path

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, compress, convert, model_size, prepare
from diffq_fx.export import export_onnx, load_packed, read_metadata, save_packed, session_options
from diffq_fx.export.onnx.benchmark import compare_latency
from diffq_fx.export.onnx.inspection import inspect_onnx
from diffq_fx.methods import LC, STE
from diffq_fx.post_training.block_by_block import compress_blocks
from diffq_fx.training.lc import LCLoop, lc_step

X = torch.zeros(2, 16)


def net():
    return nn.Sequential(nn.Linear(16, 8))


def converted():
    return convert(prepare(net(), X, STE(bits=4)))


def codebooks():
    return prepare(net(), X, LC(entries=2))


def of(module, name):
    """A function of an integration, whose package may be missing."""
    module = f"diffq_fx.{module}"
    package = {"genai": "onnxruntime_genai", "olive": "transformers", "trainer": "transformers"}.get(
        module.rpartition(".")[2], module.rpartition(".")[2]
    )
    if util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    return getattr(import_module(module), name)


FLAGS = {
    ("export_onnx", "cache"): lambda flag: export_onnx(converted(), X, "model.onnx", cache=flag),
    ("export_onnx", "verify"): lambda flag: export_onnx(converted(), X, "model.onnx", verify=flag),
    ("session_options", "exact"): lambda flag: session_options("model.onnx", exact=flag),
    ("export_genai", "exact"): lambda flag: of("integrations.genai", "export_genai")(converted(), "genai", "words", exact=flag),
    ("model_size", "exact"): lambda flag: model_size(codebooks(), exact=flag),
    ("compress", "progress"): lambda flag: compress(net(), [X] * 4, progress=flag),
    ("compress_blocks", "progress"): lambda flag: compress_blocks(net(), [X] * 4, "0", progress=flag),
    ("lc_step", "augmented"): lambda flag: lc_step(codebooks(), next_mu=1.0, augmented=flag),
    ("LCLoop", "augmented"): lambda flag: LCLoop(codebooks(), lambda *_: None, augmented=flag),
    ("LC", "learn_scale"): lambda flag: LC(codebook=(-1.0, 1.0), learn_scale=flag),
    ("LC", "shared"): lambda flag: LC(shared=flag),
    ("DiffQConfig", "clip_ranges"): lambda flag: DiffQConfig(clip_ranges=flag),
    ("DiffQTrainerCallback", "convert_at_end"): lambda flag: of("integrations.trainer", "DiffQTrainerCallback")(convert_at_end=flag),
    ("DiffQCallback", "convert_at_end"): lambda flag: of("integrations.lightning", "DiffQCallback")(convert_at_end=flag),
}


@pytest.mark.parametrize("value", ["no", 1, None], ids=repr)
@pytest.mark.parametrize("flag", FLAGS, ids=".".join)
def test_a_flag_is_true_or_false(flag, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=rf"^{flag[0]}: {flag[1]} must be True or False, got {value!r}\.$"):
        FLAGS[flag](value)
    assert not list(tmp_path.iterdir())


MODULES = (
    "diffq_fx diffq_fx.export diffq_fx.methods diffq_fx.training.lc diffq_fx.training.ipq diffq_fx.post_training.block_by_block "
    "diffq_fx.export.gguf diffq_fx.integrations.genai diffq_fx.integrations.olive diffq_fx.integrations.transformers "
    "diffq_fx.integrations.torchao diffq_fx.integrations.lightning"
).split()
"""What docs/reference.md has."""


def test_every_flag_that_users_may_give_is_tried_above():
    reference, found = (Path(__file__).parents[1] / "docs" / "reference.md").read_text(), set()
    for module in MODULES:
        try:
            public = import_module(module)
        except ImportError:
            continue
        for name, each in vars(public).items():
            is_ours = getattr(each, "__module__", "").startswith("diffq_fx") and (inspect.isfunction(each) or "__init__" in vars(each))
            if is_ours and (name in getattr(public, "__all__", ()) or name in reference):
                parameters = inspect.signature(each).parameters.values()
                found |= {(name, each.name) for each in parameters if each.annotation in (bool, "bool") and each.default is not each.empty}
    assert {("export_onnx", "cache"), ("model_size", "exact"), ("DiffQConfig", "clip_ranges")} <= found
    assert sorted(found - FLAGS.keys()) == []


PATHS = {
    "export_onnx: path": lambda path: export_onnx(converted(), X, path),
    "export_gguf: path": lambda path: of("export.gguf", "export_gguf")(converted(), path, tokenizer=None),
    "export_genai: folder": lambda path: of("integrations.genai", "export_genai")(converted(), path, "words"),
    "save_olive: folder": lambda path: of("integrations.olive", "save_olive")(converted(), path, "words"),
    "save_packed: path": lambda path: save_packed(converted(), path),
    "save_page: path": lambda path: bits_report(converted()).save_page(path),
    "save_picture: path": lambda path: bits_report(converted()).save_picture(path),
    "an ONNX file: path": session_options,
    " an ONNX file: path": read_metadata,
    "  an ONNX file: path": inspect_onnx,
    "   an ONNX file: path": lambda path: compare_latency(path, path),
}


@pytest.mark.parametrize("value", [3, None, b"name"], ids=repr)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_one(name, value):
    with pytest.raises(TypeError, match=f"^{name.strip()} must be a str or a Path, got {type(value).__name__}\\.$"):
        PATHS[name](value)


class Place:
    """What os knows as a path, though it is no Path."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


def test_any_path_of_os_is_one(tmp_path):
    place = Place(tmp_path / "packed")
    assert load_packed(save_packed(converted(), place)).keys() == load_packed(place).keys()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DiffQConfig.for_runtime(["gguf"]), ValueError, r"runtime must be one of .*, got \['gguf'\]"),
        (lambda: export_onnx(converted(), X, "model.onnx", runtime=["web"]), ValueError, r"runtime must be one of .*, got \['web'\]"),
        (lambda: session_options("model.onnx", threads="two"), ValueError, "session_options: threads must be a whole number of at least 0"),
        (lambda: compare_latency("a", "b", repeats=0.5), ValueError, "compare_latency: repeats must be a whole number of at least 1"),
    ],
)
def test_other_values_of_wrong_types(call, error, message):
    with pytest.raises(error, match=message):
        call()
