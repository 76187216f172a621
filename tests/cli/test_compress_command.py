"""diffq-fx compress: what it writes, that it writes all or nothing, and that each wrong input is one sentence."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import diffq_fx
from diffq_fx import compress
from diffq_fx.cli import app
from diffq_fx.export import load_packed
from diffq_fx.export.onnx.inspection import inspect_onnx

QUICK = ["--steps", "1"]
NET = """
import os, signal
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def ready():
    print("made")
    return net(), [torch.randn(8, 64) for _ in range(4)]


def stopped(by=signal.SIGINT):
    def batches():
        for _ in range(3):
            yield torch.randn(8, 64)
        os.kill(os.getpid(), by)
        yield torch.randn(8, 64)

    return net(), batches()


def terminated():
    return stopped(signal.SIGTERM)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


def branching():
    return Branching(), [torch.randn(8, 64) for _ in range(4)]


def breaks():
    raise RuntimeError("no data today")


def late():
    yield torch.randn(8, 64)
    raise OSError("the disk is gone")


NO_FUNCTION = 3
three = lambda: (net(), [], 1)
one_batch = lambda: (net(), torch.randn(8, 64))
model_only = net
breaks_late = lambda: (net(), late())
labels = lambda: (net(), [(torch.randn(8, 64), torch.zeros(8)) for _ in range(4)])
numbers = lambda: (net(), [1, 2, 3])
empty = lambda: (net(), [])
"""


def invoke(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(NET)
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "broken", "leaves"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def left(folder):
    """What a run has left behind beside the files that were there."""
    return {path.name for path in folder.iterdir()} - {"mine.py", "broken.py", "leaves.py", "__pycache__"}


def test_a_function_gives_a_packed_file_and_the_report(tmp_path):
    result = invoke("mine:ready", "--bits", 3, *QUICK)
    assert result.exit_code == 0, result.stderr
    for text in ("made", "2.weight", "target: 3 bits per quantized weight", "diffq-fx-compressed/packed.safetensors: 0."):
        assert text in result.stdout
    assert left(tmp_path) == {"diffq-fx-compressed"}
    assert os.listdir("diffq-fx-compressed") == ["packed.safetensors"]
    assert load_packed("diffq-fx-compressed/packed.safetensors")["0.weight"].shape == (64, 64)


def test_weights_that_are_excluded_stay_in_float():
    result = invoke("mine:ready", "--exclude", "0.weight", "--exclude", "nothing", *QUICK)
    assert (result.exit_code, "exclude pattern 'nothing' matches no parameter" in result.stderr) == (2, True), result.stderr
    result = invoke("mine:ready", "--exclude", "0.weight", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert [weight["name"] for weight in json.loads(result.stdout)["report"]["weights"]] == ["2.weight"]


def test_all_formats_a_page_and_json_alone_on_stdout(tmp_path):
    result = invoke("mine:ready", "--format", "all", "--report", "--out", "new", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["files"] == {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert answer["files"].keys() == {"model.onnx", "packed.safetensors", "report.html"}
    assert answer["report"]["average_bits_in_all"] <= 4
    assert answer["failed"] == {}
    assert "made" in result.stderr
    assert len(inspect_onnx("new/model.onnx").of_role("quantized")) == 2


@pytest.mark.parametrize("options", [["--mib", 0.004], ["--mib", 0.004, "--format", "onnx"]])
def test_a_size_in_mib_is_that_of_what_is_written(options):
    result = invoke("mine:ready", *options, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    of_onnx = "onnx" in options
    size = (
        inspect_onnx("diffq-fx-compressed/model.onnx").payload_bytes() / 2**20
        if of_onnx
        else answer["report"]["sizes"]["bit_packed"]["total_mib"]
    )
    assert 0.003 < size <= 0.0042


def test_what_cannot_be_exported_does_not_take_the_rest_with_it(tmp_path):
    result = invoke("mine:branching", "--format", "all", "--out", "new", "--json", *QUICK)
    assert result.exit_code == 2
    assert "onnx: export_onnx: " in result.stderr
    assert json.loads(result.stdout)["failed"].keys() == {"onnx"}
    assert left(tmp_path / "new") == {"packed.safetensors"}


def test_what_onnx_cannot_hold_is_said_before_the_compression(tmp_path, monkeypatch):
    monkeypatch.setattr(diffq_fx, "compress", None)
    result = invoke("mine:branching", "--format", "onnx", "--out", "none")
    assert (result.exit_code, (tmp_path / "none").exists()) == (2, False), result.exception
    assert re.search(r"cannot trace the Branching.*/mine\.py:\d+: return self\.net\(x\) if x\.sum\(\) > 0", result.stderr, re.DOTALL)


def signals_as_in_a_terminal():
    """A runner in the background may have been started with SIGINT ignored, which goes on to its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("how", ["stopped", "terminated"])
