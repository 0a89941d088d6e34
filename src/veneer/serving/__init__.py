"""Serving: an OpenAI-compatible server of many adapters over one base, on the machine at hand.

One thread owns the model and makes a token for every answer at a time; requests join and leave between tokens. Rows of
different adapters share a pass: the base is computed once for all, and each row adds its own adapter's delta. A prompt
is rendered by the same code as in training, so that what is served is what was trained and evaluated.

generation.py    one answer while it is made, and what it tells who asked for it
scheduler.py     the thread that owns the model: queue, admission, steps, cancelled and late answers
batch.py         keys and values of all answers: prompts are read, and a token is made for each answer
prefix_cache.py  keys and values of prompts that were read before, by their tokens and their adapter
mixed.py         low-rank deltas of many adapters in one batch, each row its own
adapter_file.py  an adapter's matrices from its folder; what cannot share a base
adapters.py      which models are served, by name: loaded, replaced and unloaded while it serves
watch.py         adapters of a folder that come and go
sampling.py      how each row's next token is chosen
grammar.py       JSON and JSON schemas, by llguidance
detokenize.py    text from tokens as they come, and texts that end an answer
tool_calls.py    calls in the form that the template writes them
protocol.py      requests in OpenAI's form
replies.py       replies in OpenAI's form, whole and streamed
app.py           the routes;  guard.py  what is checked before a route: key, address, size;  address.py  where to listen
errors.py        refusals in OpenAI's form;  limits.py  the limits;  metrics.py  figures for Prometheus
page.html        a page that asks models side by side
server.py        all of it put together and run
vllm.py          the same adapters for vLLM: what it accepts, and its command;  gguf.py  a GGUF file by llama.cpp

Models whose caches are not plain keys and values of all tokens (sliding windows, recurrent states) are served a row at
a time within each step. Adapters that are more than low-rank matrices on linear layers are served alone, or merged.
"""
