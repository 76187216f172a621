"""Each recipe from a command: two steps, killed after the first, resumed, converted, packed, exported, and the row of its result."""

import pytest
from recipe_data import RECIPES

from recipes.common.main import main
from recipes.table import table


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_of_it_from_a_command(tmp_path, name):
    recipe, make = RECIPES[name]
    options = make(tmp_path)
    result = main(recipe, ["--smoke", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    assert (result["resumed_at"], result["steps"]) == (1, 2)
    assert result["onnx"]["score"] == pytest.approx(result["score"], rel=1e-3)
    assert result["size_mib"] < result["float_mib"] / 3
    row = table([result]).splitlines()[2]
    assert row.startswith(f"| {name} | {result['model']} | diffq | ")
    assert f"{result['packed']['mib']:.3f}" in row
