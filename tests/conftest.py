"""What every test shares: a seed, and a few small models."""

import pytest
import torch

torch.set_num_threads(1)  # the test runner itself uses all cores


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TOO_OLD_TO_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip, with the sentence that users read, what this torch is too old to export."""
    try:
        return (yield)
    except BaseException as error:  # pytest.raises and pytest.warns fail with one of their own
        if TOO_OLD_TO_EXPORT and any("export_onnx: needs torch" in str(each) for each in (error, error.__context__)):
            pytest.skip(f"export_onnx needs torch 2.9, this is {torch.__version__}")
        raise
