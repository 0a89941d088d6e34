"""Declares the settings of a run, each with its default, its limits and what it does, in one place.

Names are those of PEFT and Transformers. Everything is frozen: a run that has started cannot change under it.
A section's docstring and each field's description are what the documentation shows. `fix` in a field's
metadata is the advice printed when a value is refused.
"""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, Tag, ValidationInfo, field_serializer, field_validator

from veneer.config.adapter import Adapter, require_pattern
from veneer.config.objectives import Cpo, Dpo, Kto, Orpo, Simpo, settings_of
from veneer.config.rows import rows_as_file
from veneer.config.section import Section
from veneer.config.sizes import parse_size


class Model(Section):
    """The base model."""

    base: str = Field(
        min_length=1,
        description="Hub id, local folder, .gguf file, or the built-in smollm2-135m-instruct or "
        "all-minilm-l6-v2 (an encoder).",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    task: Literal["causal-lm", "sequence-classification", "token-classification", "embedding", "reward"] = Field(
        "causal-lm",
        description="causal-lm: write text; sequence-classification: give a text, or a pair of texts, one of several "
        "labels, by a head on an encoder (BERT and the like) or a decoder; token-classification: give each word a tag, "
        "such as B-PER; embedding: give a text a vector that is near those of texts that belong to it; "
        "reward: score answers by a head of one output, learnt from pairs of answers.",
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto",
        description="What of the last hidden states is an embedding: their mean, or the first (cls) or the last one. "
        "auto: what the base's 1_Pooling says, else the mean for encoders and the last for decoders.",
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="Run, checkpoint or adapter folder whose adapter training starts from, on the same base; for pairs "
        "of answers it is the reference, too. null: a new adapter.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Compute dtype; auto is bfloat16 if the machine supports it, else float32."
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention backend; auto leaves the choice to Transformers."
    )


class Quantization(Section):
    """How the frozen weights are stored. Leave the section out for LoRA in 16 bits."""

    bits: Literal[4] = Field(
        4,
        description="4: QLoRA, blocks of 64 weights. Embeddings and head are not quantized.",
        json_schema_extra={"fix": "write `bits: 4`, or leave the section `quantization` out for LoRA in 16 bits"},
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit format of bitsandbytes.")
    double_quant: bool = Field(True, description="Quantize the blocks' constants too (saves 0.37 bits a weight).")
    cache: bool = Field(
        False,
        description="Keep the 4-bit weights on disk, in .veneer beside the base or in Veneer's cache folder, and load "
        "them from there the next time. 5.7 GB for 8B.",
    )


ColumnName = Literal[
    "prompt",
    "completion",
    "system",
    "messages",
    "text",
    "chosen",
    "rejected",
    "label",
    "tools",
    "context",
    "text_pair",
    "tokens",
    "tags",
    "anchor",
    "positive",
    "negative",
]


class Data(Section):
    """The training data and how rows become tokens."""

    train: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Files, globs or folders (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; gzip or zstd), or a hub id. "
        "In Python also rows: a list of dicts, a datasets.Dataset, a pandas DataFrame.",
        json_schema_extra={"fix": "name a file, or several as [a.jsonl, b.jsonl]"},
    )
    validation: (
        Annotated[float, Field(strict=True, ge=0, lt=1)]
        | Annotated[int, Field(strict=True, ge=0)]
        | str
        | Annotated[tuple[str, ...], Field(min_length=1)]
    ) = Field(
        0.05,
        description="Held-out part: a fraction of the rows, a number of rows, or files of its own.",
        json_schema_extra={"fix": "write a fraction such as 0.05, a number of rows, or a file"},
    )
    split: str = Field("train", description="Split of a hub dataset or of an Arrow folder that has several.")
    subset: str | None = Field(None, description="Configuration of a hub dataset that has several.")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt-completion",
        "question-answer",
        "guanaco",
        "text",
        "preference",
        "rated",
        "chosen",
    ] = Field(
        "auto",
        description="Format of the rows; auto recognises it. chosen: train on the chosen answers of preference pairs.",
    )
    columns: dict[ColumnName, str] = Field(
        {},
        description="A format's field names and the file's, as {prompt: query, completion: reply}.",
        json_schema_extra={"fix": "write pairs such as {prompt: query, completion: reply}"},
    )
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        None,
        description="Names of the labels, or of the tags, in the order of their ids, for `model.task: "
        "sequence-classification` and `token-classification`; null: those of the base's head, or those that the rows "
        "have, sorted.",
        json_schema_extra={"fix": "write at least two names, such as [negative, positive]"},
    )
    ignore_columns: tuple[str, ...] = Field(
        (),
        description="Columns to ignore. Those that a format would leave out silently "
        "(tools, context, images) are refused unless they are named here.",
        json_schema_extra={"fix": "write a list such as [context, images]"},
    )
    text_by: Literal["line", "paragraph", "file"] = Field("line", description="Unit of a text file that is a row.")
    limit: int | None = Field(None, ge=1, description="Use only the first rows.")
    sample: int | None = Field(None, ge=1, description="Use a sample of this many rows, chosen by train.seed.")
    max_length: int = Field(2048, ge=8, description="Maximum tokens of a row.")
    overlong: Literal["chunk", "drop", "truncate", "refuse"] = Field(
        "chunk",
        description="Rows longer than max_length. chunk: text is cut into pieces, all trained, and other rows are left "
        "out; drop: all are left out; truncate: their end is cut off; refuse the data.",
    )
    max_row_bytes: int = Field(
        64 * 2**20,
        ge=1024,
        description="Maximum bytes of a row, decompressed; a longer one is a bad row and is not read.",
    )
    max_cut_rows: float = Field(
        0.001,
        ge=0,
        le=1,
        description="With truncate: share of rows that may lose all their trained tokens; more is refused.",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="Rows that cannot be read or rendered: refuse the data, or leave them out and count them."
    )
    duplicates: Literal["keep", "drop", "drop-near"] = Field(
        "drop", description="Rows equal (drop-near: or nearly) to an earlier one: keep, or drop and count them."
    )
    group: str | None = Field(None, description="Column; rows with the same value stay on one side of the split.")
    overlap: Literal["report", "refuse"] = Field(
        "report", description="Held-out rows that share a sequence of 13 words with training rows: report or refuse."
    )
    pii: Literal["off", "report", "redact", "refuse"] = Field(
        "report", description="E-mail addresses, phone numbers, cards, IBANs, IPs, national ids, secrets in the rows."
    )
    packing: bool = Field(
        False, description="Fill sequences of max_length with several rows, which never attend to each other."
    )
    chat_template: str = Field(
        "auto",
        description="auto: the tokenizer's own; chatml, llama-3, mistral, gemma, phi-3, alpaca or guanaco; a Jinja "
        "file; none: plain prompt + completion.",
    )
    template_date: date | None = Field(
        None,
        description="Date for templates that print today's date; null: the day the run begins, which its folder keeps.",
        json_schema_extra={"fix": "write a day such as 2026-07-31"},
    )
    unrendered: Literal["refuse", "into-user", "leave-out"] = Field(
        "refuse",
        description="Content that the template leaves out: refuse the row; into-user: put system turns at the start of "
        "the next user turn; leave-out: train on the row without it. Both are counted.",
    )
    add_special_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = Field(
        None,
        description="Tokens to add to the tokenizer. Their rows of embeddings and head begin as the mean of the others "
        "and are trained; those that the chat template writes are control tokens.",
        json_schema_extra={"fix": "write a list such as ['<|route|>', '<|tool|>']"},
    )
    system_prompt: str | None = Field(None, description="System prompt for conversations that have none.")
    loss_on: Literal["assistant", "last", "completion", "all"] = Field(
        "assistant",
        description="assistant: all answers; last: the last; completion: those after the last question; all: every "
        "token.",
    )
    rewritten_history: Literal["refuse", "last", "split"] = Field(
        "refuse",
        description="For templates that change earlier turns: refuse such rows, train on their last answer only, or "
        "make one row per answer.",
    )
    special_tokens_in_text: Literal["auto", "strip", "text", "control"] = Field(
        "auto",
        description="Meaning of `<|im_end|>` and the like in a row's text. text: text; control: control tokens; "
        "auto: text, but rows that begin or end with one are already rendered and refused; strip: as auto, but "
        "removed from the ends of turns.",
    )
    workers: int | None = Field(None, ge=1, description="Processes that tokenize; null: by size of the data.")

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _with_rows_as_file(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace rows as Python objects, which no text holds, by the file that they are written to."""
        is_text = info.context is not None and info.context["is_text"]
        return value if is_text else rows_as_file(value, f"data.{info.field_name}")


class EarlyStopping(Section):
    """When a training that no longer improves ends, and by which metric its best step is found."""

    metric: str = Field("loss", min_length=1, description="The held-out `loss`, or a name of `evaluate.during`.")
    patience: int | None = Field(
        3, ge=1, description="Evaluations without improvement after which training ends; null: it never does."
    )
    min_delta: float = Field(0.0, ge=0, description="An improvement of no more than this is none.")


# One of the two by its value, so that a wrong number is told by the limits of a rate alone.
LearningRate = Annotated[
    Annotated[float, Field(gt=0, le=1), Tag("rate")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if value == "auto" else "rate"),
]


class Train(Section):
    """The training loop, as in Transformers' TrainingArguments."""

    output_dir: Path = Field(Path("runs/run"), description="The run's folder; it must not hold a run yet.")
    objective: Literal["auto", "sft", "dpo", "kto", "orpo", "simpo", "cpo"] = Field(
        "auto",
        description="What is minimized. auto: by the rows: sft, learning single answers; dpo, preferring the chosen "
        "answer of a pair to the rejected one, relative to a reference; kto, the same of rated rows. orpo, simpo and "
        "cpo prefer the chosen answer without a reference.",
    )
    reference: Literal["cached", "live", "none"] = Field(
        "cached",
        description="Log-probabilities of the reference, which is what training starts from, for objectives that "
        "compare with it. cached: computed once before the first step, and kept on disk; live: at each step, with a "
        "frozen copy of the starting adapter; none: no reference, of dpo with sigmoid and hinge.",
    )
    dpo: Dpo | None = settings_of(Dpo)
    kto: Kto | None = settings_of(Kto)
    orpo: Orpo | None = settings_of(Orpo)
    simpo: Simpo | None = settings_of(Simpo)
    cpo: Cpo | None = settings_of(Cpo)
    class_weights: Literal["none", "balanced"] | Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = Field(
        "none",
        description="Weights of the labels in the loss, for `model.task: sequence-classification` and "
        "`token-classification`. balanced: such that all labels count alike, however many rows they have; or a number "
        "for each, in the order of `data.labels`.",
        json_schema_extra={"fix": "write none, balanced, or a number above 0 for each label, such as [1.0, 3.0]"},
    )
    temperature: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Divisor of cosine similarities in the loss of `model.task: embedding`; smaller: the nearest wrong "
        "texts count more.",
    )
    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_train_epochs.")
    per_device_train_batch_size: int = Field(4, ge=1, description="Rows in a micro-batch.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: LearningRate = Field(
        2e-4,
        description="Peak learning rate. auto: before the run, a few rates are each tried for a few steps and compared "
        "by their held-out loss; it takes at most 15% of the run.",
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        gt=0,
        description="LoRA+ (arXiv 2402.12354): the rate of the B matrices is this many times the learning rate, as 16; "
        "null: all have the same. For `adapter.method` lora and dora.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warmup.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 turns it off.")
    optim: Literal[
        "auto",
        "adamw_torch",
        "adamw_8bit",
        "adamw_32bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "galore_adamw",
        "apollo_adamw",
    ] = Field(
        "auto",
        description="auto: adamw_8bit on a GPU, adamw_torch elsewhere. galore_adamw and apollo_adamw, with `adapter: "
        "none`: the moments of linear layers are kept in `optim_rank` dimensions (arXiv 2403.03507, 2412.05270).",
    )
    optim_rank: int = Field(
        256, ge=1, description="Dimensions of galore_adamw's and apollo_adamw's moments, for layers wider than that."
    )
    master_weights: Literal["auto", "float32", "none"] = Field(
        "auto",
        description="With `adapter: none` in bfloat16: float32: the optimizer updates a copy in float32; none: it "
        "updates the weights, and rounds up or down by chance, so that small updates count on average; auto: float32 "
        "if that fits in memory. Biases and modules trained beside an adapter always have the copy.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in backward: slower, less memory. true: all of them; false: none; auto: the "
        "fused engine recomputes what does not fit in memory, the reference engine all.",
    )
    memory_budget: str = Field(
        "auto",
        description="Memory of the CUDA GPU that the process may take in all, CUDA's own included, as 12GiB; auto: "
        "what is free, less a reserve. It decides where tensors are, and changes no number.",
        json_schema_extra={"fix": "write `auto`, or an amount with its unit such as 12GiB"},
    )
    engine: Literal["auto", "fused", "reference"] = Field(
        "auto",
        description="reference: Transformers and PEFT, unmodified; fused: hand-written, faster, with its own "
        "attention; auto: fused on CUDA if it covers the model and passes its check.",
    )
    shard: Literal["none", "layers"] = Field(
        "none",
        description="On several GPUs of a machine: layers: the frozen 4-bit weights are spread over them, and each "
        "layer is fetched just before it is computed, for bases larger than a GPU; none: each GPU has all of them. It "
        "changes no number.",
    )
    logging_steps: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (),
        description="Trackers that get each line of metrics.jsonl, and the run's settings, plan and ledger, as "
        "[tensorboard]. Each is an extra, as `pip install 'veneer[tensorboard]'`; docs/tracking.md.",
        json_schema_extra={"fix": "write a list of tensorboard, wandb, trackio and mlflow; [] for none"},
    )
    eval_steps: int | None = Field(100, ge=1, description="Steps between held-out losses; null: only at the end.")
    save_steps: int | None = Field(200, ge=1, description="Steps between checkpoints; null: only on interruption.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept, beside the best one with `keep: best`.")
    early_stopping: EarlyStopping | None = Field(
        None,
        description="End a training that no longer improves, as {metric: loss, patience: 3, min_delta: 0}. patience: "
        "evaluations (`eval_steps`) without an improvement of more than min_delta; null: never end, and only name the "
        "metric of `keep: best`. metric: the held-out `loss`, `perplexity` or a name of `evaluate.during`. The "
        "learning rate keeps the schedule of all steps.",
        json_schema_extra={
            "fix": "write {metric: loss, patience: 3, min_delta: 0}, with a patience of 1 or more (null: never end) "
            "and a min_delta of 0 or more"
        },
    )
    keep: Literal["best", "last"] = Field(
        "last",
        description="Adapter that the run delivers: that of the last step, or of the evaluation with the best value of "
        "`early_stopping`'s metric (without it: the lowest held-out loss).",
    )
    on_divergence: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="What follows where the loss or the gradient of a step is not finite, or the loss is far above "
        "that of the steps before. stop: the run ends; skip: the step's update is left out; rollback: the run goes "
        "back to its last good checkpoint and on with half the learning rate. skip and rollback end the run where they "
        "do not help; docs/runs.md.",
    )
    seed: int = Field(42, ge=0, description="Adapter's initial values, order of the rows, dropout.")

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        """Refuse what is neither `auto` nor an amount of memory; YAML makes a number of one without a unit."""
        text = str(value) if type(value) in (int, float) else value
        if isinstance(text, str) and text != "auto" and parse_size(text) is None:
            raise ValueError("not an amount of memory")
        return text


