"""Everything that writes: killed at a random moment, on a full disk, in a read-only folder, two processes at once, in a forked process.

The file is then the old one or the new one, whole; whoever could not write says so in one sentence. packed/test_packed_writing.py has more of
save_packed, cli/test_compress_command.py of folders.
"""

import functools
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from children import code_of, in_child
from torch import nn

from diffq_fx import bits_report, convert, prepare
from diffq_fx.export import export_onnx, save_packed
from diffq_fx.export.packed.state_dicts import pack_state_dict, unpack_state_dict
from diffq_fx.methods import STE

X = torch.randn(1, 64)


def model_of(seed):
    torch.manual_seed(seed)
    return convert(prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), X, STE(bits=4 + seed))).eval()


MODELS = [model_of(0), model_of(1)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A packed file and a float state dict of each model."""
    folder = tmp_path_factory.mktemp("sources")
    folder.chmod(0o755)
    for which, model in enumerate(MODELS):
        unpack_state_dict(save_packed(model, folder / f"packed{which}"), folder / f"float{which}")
    return folder


@functools.cache
def decoder_of(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    method = STE(bits=4, group_size=32, grid="symmetric", scale_dtype="float16")
    return convert(prepare(model, {"input_ids": torch.arange(8)[None]}, method))


def write_gguf(which, path, _):
    pytest.importorskip("gguf")
    from diffq_fx.export.gguf import export_gguf

    export_gguf(decoder_of(which), path, tokenizer=None)


WRITERS = {
    "save_packed": lambda which, path, _: save_packed(MODELS[which], path),
    "export_onnx": lambda which, path, _: export_onnx(MODELS[which], X, path, verify=False),
    "unpack": lambda which, path, sources: unpack_state_dict(sources / f"packed{which}", path),
    "pack": lambda which, path, sources: pack_state_dict(sources / f"float{which}", path, bits=5, group_size="channel"),
    "export_gguf": write_gguf,
    "page": lambda which, path, _: bits_report(MODELS[which]).save_page(path),
}
OURS = ".diffq_fx."


@pytest.fixture(scope="module", params=WRITERS)
def writer(request, sources, tmp_path_factory):
    """A writer, and what it writes of each model."""
    write, path = WRITERS[request.param], tmp_path_factory.mktemp("once") / "m"
    contents = []
    for which in (0, 1):
        write(which, path, sources)
        contents.append(path.read_bytes())
    assert contents[0] != contents[1]
    return (lambda which, path: write(which, path, sources)), contents


@pytest.fixture
def written(writer, tmp_path):
    """A function that writes the file of one of the models, the file with the second in it, and what it may hold."""
    path = tmp_path / "m"
    path.write_bytes(writer[1][1])
    return (lambda which: writer[0](which, path)), path, writer[1]


def test_killed(written):
    write, path, contents = written
    start, draw = time.monotonic(), random.Random(0)
    write(0)
    once = time.monotonic() - start
    for _ in range(3):
        pid = in_child(lambda: [write(turn % 2) for turn in range(1000)])
        time.sleep(once * draw.uniform(0.3, 4))
        os.kill(pid, signal.SIGKILL)
        assert code_of(pid) == -signal.SIGKILL
        assert path.read_bytes() in contents
    assert all(each == path or each.name.startswith(OURS) for each in path.parent.iterdir())


def test_full_disk(written):
    write, path, contents = written

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        write(0)

    assert code_of(in_child(limited)) == 7
    assert path.read_bytes() == contents[1]
    assert os.listdir(path.parent) == [path.name]


def test_read_only_folder(written, tmp_path_factory):
    write, path, contents = written
    base = tmp_path_factory.getbasetemp()

    def as_nobody():
        if os.geteuid() == 0:  # root may write anywhere
            os.setegid(65534)
            os.seteuid(65534)
        write(0)

    shared = Path(tempfile.gettempdir())
    for folder in (*base.iterdir(), base, *(each for each in base.parents if shared in each.parents)):  # the sources lie beside
        if folder.is_dir():
            folder.chmod(0o755)
    path.parent.chmod(0o555)
    try:
        assert code_of(in_child(as_nobody)) == 7
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == contents[1]


def test_two_processes(written):
    write, path, contents = written
    pids = [in_child(lambda which=which: [write(which) for _ in range(3)]) for which in (0, 1)]
    assert [code_of(pid) for pid in pids] == [0, 0]
    assert path.read_bytes() in contents
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupt_in_an_export_leaves_the_old_file_and_the_model(tmp_path, monkeypatch):
    path, model = tmp_path / "m.onnx", MODELS[0].train()
    export_onnx(MODELS[1], X, path, verify=False)
    old, state = path.read_bytes(), {name: value.clone() for name, value in model.state_dict().items()}
    for place in ("export.onnx.pipeline.Tracer.trace", "export.onnx.pipeline.check_parity", "export.onnx.saving.put_in_place"):
        with monkeypatch.context() as patch:
            patch.setattr(f"diffq_fx.{place}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                export_onnx(model, X, path)
        assert (path.read_bytes(), os.listdir(tmp_path), model.training) == (old, ["m.onnx"], True)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()


def interrupt(*_, **__):
    raise KeyboardInterrupt
