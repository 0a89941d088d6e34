"""The settings of a run, each with its default, its limits and what it does, in one place.

Names are those of PEFT and Transformers. Everything is frozen: a run that has started cannot change under it.
A section's docstring and each field's description are what the documentation shows. `fix` in a field's
metadata is the advice printed when a value is refused.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """The base model."""

    base: str = Field(
        min_length=1, description="Hub id, local folder, .gguf file, or the built-in smollm2-135m-instruct."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Precision of compute; auto is bfloat16 where the machine has it, else float32."
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention backend; auto leaves the choice to Transformers."
    )


class Quantization(Section):
    """How the frozen weights are stored. Leave the section out for LoRA in 16 bits."""

    bits: Literal[4] = Field(
        4,
        description="4: QLoRA, blocks of 64 weights. Embeddings and head stay as they are.",
        json_schema_extra={"fix": "write `bits: 4`, or leave the section `quantization` out for LoRA in 16 bits"},
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit format of bitsandbytes.")
    double_quant: bool = Field(True, description="Quantize the blocks' constants too (saves 0.37 bits a weight).")


class Adapter(Section):
    """The LoRA adapter, as in PEFT's LoraConfig."""

    r: int = Field(16, ge=1, le=4096, description="Rank.")
    lora_alpha: float = Field(32, gt=0, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="all-linear, or the names of the modules to adapt.",
        json_schema_extra={"fix": "write `all-linear` or a list such as [q_proj, v_proj]"},
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).")


class Data(Section):
    """The training data and how rows become tokens."""

    train: str = Field(min_length=1, description="JSON or JSONL file.")
    validation: Annotated[float, Field(strict=True, ge=0, lt=1)] | Annotated[int, Field(strict=True, ge=0)] | str = (
        Field(
            0.05,
            description="Held-out part: a fraction of the rows, a number of rows, or a file of its own.",
            json_schema_extra={"fix": "write a fraction such as 0.05, a number of rows, or a file"},
        )
    )
    format: Literal["auto", "alpaca", "messages", "prompt-completion"] = Field(
        "auto", description="Shape of a row; auto recognises it from its fields."
    )
    max_length: int = Field(2048, ge=8, description="Tokens; longer rows are left out and counted.")
    packing: bool = Field(
        False, description="Fill sequences of max_length with several rows; rows never see each other."
    )
    chat_template: str = Field(
        "auto",
        description="auto: the tokenizer's own; alpaca or guanaco; a Jinja file; none: plain prompt + completion.",
    )
    system_prompt: str | None = Field(None, description="Put before conversations that have none.")
    limit: int | None = Field(None, ge=1, description="Use only the first rows of the file.")


class Train(Section):
    """The training loop, as in Transformers' TrainingArguments."""

    output_dir: Path = Field(Path("runs/run"), description="The run's folder; it must not hold a run yet.")
    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_train_epochs.")
    per_device_train_batch_size: int = Field(4, ge=1, description="Rows in a micro-batch.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warmup.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Part of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 turns it off.")
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "auto", description="auto: adamw_8bit on a GPU, adamw_torch elsewhere."
    )
    gradient_checkpointing: bool = Field(True, description="Recompute activations: slower, less memory.")
    logging_steps: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_steps: int | None = Field(100, ge=1, description="Steps between held-out losses; null: only at the end.")
    save_steps: int | None = Field(200, ge=1, description="Steps between checkpoints; null: only on interruption.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    seed: int = Field(42, ge=0, description="Adapter's initial values, order of the rows, dropout.")


class Evaluate(Section):
    """What `veneer evaluate` measures on held-out rows, base against tuned."""

    rows: int | None = Field(200, ge=1, description="At most so many held-out rows; null: all.")
    max_new_tokens: int = Field(256, ge=1, description="Longest generated answer, in tokens.")
    batch_size: int = Field(16, ge=1, description="Rows generated at a time.")


class Run(Section):
    """A whole run. The smallest names `model.base` and `data.train`; all else has a default."""

    model: Model
    quantization: Quantization | None = None
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
