"""The extension of the kernels: chosen by processor and environment, done without where it is not built, and in every wheel and sdist."""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks._noise_of_steps import add_noise
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import extension, native

VARIANTS = extension.variants()
built = pytest.mark.skipif(not VARIANTS, reason="the kernels are not built")
in_one_process = pytest.mark.xdist_group("wheels")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch):
    """Chosen anew, as in a new process."""
    monkeypatch.delenv("DIFFQ_FX_KERNELS", raising=False)
    monkeypatch.setattr(extension, "kernels", extension.kernels.__wrapped__)
    return extension.kernels


@built
def test_the_fastest_variant_is_taken_unless_the_environment_names_another(fresh, monkeypatch):
    assert vars(fresh()) == next(iter(VARIANTS.values()))
    for name, functions in VARIANTS.items():
        monkeypatch.setenv("DIFFQ_FX_KERNELS", name)
        assert vars(fresh()) == functions
    assert list(VARIANTS)[-1] == "baseline"


def test_the_environment_can_ask_for_torch_but_not_for_what_is_not_there(fresh, monkeypatch):
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "torch")
    assert fresh() is None
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match='DIFFQ_FX_KERNELS must be "native", "torch" or a variant of the kernels for this processor .*, got \'cuda\''
    ):
        fresh()


def test_without_the_extension_torch_does_it(fresh, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "diffq_fx.kernels._kernels", None)
    monkeypatch.delattr("diffq_fx.kernels._kernels", raising=False)
    with caplog.at_level(logging.INFO, "diffq_fx"):
        assert fresh() is None
    assert "torch's slower operations do the work of the kernels in C" in caplog.text
    assert add_noise(torch.zeros(4, 8), torch.ones(4, 1), axis=0, block=8).abs().max() < 0.5
    with pytest.raises(RuntimeError, match="the kernels in C, which this work was begun with, are no longer there"):
        extension.loaded()
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "avx2")
    with pytest.raises(ValueError, match=r"for this processor \(none is built\), got 'avx2'"):
        fresh()


@built
def test_nothing_is_written_or_started_and_no_home_is_needed(fresh, monkeypatch, tmp_path):
    """A container: no HOME, no entry in passwd, and no folder that can be written to."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: pytest.fail("asked for a home folder"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    monkeypatch.chdir(tmp_path)
    assert fresh() is not None
    assert add_noise(torch.zeros(4, 8), torch.ones(4, 1), axis=0, block=8).abs().max() < 0.5
    assert list(tmp_path.iterdir()) == []


@built
def test_a_kernel_takes_the_arguments_that_it_has():
    kernels = next(iter(VARIANTS.values()))
    with pytest.raises(TypeError, match="the kernel moments takes 5 arguments, got 2"):
        kernels["moments"](1, 2)
    with pytest.raises(TypeError):
        kernels["moments"](1.5, 2, 3, 4, 5)
    with pytest.raises(TypeError):
        kernels["size"](1, 2, 3, 4, 5, "6", 7, 8, 9)


@built
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("group_size", ["tensor", "channel", 1, 8, 17, 64])
def test_what_files_hold_is_bit_by_bit_the_same_on_every_processor(name, group_size, monkeypatch):
    rows, columns = 30, 1003
    weight, layout = torch.randn(rows, columns), GroupLayout.of(rows, columns, group_size)
    scale = torch.rand(3, *layout.shape) / 4 + 1e-3
    zero_point, top = torch.full_like(scale, 7.0), torch.full(layout.shape, 15.0)
    zero_point[:, ::2] = 7.5
    importance = torch.rand(columns)
    by_row = GroupLayout.of(rows, columns, "channel") if group_size == "tensor" else layout
    found = []
    for kernels in (VARIANTS[name], VARIANTS["baseline"]):
        monkeypatch.setattr(extension, "kernels", lambda kernels=kernels: SimpleNamespace(**kernels))
        found.append(
            (
                native.statistics(weight, by_row),
                native.rounding_errors(weight, None, scale, zero_point, top, layout),
                native.rounding_errors(weight, importance[None], scale, zero_point, top, layout),
                native.rounding_errors(weight, weight.abs(), scale, zero_point, top, layout),
                native.round_to_grid(weight, scale[0], zero_point[0], top, layout),
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    steps, middle = layout.expand(scale[0]), layout.expand(zero_point[0])
    by_torch = ((torch.round(weight / steps + middle % 1) + middle.floor()).clamp(0, 15) - middle) * steps
    torch.testing.assert_close(found[0][4], by_torch, rtol=0, atol=0)


def run(*command, **environment):
    found = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        cwd="/",  # where no diffq_fx is found but the one that is meant
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What `python -m build --sdist` makes, from a copy, since a build leaves its folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "diffq_fx", source / "diffq_fx", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=source, check=True, capture_output=True)
    (made,) = (source / "dist").iterdir()
    return made


def wheel_of(sdist, folder, **environment):
    run("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist, **environment)
    (wheel,) = folder.iterdir()
    return wheel


@in_one_process
def test_the_sdist_has_all_sources_of_the_kernels(sdist):
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {path.relative_to(ROOT) for path in (ROOT / "diffq_fx").rglob("*.[ch]")} <= names


@built
@in_one_process
@pytest.mark.slow
def test_a_wheel_from_the_sdist_brings_the_kernels_for_every_python(sdist, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "wheels")
    if sys.implementation.name == "cpython" and "t" not in sys.abiflags:
        assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".c", ".h"))]
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    code = "from diffq_fx.kernels import extension, _kernels; print(_kernels.__file__, *extension.variants())"
    place, *variants = run("-c", code, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(place).is_relative_to(tmp_path / "site")
    assert variants == list(VARIANTS)


@in_one_process
@pytest.mark.parametrize(("environment", "tag"), [({"DIFFQ_FX_KERNELS": "torch"}, "py3-none-any"), ({"CC": "false"}, "")])
def test_a_wheel_without_the_kernels(sdist, tmp_path, environment, tag):
    wheel = wheel_of(sdist, tmp_path / "wheels", **environment)
    assert tag in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "diffq_fx/kernels/extension.py" in names
    assert not [name for name in names if name.endswith(".so")]
