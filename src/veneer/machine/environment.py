"""Says with what a file was made: versions and platform."""

import platform
from typing import Any

import veneer
from veneer.config.versions import version_of

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers", "numpy")


def environment() -> dict[str, Any]:
    """Return versions and platform, for files that ship: no kernel's release, which can carry a host's name."""
    versions = {name: version_of(name) for name in LIBRARIES} | {"veneer": veneer.__version__}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": versions,
    }
