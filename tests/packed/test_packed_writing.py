"""A save is whole or it did not happen: killed processes, full disks, read-only places, two writers."""

import errno
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from packed_models import assert_equal, converted, expected, store

from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed

KILLS = 8


def model_of(seed):
    return converted(store("w", (200, 400), seed=seed), store("v", (64, 64), group=8, seed=seed), step=torch.tensor(seed))


def in_child(function):
    """Run a function in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    finally:
        os._exit(1)


def test_a_killed_save_leaves_the_old_or_the_new_file(tmp_path):
    path, models = tmp_path / "m.safetensors", [model_of(1), model_of(2)]
    wanted = [expected(model) for model in models]
    save_packed(models[0], path)
    start = time.monotonic()
    save_packed(models[0], path)
    one_save = time.monotonic() - start

    def save_for_ever():
        for turn in range(10**6):
            save_packed(models[turn % 2], path)

    seen, clock = set(), random.Random(0)
    for _ in range(KILLS):
        pid = in_child(save_for_ever)
        time.sleep(one_save * clock.uniform(0.5, 10))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = load_packed(path)
        assert_equal(found, wanted[int(found["step"]) - 1])
        seen.add(path.stat().st_mtime_ns)  # file systems give out the numbers of gone files again
    assert len(seen) > 1, "no save was finished: the test shows nothing"
    strays = [p for p in tmp_path.iterdir() if p != path]
    assert all(p.name.startswith(".diffq_fx.") for p in strays)


def test_two_processes_may_save_to_one_path(tmp_path):
    path, models = tmp_path / "m.safetensors", [model_of(1), model_of(2)]
    pids = [in_child(lambda model=model: [save_packed(model, path) for _ in range(10)]) for model in models]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    found = load_packed(path)
    assert_equal(found, expected(models[int(found["step"]) - 1]))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path, old, new = tmp_path / "m.safetensors", model_of(1), model_of(2)
    save_packed(old, path)

    def save_with_a_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_packed(new, path)
        except PackedFileError as error:
            os._exit(7 if f"save_packed: cannot write '{path}': File too large." in str(error) else 8)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(save_with_a_limit), 0)[1]) == 7
    assert_equal(load_packed(path), expected(old))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_every_system_call_may_fail(tmp_path, monkeypatch, call, code):
    path, old = tmp_path / "m.safetensors", model_of(1)
    save_packed(old, path)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"diffq_fx.atomic.os.{call}", fail)
        with pytest.raises(PackedFileError, match=rf"save_packed: cannot write '.*m\.safetensors': {os.strerror(code)}\."):
            save_packed(model_of(2), path)
    assert_equal(load_packed(path), expected(old))
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_draft(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffq_fx.atomic.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_packed(model_of(1), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    model = model_of(1)
    with pytest.raises(PackedFileError, match="cannot write '.*': it is a folder"):
        save_packed(model, tmp_path)
    with pytest.raises(PackedFileError, match="cannot write '.*missing/m.safetensors': No such file or directory"):
        save_packed(model, tmp_path / "missing" / "m.safetensors")
    path = save_packed(model, tmp_path / "m.safetensors")
    monkeypatch.setattr("diffq_fx.atomic.os.access", lambda *_: False)  # root may write anything
    with pytest.raises(PackedFileError, match="cannot write '.*': the file is read-only"):
        save_packed(model, path)


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackedFileError, match="cannot write '.*': it is no regular file"):
        save_packed(model_of(1), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_read_only_folder():
    folder = Path(tempfile.mkdtemp())  # every user may reach it, unlike pytest's own

    def save():
        if os.geteuid() == 0:  # root may write to a read-only folder
            os.setuid(65534)
        try:
            save_packed(model_of(1), folder / "m.safetensors")
        except PackedFileError as error:
            os._exit(7 if "m.safetensors': Permission denied." in str(error) else 8)

    try:
        folder.chmod(0o555)
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(save), 0)[1]) == 7
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_permissions_and_links_are_kept(tmp_path):
    mask = os.umask(0o022)
    try:
        path = save_packed(model_of(1), tmp_path / "m.safetensors")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o640)
        link = tmp_path / "link.safetensors"
        link.symlink_to(path)
        save_packed(model_of(2), link)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert_equal(load_packed(path), expected(model_of(2)))