def test_interrupted_it_leaves_nothing_and_says_so_by_its_code(tmp_path, how):
    command = [sys.executable, "-m", "diffq_fx", "compress", f"mine:{how}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=signals_as_in_a_terminal)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "diffq-fx: interrupted.\n"
    assert not left(tmp_path)


BAD = {
    ("nowhere",): "there is no folder 'nowhere'. Give a Hugging Face folder, or module:function; nothing is downloaded.",
    ("mine.py",): "'mine.py' is a file. Give a Hugging Face folder or module:function",
    ("missing_module:ready",): "module 'missing_module' does not import: ModuleNotFoundError: No module named 'missing_module'",
    ("broken:ready",): "module 'broken' does not import: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
    ("leaves:ready",): "module 'leaves' does not import: SystemExit: 3",
    ("mine:nothing",): "module 'mine' has no function 'nothing'",
    ("mine:NO_FUNCTION",): "module 'mine' has no function 'NO_FUNCTION'",
    ("mine:breaks",): "mine:breaks failed: RuntimeError: no data today",
    ("mine:breaks_late",): "the batches of mine:breaks_late failed: OSError: the disk is gone",
    (
        "mine:three",
    ): "mine:three must return (model, batches), a torch.nn.Module and an iterable of its inputs; it returned Sequential, list, int",
    ("mine:one_batch",): "it returned Sequential, Tensor",
    ("mine:model_only",): "it returned Sequential",
    ("mine:labels",): "labels among them, it seems",
    ("mine:numbers",): "compress: batch 0: example_inputs must be a tensor",
    ("mine:empty",): "there is no batch",
    ("mine:ready", "--data", "mine.py"): "--data mine.py is for a folder: mine:ready returns the batches itself",
    ("mine:ready", "--bits", 3, "--mib", 1): "--bits 3 and --mib 1 are two sizes. Give one of them.",
    ("mine:ready", "--mib", 1e-6): "target_mib=1e-06",
    ("mine:ready", "--bits", 0): "target_bits",
    ("mine:ready", "--minutes", 0): "minutes must be a positive number",
    ("mine:ready", "--steps", -1): "steps",
    ("mine:ready", "--format", "hf"): "a Sequential has no save_pretrained",
    ("mine:ready", "--format", "nothing"): "gguf",
    ("mine:ready", "--format", "gguf"): "export_gguf: the model is none of transformers: it has no config that names its architecture",
    ("mine:ready", "--format", "onnxruntime-genai"): "--format onnxruntime-genai is for a Hugging Face folder: the tokenizer there goes",
    ("mine:ready", "--out", "mine.py"): "'mine.py' is there already. Give the name of a new folder",
    ("mine:ready", "--out", "no/such"): "cannot write 'no/such': No such file or directory",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(map(str, arguments)))
def test_bad_input_is_one_message(arguments, tmp_path):
    before = (tmp_path / "mine.py").read_bytes()
    result = invoke(*arguments)
    assert result.exit_code == 2, result.exception
    assert BAD[arguments] in result.stderr
    assert "Traceback" not in result.stderr
    assert not left(tmp_path)
    assert (tmp_path / "mine.py").read_bytes() == before


def test_a_fault_of_ours_is_no_message(monkeypatch):
    def broken(*arguments, **settings):
        raise TypeError("a fault")

    monkeypatch.setattr("diffq_fx.compress", broken)
    assert isinstance(invoke("mine:ready").exception, TypeError)
    assert compress is not broken
    assert not os.path.exists("diffq-fx-compressed")


# folders of Hugging Face

WORDS = [f"w{number}" for number in range(60)]
BODY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 67,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def models(transformers, tmp_path_factory):
    """A folder with a BERT, a Llama, and texts of their words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")
    made = {
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**BODY)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**BODY, num_key_value_heads=1)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = np.random.default_rng(0)
    (folder / "texts.txt").write_text("\n\n".join(" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(60)))
    return folder


@pytest.fixture
def changed(models, tmp_path):
    """A copy of a model's folder, without some files and with others."""

    def make(name, without=(), **files):
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in (models / name).iterdir():
            if path.name not in without:
                (folder / path.name).write_bytes(path.read_bytes())
        for file, content in files.items():
            (folder / file.replace("_json", ".json")).write_text(content)
        return folder

    return make


def test_a_folder_gives_a_folder_that_from_pretrained_reads(models, transformers, monkeypatch):
    made, compress = [], diffq_fx.compress
    monkeypatch.setattr(diffq_fx, "compress", lambda *given, **more: made.append(compress(*given, **more)) or made[0])
    result = invoke(models / "bert", "--data", models / "texts.txt", "--out", "small", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"].keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("small")
    assert isinstance(loaded, transformers.BertForSequenceClassification)
    tokens = transformers.AutoTokenizer.from_pretrained("small")(WORDS[:5], return_tensors="pt")
    body = transformers.AutoModel.from_pretrained("small")
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).logits, made[0](**tokens).logits)
        assert torch.equal(body(**tokens).last_hidden_state, made[0].bert(**tokens).last_hidden_state)
    result = invoke("small", "--data", models / "texts.txt", "--out", "again")
    assert "'small' is quantized already, by diffq_fx. Give the folder of the float model." in result.stderr


