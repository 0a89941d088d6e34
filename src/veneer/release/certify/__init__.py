"""The certificate compares an artifact with the model that was evaluated.

certificate.py      the certificate: every check, and the verdict
artifact.py         what is to be certified, found by name
judged.py           the model that a run was judged by, and what it answered
prompts.py          what a certificate asks
runtimes.py         an artifact as its users run it: a folder
servers.py          the same behind HTTP: an OpenAI-compatible server;  llama_server.py  llama.cpp's, as a process
client.py           a server that is asked for JSON, with a key and again where it is busy;  transport.py  one request
checks.py           checks that need no second model
settings.py         settings that change answers and stand in no weight
compare_weights.py  an artifact's tensors against what they should be
diagnose.py         why an artifact makes other tokens
verdict.py          the task's score, row by row against what was judged
agreement.py        next tokens against the judged model's, rounding aside
answers.py          answers of a GGUF file for the rows of an evaluation
best_base.py        which base a QLoRA adapter is merged into, by what it answers
"""
