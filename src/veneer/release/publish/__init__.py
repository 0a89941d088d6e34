"""An adapter or a merged model on a hub.

card.py       README.md of an adapter, with the Hub's metadata
vllm_lint.py  what vLLM takes as a LoRA adapter
push.py       the upload
"""
