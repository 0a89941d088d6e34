"""The model card of an adapter: README.md, with the Hub's metadata."""

from pathlib import Path
from typing import Any

import yaml

from veneer.config.folder import write_text
from veneer.release.passport import write_passport
from veneer.train.job import TrainingJob

CARD = """\
---
{metadata}---

# {name}

A LoRA adapter for `{base}`, trained with Veneer. `passport.json` says what it belongs to, `ledger.json` what it
was trained on.

| | |
|---|---|
| rank, alpha | {r}, {alpha} |
| trained parameters | {trainable:,} of {total:,} |
| base weights | {weights} |
| training rows, trained tokens | {rows:,}, {tokens:,} |
| steps, final loss | {steps}, {loss:.4f} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
base = AutoModelForCausalLM.from_pretrained("{load}", dtype="auto")
model = PeftModel.from_pretrained(base, "ADAPTER")
```
{where}"""

WHERE = """
`BASE` is the folder that Veneer keeps of `{base}`; this prints it:

```python
from veneer.config import Model
from veneer.model import locate

print(locate(Model(base="{base}")).location)
```
"""


def write_card(job: TrainingJob, folder: Path, steps: int, final_loss: float) -> None:
    """Write README.md and passport.json into an adapter's folder."""
    run, ledger = job.run, job.data.ledger
    is_plain = job.source.kind in ("hub", "folder")
    facts: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "veneer"],
    }
    if job.source.kind == "hub":
        facts["base_model"] = run.model.base
    card = CARD.format(
        metadata=yaml.safe_dump(facts, sort_keys=False),
        name=job.folder.path.name,
        base=run.model.base,
        r=run.adapter.r,
        alpha=run.adapter.lora_alpha,
        trainable=job.parameters["trainable"],
        total=job.parameters["total"],
        weights=f"{run.quantization.quant_type}, 4 bits" if run.quantization else "16 bits or more",
        rows=ledger.rows["training"],
        tokens=ledger.tokens["trained"],
        steps=steps,
        loss=final_loss,
        load=run.model.base if is_plain else "BASE",
        where="" if is_plain else WHERE.format(base=run.model.base),
    )
    write_text(folder / "README.md", card)
    write_passport(job, folder)