class Evaluate(Section):
    """What `veneer evaluate` measures on held-out rows, base against tuned."""

    rows: int | None = Field(200, ge=1, description="Maximum number of held-out rows; null: all.")
    metrics: Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "auto",
        description="Names from docs/evaluation.md, or functions as module:function; the first one decides. auto: "
        "chosen from the right answers (JSON, numbers, choices, prose).",
        json_schema_extra={"fix": "write `auto` or a list such as [exact_match, rouge_l]"},
    )
    extract: str | None = Field(
        None,
        min_length=1,
        description="Regular expression; exact_match and accuracy compare its last match (its first group, if it has "
        "any) in the answer and in the reference, as '#### (.+)'.",
        json_schema_extra={"fix": "write a regular expression of Python, such as '#### (.+)'"},
    )
    json_schema: str | None = Field(
        None, min_length=1, description="File with the JSON schema of the metric json_schema."
    )
    max_new_tokens: int = Field(256, ge=1, description="Maximum tokens of a generated answer.")
    group: str | None = Field(
        None, description="Column; rows with the same value are no independent rows. null: the one of `data.group`."
    )
    equal_within: float | None = Field(
        None,
        gt=0,
        description="Difference from the base that counts as none, for the verdict `equal within d`; a share of the "
        "base's value, where a metric is no share itself. null: what the rows can detect.",
    )
    batch_size: int = Field(
        16, ge=1, description="Rows in a batch, here and in training's held-out losses; fewer if memory is short."
    )
    during: tuple[str, ...] = Field(
        (),
        description="Metrics of generated answers that training measures with each held-out loss (`train.eval_steps`), "
        "as [exact_match], on a sample of the held-out rows.",
        json_schema_extra={"fix": "write a list of metrics such as [exact_match]"},
    )
    during_tokens: int = Field(
        16384,
        ge=1,
        description="Maximum tokens, of prompts and answers, that one such measurement takes: it decides how many rows "
        "are in the sample, which `train.seed` draws.",
    )

    @field_validator("extract")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        require_pattern(value or "")
        return value


