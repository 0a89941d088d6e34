"""llama.cpp's server on a GGUF file, as a process of its own: `python -m veneer.release.certify.llama_server SETTINGS`.

llama.cpp is native code that ends its process where a file of a stranger breaks one of its assertions; here that costs
this process and is a message of the one that began it (servers.py). The address is written to standard output, and the
server ends with its standard input, so that it never outlives who began it.
"""

import json
import os
import sys
from typing import Any


def main(asked: dict[str, Any]) -> int:
    """Serve until standard input ends. Keys of `asked`: file, context (tokens of a slot), slots, lora."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = asked["file"]
    settings.n_ctx, settings.n_parallel = asked["context"] * asked["slots"], asked["slots"]
    settings.warmup, settings.ui, settings.verbosity = False, False, 1
    settings.use_jinja, settings.endpoint_slots = True, True
    settings.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    if asked["lora"] is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    sys.stdout.flush()
    os._exit(0)  # nothing is to be kept, and to let a server go takes a second


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