def test_a_language_model_is_exported_without_its_cache(models):
    result = invoke(models / "llama", "--data", models / "texts.txt", "--out", "small", "--format", "onnx", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert os.listdir("small") == ["model.onnx"]


@pytest.fixture(scope="module")
def decoders(transformers, tmp_path_factory):
    """A function that gives the folder of a decoder whose rows are whole blocks, with a byte-level tokenizer; and texts."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    folder = tmp_path_factory.mktemp("decoders")
    letters = {letter: index for index, letter in enumerate(["<s>", "</s>", "Ġ", "Ċ", *map(chr, range(97, 123)), "th"])}
    tokens = Tokenizer(BPE(letters, [("t", "h")]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    (folder / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sizes = {**BODY, "hidden_size": 64, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 1}

    def make(name):
        if not (folder / name).exists():
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return make, folder / "texts.txt"


def test_a_decoder_as_a_file_for_llama_cpp(decoders):
    gguf = pytest.importorskip("gguf")
    make, texts = decoders
    result = invoke(make("Llama"), "--data", texts, "--out", "small", "--format", "gguf", "--report", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"].keys() == {"model.gguf", "report.html"}
    assert json.loads(result.stdout)["report"]["average_bits_in_all"] <= 5
    reader = gguf.GGUFReader("small/model.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} <= {"Q4_0", "Q5_0", "Q8_0", "F32"}
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    result = invoke(make("Llama"), "--data", texts, "--out", "smaller", "--format", "gguf", "--bits", 4, *QUICK)
    assert (result.exit_code, os.path.exists("smaller")) == (2, False)
    assert "target_bits=4" in result.stderr
    assert "Give a target between these" in result.stderr


def test_a_decoder_as_a_folder_for_onnxruntime_genai(decoders):
    runtime = pytest.importorskip("onnxruntime_genai")
    make, texts = decoders
    result = invoke(make("Llama"), "--data", texts, "--out", "small", "--format", "onnxruntime-genai", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= json.loads(result.stdout)["files"].keys()
    assert runtime.Tokenizer(runtime.Model("small")).encode("fox").tolist() == [9, 18, 27]


def test_what_a_runtime_cannot_hold_is_said_before_the_compression(decoders, models, monkeypatch):
    monkeypatch.setattr(diffq_fx, "compress", None)
    make, texts = decoders
    pytest.importorskip("gguf")
    cases = {
        (make("Olmo"), texts, "gguf"): "the architecture 'olmo' is not known, only 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3' are",
        (models / "llama", models / "texts.txt", "gguf"): "the tokenizer is a WordLevel, and a GGUF file of a decoder holds BPE alone",
    }
    if importlib.util.find_spec("onnxruntime_genai"):
        cases[make("GPTNeoX"), texts, "onnxruntime-genai"] = "the builder of onnxruntime-genai does not know 'gpt_neox.embed_in.weight'"
    for (folder, data, runtime), says in cases.items():
        result = invoke(folder, "--data", data, "--format", runtime)
        assert (result.exit_code, os.path.exists("diffq-fx-compressed")) == (2, False), result.exception
        assert says in result.stderr


def test_a_language_model_reads_windows_and_others_padded_texts(models, changed):
    from diffq_fx.integrations.hf_sources import batches_of, load_float

    texts, (llama, bert) = models / "texts.txt", (models / "llama", models / "bert")
    windows, told = batches_of(texts, load_float(llama), llama)
    assert told == f"{len(windows)} windows of 32 tokens"
    words = texts.read_text().split()
    assert torch.cat([window["input_ids"] for window in windows]).flatten().tolist() == [3 + int(w[1:]) for w in words[: 32 * len(windows)]]
    batches, told = batches_of(texts, load_float(bert), bert)
    assert told == "60 texts"
    assert [len(batch["input_ids"]) for batch in batches] == [7] * 8 + [4]
    assert all(int((batch["attention_mask"] == 0).sum()) == int((batch["input_ids"] == 0).sum()) for batch in batches)
    without = changed("bert")  # neither a token to pad with nor one that ends a text
    (without / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}))
    same, _ = batches_of(texts, load_float(bert), without)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(batches, same, strict=True) for name in one)
    np.save("ids.npy", np.arange(48, dtype=">i4").reshape(24, 2))
    rows, told = batches_of(Path("ids.npy"), load_float(bert), bert)
    assert told == "24 rows of input_ids"
    assert torch.cat([row["input_ids"] for row in rows]).flatten().tolist() == list(range(48))


def test_rows_of_inputs_take_the_place_of_texts(models, changed):
    folder = changed("bert", without=("tokenizer.json", "tokenizer_config.json"))
    save_file({"input_ids": torch.randint(67, (24, 7)).int(), "attention_mask": torch.ones(24, 7, dtype=torch.bool)}, "ids.safetensors")
    result = invoke(folder, "--data", "ids.safetensors", "--format", "packed", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "inputs: 24 rows of input_ids, attention_mask" in result.stdout
    result = invoke(folder, "--data", models / "texts.txt", "--out", "other")
    assert "found config.json, model.safetensors. Put the tokenizer's files there, or give --data as .safetensors or .npy" in result.stderr


def test_the_folder_that_is_read_is_not_written_to(models, changed, tmp_path):
    folder = changed("bert")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", folder / ".." / folder.name):
        result = invoke(folder, "--data", models / "texts.txt", "--out", out)
        assert result.exit_code == 2
        assert "is the same file as" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def spoiled_config(**changes):
    return lambda config: json.dumps({**config, **changes})


CONFIGS = {
    "no architecture of transformers": (spoiled_config(architectures=["MyOwn"]), "names the architecture 'MyOwn', which transformers"),
    "no model": (spoiled_config(architectures=["Trainer"]), "names the architecture 'Trainer', which transformers"),
    "another type": (spoiled_config(model_type="mine"), "is no config of transformers"),
    "not JSON": (lambda config: "{nonsense", "is no config of transformers"),
    "another class": (spoiled_config(architectures=["BertForMaskedLM"]), "lacks weights of a BertForMaskedLM: 'cls."),
    "other shapes": (spoiled_config(hidden_size=32), "transformers cannot load"),
    "quantized": (spoiled_config(quantization_config={"quant_method": "awq"}), "is quantized already, by awq"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_wrong(name, models, changed):
    spoil, message = CONFIGS[name]
    folder = changed("bert", config_json=spoil(json.loads((models / "bert" / "config.json").read_text())))
    result = invoke(folder, "--data", models / "texts.txt")
    assert result.exit_code == 2, result.exception
    assert message in result.stderr


def test_a_folder_that_is_no_model_or_a_pickle_alone(models, changed):
    os.mkdir("nothing")
    assert "'nothing' is not a Hugging Face folder: it has no config.json" in invoke("nothing", "--data", models / "texts.txt").stderr
    folder = changed("bert", without=("model.safetensors",))
    assert "needs its weights as *.safetensors, found none" in invoke(folder, "--data", models / "texts.txt").stderr
    torch.save({}, folder / "pytorch_model.bin")
    assert "found pytorch_model.bin alone, and a pickle can run code" in invoke(folder, "--data", models / "texts.txt").stderr
    assert "says nothing of the model's inputs: give --data" in invoke(folder).stderr


def test_data_that_is_wrong(models, changed):
    (short, empty, binary) = (models.parent / name for name in ("short.txt", "empty.txt", "binary"))
    short.write_text("w1 w2\n" * 7)
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\0\1")
    save_file({"input_ids": torch.zeros(24, 7), "attention_mask": torch.ones(23, 7)}, uneven := models.parent / "uneven.safetensors")
    np.save(few := models.parent / "few.npy", np.zeros((3, 7), np.int64))
    np.save(words := models.parent / "words.npy", np.full((8, 7), "w1"))
    (cut := models.parent / "cut.safetensors").write_bytes(uneven.read_bytes()[:-8])
    cases = {
        ("bert", short): "is too short: 7 lines of text, and 8 are the least",
        ("llama", short): "is too short: 14 tokens, and 256 are the least",
        ("bert", empty): "holds no text",
        ("bert", binary): "is neither a text in UTF-8 nor a .safetensors or .npy file",
        ("bert", models.parent / "nothing.txt"): "cannot be read: No such file or directory",
        ("bert", uneven): "every tensor needs as many rows as the others, 8 or more; found attention_mask 23, input_ids 24",
        ("bert", few): "8 or more; found input_ids 3",
        ("bert", words): "words.npy' cannot be read: can't convert np.ndarray of type numpy.str_",
        ("bert", cut): "cut.safetensors' cannot be read: Error while deserializing header",
    }
    for (name, data), message in cases.items():
        result = invoke(models / name, "--data", data)
        assert result.exit_code == 2, result.exception
        assert message in result.stderr


def test_a_tokenizer_with_more_tokens_than_the_model(models, changed, transformers):
    folder = changed("llama", without=("model.safetensors",))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BODY | {"vocab_size": 40}, num_key_value_heads=1)).save_pretrained(folder)
    result = invoke(folder, "--data", models / "texts.txt")
    assert (result.exit_code, os.path.exists("diffq-fx-compressed")) == (2, False)
    assert "gives the token 62 and the model has 40: it is another model's tokenizer." in result.stderr


def test_a_text_does_not_say_what_a_decoder_reads(models, changed, transformers):
    folder = changed("bert", without=("config.json", "model.safetensors"))
    config = transformers.T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    assert "give --data as .safetensors with input_ids and decoder_input_ids" in invoke(folder, "--data", models / "texts.txt").stderr


def test_without_transformers_its_extra_is_named(models, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "diffq_fx.integrations.hf_sources", raising=False)
    assert "pip install 'diffq-fx[transformers]'" in invoke(models / "bert", "--data", models / "texts.txt").stderr
