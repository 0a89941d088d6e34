"""One interface, several engines: they take a packed batch, return its summed loss, and add to the adapter's gradients.

`reference` runs any architecture that Transformers knows. `fused` takes the same batches, is faster where it covers the
model, and must give the same numbers: `agreement` compares them, and `choose` decides which one a run gets;
`placement` describes where the tensors of a step are held.
"""
