"""Models for llama.cpp and Ollama.

export.py      base and adapter as one GGUF file, or the adapter alone
tensor_layout.py  names, numbers and layouts of a model in llama.cpp
tokenizer.py   a Transformers tokenizer in GGUF's keys
types.py       the type of each tensor, and its bytes in it
importance.py  which input columns the run's own rows drive hard, for types of few bits
modelfile.py   template and stop tokens for Ollama
"""
