"""Systems that compress the float model without training it and without labels."""

from benchmarks.frontier.job import System
from benchmarks.frontier.post_training.auto_round import AUTO_ROUND
from benchmarks.frontier.post_training.gptq import GPTQ
from benchmarks.frontier.post_training.onnx_files import ONNX_FILES
from benchmarks.frontier.post_training.ours import OURS_POST_TRAINING
from benchmarks.frontier.post_training.quantizers import QUANTIZERS

POST_TRAINING: dict[str, System] = {**ONNX_FILES, **OURS_POST_TRAINING, **QUANTIZERS, **GPTQ, **AUTO_ROUND}
