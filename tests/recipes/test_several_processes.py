"""Each recipe by torchrun, with two processes and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_data import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_and_finish(tmp_path, name):
    options = [*RECIPES[name][1](tmp_path), "--smoke", "--no-onnx", "--data", tmp_path, "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", f"recipes.{name}", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(each) for each in command], check=True, cwd=ROOT, env=environment)
    result = json.loads((tmp_path / "run" / "smoke" / "result.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 2)