class Run(Section):
    """A whole run. The smallest names `model.base` and `data.train`; all else has a default."""

    model: Model
    quantization: Quantization | None = None
    adapter: Adapter | None = Field(
        Adapter(),
        description="Section of the adapter, or `none` for full fine-tuning.",
        json_schema_extra={"fix": "write a section such as {r: 16}, or `adapter: none` to train all weights"},
    )
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_or_none(cls, value: Any, info: ValidationInfo) -> Any:
        """Take `none`; refuse an empty section, which is more likely forgotten than full fine-tuning."""
        if value is None and info.context is not None and info.context["is_text"]:
            raise ValueError("is empty")
        return None if value == "none" else value

    @field_serializer("adapter", mode="wrap")
    def _none_by_name(self, value: Adapter | None, write: Any) -> Any:
        return "none" if value is None else write(value)

    @property
    def releases_gradients(self) -> bool:
        """Whether each weight of full fine-tuning is updated as soon as it has its gradient, which is then dropped."""
        train = self.train
        return self.adapter is None and train.max_grad_norm == 0 and train.gradient_accumulation_steps == 1

    if not TYPE_CHECKING:  # a type checker knows the arguments by the fields

        def __init__(self, **sections: Any) -> None:
            """Take the sections, as objects or as dicts; raise a UserError that tells every mistake, as of a file."""
            from veneer.config.load import validate  # which imports this module

            validate(sections, {}, "Run", self)
