"""One interface, several engines: a packed batch in, summed loss out, gradients left in the adapter.

`reference` runs any architecture that Transformers knows. Faster engines take the same batches and must give the
same numbers.
"""

from veneer.engine.interface import Engine
from veneer.engine.reference import ReferenceEngine

__all__ = ["Engine", "ReferenceEngine"]
