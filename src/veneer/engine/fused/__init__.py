"""The fused engine: decoders of the Llama kind, forward and backward by hand.

It computes what the reference engine computes, with the same parameters: Transformers owns the model, bitsandbytes the
4-bit weights, PEFT the adapters; all are read in place. What makes it fast is in four places: the adapter rides in the
large products (`group`), a block keeps what the placement says (`block`, `policy`), attention stays within documents
and goes to the fastest backend (`attention`), and what lies between is fused (`veneer.kernels`). `decoder` says what is
covered.
"""
