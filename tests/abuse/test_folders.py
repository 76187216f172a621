"""Folders of Hugging Face: ours are whole or not there; one that transformers was killed in writing gives the model of one save, or an error."""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from children import code_of, in_child

pytest.importorskip("torchao")
pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer, models
from torchao.quantization import quantize_

from diffq_fx import convert, prepare
from diffq_fx.integrations.olive import save_olive
from diffq_fx.integrations.torchao import QATConfig, whole_model
from diffq_fx.methods import STE

BODY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = {"input_ids": torch.arange(14).view(2, 7)}


def decoder(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **BODY)).eval()


def converted(seed):
    return convert(prepare(decoder(seed), IDS, STE(bits=4 + seed)))


def of_torchao(seed):
    model = decoder(seed)
    for config in (QATConfig(STE(bits=4 + seed), IDS, step="prepare"), QATConfig(step="convert")):
        quantize_(model, config, whole_model)
    return model


@pytest.fixture(scope="module", params=[converted, of_torchao])
def saved(request, tmp_path_factory):
    """A kind of model, two folders of it, and the logits of each."""
    folders, logits = [tmp_path_factory.mktemp("saved") for _ in range(2)], []
    for seed, folder in enumerate(folders):
        model = request.param(seed)
        model.save_pretrained(folder)
        logits.append(logits_of(model))
    assert not torch.equal(*logits)
    return request.param, folders, logits


@torch.no_grad()
def logits_of(model):
    return model(**IDS).logits


def one_of(folder, logits):
    """Whether a model comes out of a folder, which is then one of those that were saved."""
    try:
        found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder))
    except Exception:  # noqa: BLE001  whatever transformers, torchao and safetensors raise for a file that is cut off
        return False
    assert any(torch.equal(found, each) for each in logits)
    return True


def test_what_a_killed_save_may_leave_is_one_of_the_models_or_an_error(saved, tmp_path):
    _, (old, new), logits = saved
    sizes = {path.name: path.stat().st_size for path in new.iterdir()}
    left = [
        (name, size) for name in ("config.json", "model.safetensors") for size in (None, 0, sizes[name] // 2, sizes[name] - 3)
    ]  # the last is a newline
    assert one_of(new, logits)
    for number, (name, size) in enumerate(left):
        folder = shutil.copytree(new, tmp_path / str(number))
        if size is None:
            (folder / name).unlink()
        else:
            os.truncate(folder / name, size)
        assert not one_of(folder, logits), (name, size)
    mixed = shutil.copytree(new, tmp_path / "mixed")
    shutil.copy(old / "model.safetensors", mixed)  # transformers writes the config first
    one_of(mixed, logits)


def test_killed_while_transformers_saves(saved, tmp_path):
    make, _, logits = saved
    own, folder, draw = [make(0), make(1)], tmp_path / "m", random.Random(0)
    start = time.monotonic()
    own[0].save_pretrained(folder)
    once = time.monotonic() - start
    for _ in range(2):
        if not (pid := os.fork()):
            try:
                for turn in range(1000):
                    own[turn % 2].save_pretrained(folder)
            finally:
                os._exit(1)
        time.sleep(once * draw.uniform(0.5, 4))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        one_of(folder, logits)


@pytest.fixture(scope="module")
def olive():
    """A function that writes a folder for Olive."""
    words = {f"t{index}": index for index in range(62)} | {"<s>": 62, "</s>": 63}
    tokens = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    model = converted(0)
    return lambda folder: save_olive(model, folder, tokenizer)


def test_a_folder_for_olive_is_whole_or_not_there(olive, tmp_path, monkeypatch):
    start = time.monotonic()
    olive(tmp_path / "once")
    once, draw = time.monotonic() - start, random.Random(0)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    assert json.loads(whole["config.json"])["quantization_config"]["quant_method"] == "olive"

    def write_many():
        for number in range(1000):
            olive(tmp_path / f"m{number}")

    for _ in range(3):
        pid = in_child(write_many)
        time.sleep(once * draw.uniform(0.3, 3))
        os.kill(pid, signal.SIGKILL)
        assert code_of(pid) == -signal.SIGKILL
        for folder in tmp_path.glob("m*"):
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
            shutil.rmtree(folder)

    def on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        olive(tmp_path / "m")

    assert code_of(in_child(on_a_full_disk)) == 7
    two = [in_child(lambda: olive(tmp_path / "both")) for _ in range(2)]
    assert 0 in [code_of(pid) for pid in two]
    assert {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()} == whole

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place in ("diffq_fx.integrations.olive.save_file", "diffq_fx.atomic.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                olive(tmp_path / "m")
    assert not (tmp_path / "m").exists()
