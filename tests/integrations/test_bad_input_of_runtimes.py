"""What the writers for runtimes of language models refuse: one sentence that begins with the writer's name, and no file or folder."""

import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from diffq_fx import DiffQConfig, DiffQWarning, ExportError, PackedFileError, PreparationError, convert, prepare
from diffq_fx.export import export_onnx
from diffq_fx.methods import STE

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"input_ids": torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))}
BLOCKS = {"group_size": 32, "grid": "symmetric", "scale_dtype": "float16"}
HELD = STE(bits=4, **BLOCKS)


def to_onnx(model, path, tokenizer):
    export_onnx(model, IDS["input_ids"], path, cache=True, verify=False)


def to_gguf(model, path, tokenizer):
    pytest.importorskip("gguf")
    from diffq_fx.export.gguf import export_gguf

    export_gguf(model, path, tokenizer=tokenizer)


def to_olive(model, path, tokenizer):
    from diffq_fx.integrations.olive import save_olive

    save_olive(model, path, tokenizer)


def to_genai(model, path, tokenizer):
    pytest.importorskip("onnxruntime_genai")
    from diffq_fx.integrations.genai import export_genai

    export_genai(model, path, tokenizer)


def to_torchao(model, path, tokenizer):
    """Both steps of a plain model whose embedding torchao has no form for."""
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    from diffq_fx.integrations.torchao import QATConfig, whole_model

    plain = causal("Llama")
    with pytest.warns(DiffQWarning, match=r"embed_tokens\.weight: 12 bits"):
        quantize_(plain, QATConfig({"*embed*": STE(bits=12), "*": HELD}, IDS, step="prepare"), whole_model)
    with pytest.warns(DiffQWarning, match=r"embed_tokens\.weight: 12 bits"):
        quantize_(plain.eval(), QATConfig(step="convert"), whole_model)
    plain.save_pretrained(path)


def causal(kind):
    config = getattr(transformers, f"{kind}Config")(**SIZES, bos_token_id=0, eos_token_id=1)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def held(model, method=HELD):
    return convert(prepare(model, IDS, method))


MODELS = {
    "right": lambda: held(causal("Llama")),
    "no cache": lambda: held(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))),
    "widths": lambda: held(causal("Llama"), STE(bits=9, **BLOCKS)),
    "grid": lambda: held(causal("Llama"), STE(bits=4, group_size=32, grid="float", scale_dtype="float16")),
    "architecture": lambda: held(causal("Olmo")),
}


@pytest.fixture(scope="module")
def made():
    """Name -> the converted model, each made once."""
    found = {}
    return lambda name: found[name] if name in found else found.setdefault(name, MODELS[name]())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer that every runtime reads."""
    letters = {letter: index for index, letter in enumerate(["<s>", "</s>", *map(chr, range(97, 123))])}
    cuts = Tokenizer(models.BPE(letters | {"ab": len(letters)}, [("a", "b")]))
    cuts.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=cuts, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def there(path):
    path.mkdir()
    (path / "mine").write_text("kept")


ONNX, GGUF, OLIVE, GENAI = (("export_onnx", to_onnx), ("export_gguf", to_gguf), ("save_olive", to_olive), ("export_genai", to_genai))
NO_CACHE = "no decoder of transformers that generates with a cache"
NO_TOKENIZER = "has no tokenizer"
WIDE = r"the widest channel has 9; the format has up to 8 bits. Prepare with .*for_runtime.* of up to 8 bits\.$"
THERE = "is there already. Give the name of a new folder"
CASES = [
    (ONNX, "no cache", None, "the BertForMaskedLM has no cache: its forward takes no 'past_key_values'"),
    (GGUF, "no cache", None, "the architecture 'bert' is not known, only 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3' are"),
    (OLIVE, "no cache", None, NO_CACHE),
    (GENAI, "no cache", None, NO_CACHE),
    (ONNX, "grid", None, "is on the float grid"),
    (GGUF, "widths", None, "Q8_0, the widest type for its grid"),
    (OLIVE, "widths", None, WIDE),
    (GENAI, "widths", None, WIDE),
    (GGUF, "architecture", None, "the architecture 'olmo' is not known"),
    (GGUF, "right", shutil.rmtree, "has no tokenizer.json. Give the folder that tokenizer.save_pretrained wrote"),
    (OLIVE, "right", shutil.rmtree, NO_TOKENIZER),
    (GENAI, "right", shutil.rmtree, NO_TOKENIZER),
    (ONNX, "right", there, "it is a folder; add the name of a file"),
    (GGUF, "right", there, "it is a folder; add the name of a file"),
    (OLIVE, "right", there, THERE),
    (GENAI, "right", there, THERE),
]


@pytest.mark.parametrize(("writer", "model", "spoil", "says"), CASES, ids=lambda each: each[0] if isinstance(each, tuple) else None)
def test_one_sentence_and_nothing_written(writer, model, spoil, says, made, tokenizer, tmp_path):
    (name, write), path, words = writer, tmp_path / "target", tmp_path / "words"
    shutil.copytree(tokenizer, words)
    if spoil:
        spoil(path if spoil is there else words)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=f"{says}") as error:
        write(made(model), path, words)
    assert str(error.value).startswith(f"{name}: ") or spoil is there
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_torchao_writes_no_file_of_a_width_that_it_has_no_form_for(tmp_path):
    with pytest.raises(PackedFileError, match="^save_pretrained: [^\n]*$"):
        to_torchao(None, tmp_path, None)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("runtime", ["gguf", "onnxruntime-genai"])
@pytest.mark.parametrize("sets", ["same_input", (("*.q_proj", "*.k_proj"),)])
def test_sets_that_cannot_share_a_width(runtime, sets):
    one, other = (DiffQConfig.for_runtime(runtime, target_bits=6, same_width=sets, **widths) for widths in ({"widths": (4, 8)}, {}))
    with pytest.raises(PreparationError, match=r"q_proj.*k_proj|k_proj.*q_proj") as error:
        prepare(causal("Llama"), IDS, {"*k_proj*": one, "*": other})
    assert "\n" not in str(error.value)


NOBODY = 65534


def full_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


def read_only(path):
    path.parent.chmod(0o555)
    if os.geteuid() == 0:  # root may write anywhere
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


@pytest.mark.parametrize("broken", [full_disk, read_only])
@pytest.mark.parametrize("writer", [GGUF, OLIVE, GENAI], ids=lambda writer: writer[0])
def test_a_disk_that_takes_nothing(writer, broken, made, tokenizer):
    """In a process of its own, whose one sentence comes back through a pipe; abuse/test_writers.py has export_onnx."""
    (name, write), model = writer, made("right")
    if name == "export_genai":
        pytest.importorskip("onnxruntime_genai")
    with tempfile.TemporaryDirectory() as folder:  # whose parents everybody may enter
        path, words = Path(folder) / "place" / "target", Path(folder) / "words"
        path.parent.mkdir()
        shutil.copytree(tokenizer, words)
        for each in (Path(folder), words):
            each.chmod(0o755)
        said = sentence_of(lambda: write(model, path, words), lambda: broken(path))
        path.parent.chmod(0o755)
        assert f"cannot write {str(path)!r}" in said or f"cannot write '{path}'" in said, said
        assert "\n" not in said
        assert not os.listdir(path.parent)


def sentence_of(work, begin):
    """What a child that begins and works says of its failure."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as said:
            sentence = said.read()
        os.waitpid(child, 0)
        return sentence
    said = "done, or another error"
    try:
        begin()
        work()
    except ExportError as error:
        said = str(error)
    finally:
        os.write(writing, said.encode())
        os._exit(0)
