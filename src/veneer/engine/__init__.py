"""One interface, several engines: a packed batch in, summed loss out, gradients left in the adapter.

`reference` runs any architecture that Transformers knows. `fused` takes the same batches, is faster where it covers the
model, and must give the same numbers: `agreement` compares them, and `choose` decides which one a run gets;
`placement` says where the tensors of a step are.
"""
