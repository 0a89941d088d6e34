"""The fused engine computes forward and backward of Llama-like decoders by hand-written code.

It computes what the reference engine computes, with the same parameters: Transformers owns the model, bitsandbytes the
4-bit weights, PEFT the adapters; all are read in place. Four modules make it fast: adapters are computed within the
large products (`group`), blocks save the activations that the placement keeps (`block`, `policy`), attention stays
within documents and takes the fastest backend (`attention`), and element-wise work is fused (`veneer.kernels`).
`decoder` decides which models are covered.
"""
