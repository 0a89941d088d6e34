"""DPO of TRL or Unsloth at 8B shapes, as bench/prefer.py runs it in a process of its own: prints a JSON line.

The same pairs and settings as Veneer's: NF4 with double quantization, r = 16, 8-bit AdamW, 4 pairs x 2, max_length
2,048, reference by the base without its adapter (the adapter begins at zero). Both recompute activations, as their
documents advise. Needs trl, datasets and, for its own side, unsloth.

    python3 -m bench.prefer_peers trl work /tmp/base-8b
"""

import argparse
import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, SKIPPED = 6, 2
END = "<|im_end|>\n"


def load(who: str, folder: Path) -> tuple[Any, Any]:
    """Model with its adapter, and tokenizer."""
    import torch

    if who == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=2048, load_in_4bit=True, dtype=torch.bfloat16
        )
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
            use_gradient_checkpointing="unsloth", random_state=0, max_seq_length=2048,
        )  # fmt: skip
        return model, tokenizer
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(folder)


def rows_of(file: Path, tokenizer: Any) -> list[dict[str, str]]:
    """Pairs as text, in the tokenizer's own template."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = []
    for row in json.loads(file.read_text()):
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt} | {name: row[name]["value"] + END for name in ("chosen", "rejected")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=["trl", "unsloth"])
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    a = parser.parse_args()
    if a.who == "unsloth":
        from unsloth import PatchDPOTrainer  # before trl, which it changes

        PatchDPOTrainer()
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from bench.peers import unsloth_clock

    model, tokenizer = load(a.who, a.folder)
    settings: dict[str, Any] = {} if a.who == "unsloth" else {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    clock = unsloth_clock()
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(
            output_dir="/tmp/prefer", per_device_train_batch_size=4, gradient_accumulation_steps=2,
            max_steps=STEPS + SKIPPED, learning_rate=5e-6, bf16=True, optim="adamw_8bit", logging_steps=1,
            save_strategy="no", report_to="none", max_length=2048, beta=0.1, seed=0, gradient_checkpointing=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows_of(a.work / "pairs.json", tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:])][SKIPPED - 1 :]
    names = ("trl", "unsloth") if a.who == "unsloth" else ("trl",)
    result = {
        "pairs_per_second": round(8 * len(seconds) / sum(seconds), 2),
        "step_seconds_median": round(statistics.median(seconds), 3),
        "step_seconds": [round(second, 3) for second in seconds],
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][:5],
        "with": {name: metadata.version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
