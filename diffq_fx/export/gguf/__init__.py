"""GGUF files for llama.cpp and what is built on it, with the model's own levels. Needs the package gguf.

``blocks`` has the types that hold levels exactly, ``architectures`` what is known of decoders, ``vocabulary`` the tokenizer, and
``gguf_file`` the whole.
"""

from diffq_fx.errors import missing

try:
    import gguf as _gguf  # noqa: F401
except ImportError as error:
    raise missing("gguf", error) from error

from diffq_fx.export.gguf.gguf_file import GGUFResult, GGUFTensor, export_gguf
from diffq_fx.export.gguf.gguf_file import refuse_unknown as refuse_unknown  # for the command line

__all__ = ["GGUFResult", "GGUFTensor", "export_gguf"]
