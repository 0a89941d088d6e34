"""Release of a tuned model: passport, card, merge, GGUF, upload, and the certificate that they are what was trained.

weights.py   safetensors read and written with one tensor in memory at a time
passport.py  passport.json of an adapter: what it belongs to
output.py    a folder to be written, checked before any work
redact.py    what of a run's files may leave the machine
merge/       base and adapter as one model on disk; and the inverse
gguf/        the same as one GGUF file, or the adapter alone
certify/     the proof that an artifact answers as the model that was judged
publish/     the model card, and the upload
"""
