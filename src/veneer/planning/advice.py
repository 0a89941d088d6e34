"""Rules that find likely mistakes in a run's settings, each with its fix.

A rule checks a `Situation` and returns a message with its fix, or None. It uses only what is known: a rule about the
data returns None while the data has not been read. Sources are papers by their arXiv number, or the measurement that a
rule is based on. docs/advice.md also lists the pitfalls that cannot happen here.

All rules are in one file, although it is long: they are independent, and readers search for one by id or section.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from math import sqrt
from typing import Any

import torch

from veneer.config import Adapter, Data, Run
from veneer.engine.fused import flash4
from veneer.engine.fused.attention import SHORT
from veneer.model import full
from veneer.model.adapters import find_method
from veneer.model.adapters.method import AdapterMethod
from veneer.model.shapes import Shapes
from veneer.model.target_modules import rank_of
from veneer.planning.forecast import Forecast
from veneer.planning.gpus import OnGpus
from veneer.planning.memory import frozen_bytes

RATES = 2e-5, 1e-3  # usual learning rates of LoRA; see `rate_scale` for others
ONE_SIDED = 0.8  # share of pairs that are longer on the same side
FEW_PAIRS = 20  # of fewer, chance puts so many on one side
MORE_ROWS = "gather more rows"
START_SECONDS = 30  # until the first step: libraries, the base, the engine's check, kernels that are compiled
WORTH = 1.8  # gain by a second GPU that is worth it
SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class DataFacts:
    """Facts of the data that rules check, from the ledger.

    Attributes:
        rows, held_out: numbers of rows to train on, and held out.
        p95: tokens that 95% of the rows do not exceed, before any limit.
        longest: tokens of the longest row, within the limit.
        end_of_turn: trained end-of-turn tokens.
        raw: whether the rows are text without turns.
        has_pairs: whether they are pairs of answers, or rated ones, which are compared.
        longer: share of the pairs whose chosen answer has more tokens than the rejected one, of pairs that differ in
            that; None: there are none.
    """

    rows: int
    held_out: int
    p95: int
    longest: int
    end_of_turn: int
    raw: bool
    has_pairs: bool = False
    longer: float | None = None


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of the tokenizer and template that rules check.

    Attributes:
        has_template: whether the base has a chat template.
        uses_own: whether the run renders with it.
    """

    has_template: bool
    uses_own: bool


@dataclass(frozen=True)
class Situation:
    """Everything that rules check.

    Attributes:
        run: the settings.
        shapes: shapes of the base.
        stored: dtype its weights are published in; None: not known.
        forecast: forecast of the run.
        data, tokenizer: facts of these; None: not read.
        file_type: type of a quantized GGUF file that the base comes from, as Q4_1; None: the base is no such file.
        by_gpus: the run by the number of GPUs, one and two first; empty: there is one.
    """

    run: Run
    shapes: Shapes
    stored: torch.dtype | None
    forecast: Forecast
    data: DataFacts | None = None
    tokenizer: TokenizerFacts | None = None
    file_type: str | None = None
    by_gpus: Sequence[OnGpus] = ()

    @property
    def adapter(self) -> Adapter:
        """The adapter's settings; rules about it are not asked of full fine-tuning."""
        assert self.run.adapter is not None
        return self.run.adapter

    @property
    def scale(self) -> float:
        return self.method.scale(self.adapter)

    @property
    def method(self) -> AdapterMethod:
        return find_method(self.adapter)

    @property
    def rate_scale(self) -> float:
        """Usual learning rates, relative to LoRA's."""
        return full.RATE_SCALE if self.run.adapter is None else self.method.rate_scale


@dataclass(frozen=True)
class Advice:
    """One finding. `message` ends with its source."""

    id: str
    severity: str
    setting: str
    message: str
    fix: str


Finding = tuple[str, str] | None  # message and fix


@dataclass(frozen=True)
class Rule:
    """A pitfall.

    Attributes:
        id, severity, setting: those of its advice.
        source: paper or measurement that it is based on.
        check: function that returns the mistake and its fix, or None.
    """

    id: str
    severity: str
    setting: str
    source: str
    check: Callable[[Situation], Finding]


RULES: list[Rule] = []


def advise(situation: Situation) -> list[Advice]:
    """Return all findings of the rules, errors first."""
    found = []
    for rule in RULES:
        if not _concerns(rule.setting, situation):
            continue
        if (finding := rule.check(situation)) is not None:
            message, fix = finding
            found.append(Advice(rule.id, rule.severity, rule.setting, f"{message} ({rule.source})", fix))
    return sorted(found, key=lambda advice: SEVERITIES.index(advice.severity))


def _concerns(setting: str, s: Situation) -> bool:
    """Return whether a run has a setting: a section `adapter`, and a method that takes it."""
    section, _, name = setting.partition(".")
    return section != "adapter" or (s.run.adapter is not None and s.method.has(name))


def _rule(severity: str, name: str, setting: str, source: str) -> Callable[[Callable[[Situation], Finding]], None]:
    return lambda check: RULES.append(Rule(name, severity, setting, source, check))


def _is_installed(package: str) -> bool:
    """Return whether a package is installed; modules do not show it, since packages share them."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


_error, _warning, _info = (partial(_rule, severity) for severity in SEVERITIES)


# The adapter


@_warning("alpha-low", "adapter.lora_alpha", "arXiv 2106.09685; 2 r is usual")
def _(s: Situation) -> Finding:
    if s.method.usual_scale is None or s.scale >= s.method.usual_scale[0]:
        return None
    r = s.adapter.r
    return f"the update is scaled by {s.scale:.3g}, so it hardly changes the model", f"set adapter.lora_alpha={2 * r}"


@_warning("alpha-high", "adapter.lora_alpha", "arXiv 2106.09685; 2 r is usual")
def _(s: Situation) -> Finding:
    if s.method.usual_scale is None or s.scale <= s.method.usual_scale[1]:
        return None
    r = s.adapter.r
    return f"the update is scaled by {s.scale:.3g}, which trains unsteadily", f"set adapter.lora_alpha={2 * r}"


@_warning("rank-for-rows", "adapter.r", "arXiv 2405.09673: more capacity, more memorised")
def _(s: Situation) -> Finding:
    r = s.adapter.r
    if (
        not s.method.is_lora
        or s.data is None
        or not ((r > 16 and s.data.rows < 1000) or (r >= 64 and s.data.rows < 5000))
    ):
        return None
    return f"rank {r} is much for {s.data.rows:,} rows", "set adapter.r=8 and adapter.lora_alpha=16"


@_warning("experts", "adapter.target_modules", "peft 0.21: _convert_peft_config_moe")
def _(s: Situation) -> Finding:
    if not s.shapes.experts or s.adapter.target_modules != "all-linear":
        return None
    return (
        f"{s.shapes.experts:.0%} of the weights are experts, stacked in parameters that are no linear layers: most are "
        "left without an adapter, and where PEFT adapts them (Mixtral, Qwen3-MoE, DeepSeek and their like) it takes "
        "memory for copies of their weights that is not predicted here",
        "name the layers of attention in adapter.target_modules for a run as predicted",
    )


@_warning("rank-for-layer", "adapter.r", "arithmetic")
def _(s: Situation) -> Finding:
    r, ranks = s.adapter.r, tuple(s.adapter.rank_pattern.items())
    paths = s.shapes.targets(s.adapter) & set(s.shapes.linears)
    sides = [(rank_of(path, r, ranks), *s.shapes.linears[path]) for path in paths]
    small = [(a, b) for rank, a, b in sides if rank * (a + b) >= a * b]
    if not small or not s.method.is_lora:
        return None
    lower = max(1, min(16, min(a * b // (a + b) for a, b in small) // 2))
    return (
        f"at rank {r} the adapter of {len(small)} layers is as large as the layers",
        f"set adapter.r={lower} and adapter.lora_alpha={2 * lower}",
    )


@_warning("attention-only", "adapter.target_modules", "arXiv 2305.14314, figure 2; arXiv 2405.09673")
def _(s: Situation) -> Finding:
    def weights(paths: Any) -> int:
        return sum(s.shapes.linears[p][0] * s.shapes.linears[p][1] for p in paths if p in s.shapes.linears)

    share = weights(s.shapes.targets(s.adapter)) / max(1, weights(s.shapes.quantizable()))
    if share >= 0.5 or s.adapter.layers_to_transform:
        return None
    is_all = s.adapter.target_modules == "all-linear"
    return (
        f"the adapted layers hold {share:.0%} of the weights; "
        "adapters on all linear layers learn more at the same memory",
        "leave adapter.exclude_modules out" if is_all else "set adapter.target_modules=all-linear",
    )


@_warning("tied-embedding", "adapter.target_modules", "huggingface/peft issue 2777")
def _(s: Situation) -> Finding:
    head_is_stored = s.shapes.head is None or f"{s.shapes.head}.weight" in s.shapes.weights
    adapted = sorted(s.shapes.targets(s.adapter) & {*s.shapes.embeddings, s.shapes.head})
    if head_is_stored or not adapted:
        return None
    return (
        f"{adapted[0]} shares its weights with another layer, which a merge would change too",
        "set adapter.target_modules=all-linear, which leaves both alone",
    )


@_info("dropout-large-data", "adapter.lora_dropout", "arXiv 2305.14314, section 4: no gain on large models")
def _(s: Situation) -> Finding:
    if not s.adapter.lora_dropout or s.data is None or s.data.rows < 50_000:
        return None
    return f"dropout slows training and does not help with {s.data.rows:,} rows", "set adapter.lora_dropout=0"


# Optimization


@_warning("learning-rate", "train.learning_rate", "arXiv 2106.09685, 2305.14314; ten times that of full training")
def _(s: Situation) -> Finding:
    rate = s.run.train.learning_rate
    low, high = (s.rate_scale * limit for limit in RATES)
    if rate == "auto" or low <= rate <= high or _has_pairs(s):
        return None
    method = "full fine-tuning" if s.run.adapter is None else s.method.name
    usual = s.rate_scale * 2e-4
    return f"{rate:g} is {'low' if rate < low else 'high'} for {method}", f"set train.learning_rate={usual:g}"


@_warning("preference-rate", "train.learning_rate", "arXiv 2310.16944: 5e-7 in full training; ten times that for LoRA")
def _(s: Situation) -> Finding:
    rate = s.run.train.learning_rate
    if not _has_pairs(s) or rate == "auto" or rate <= s.rate_scale * RATES[0]:
        return None
    return (
        f"{rate:g} is high for preferences: good and bad answers lose probability, the bad ones faster",
        f"set train.learning_rate={s.rate_scale * 1e-5:g}",
    )


def _has_pairs(s: Situation) -> bool:
    return s.data is not None and s.data.has_pairs


@_info("no-warmup", "train.warmup_ratio", "arXiv 1706.02677")
def _(s: Situation) -> Finding:
    if s.run.train.warmup_ratio or (s.forecast.rows.steps or 100) < 20:
        return None
    return "the first steps go at the full rate, before the optimizer knows its scale", "set train.warmup_ratio=0.03"


@_warning("epochs-many", "train.num_train_epochs", "arXiv 2305.16264: little is learned from a fifth pass on")
def _(s: Situation) -> Finding:
    train = s.run.train
    epochs = train.num_train_epochs
    if train.max_steps is not None:
        return None
    if s.data is not None and s.data.rows < 10_000 and epochs > 3:
        return f"{epochs:g} passes over {s.data.rows:,} rows learn them by heart", "set train.num_train_epochs=2"
    return ("more passes than anything new is learned from", "set train.num_train_epochs=2") if epochs > 5 else None


@_warning("few-steps", "train.gradient_accumulation_steps", "arithmetic")
def _(s: Situation) -> Finding:
    train, steps = s.run.train, s.forecast.rows.steps
    if steps is None or steps >= 20 or train.max_steps is not None:
        return None
    size, times = train.per_device_train_batch_size, train.gradient_accumulation_steps
    enough = max(1, size * times * steps // 20)  # rows a step
    fix = f"set train.gradient_accumulation_steps={max(1, enough // size)}"
    if size > enough:
        fix += f" and train.per_device_train_batch_size={enough}"
    return f"the whole run is {steps} optimizer steps of {size * times} rows", fix if size * times > 1 else MORE_ROWS


@_info("no-clipping", "train.max_grad_norm", "arXiv 1211.5063")
def _(s: Situation) -> Finding:
    if s.run.train.max_grad_norm or s.run.releases_gradients:
        return None
    return "gradients are not clipped: one odd row can undo much", "set train.max_grad_norm=1.0"


@_info("paged-ample", "train.optim", "arXiv 2305.14314, section 3: paging is for spikes")
def _(s: Situation) -> Finding:
    forecast = s.forecast
    if not s.run.train.optim.startswith("paged") or forecast.step_margin_bytes < 0.25 * forecast.target.budget_bytes:
        return None
    free = forecast.step_margin_bytes / 2**30
    return (
        f"with {free:.1f} GiB left, paging only costs time",
        f"set train.optim={s.run.train.optim.removeprefix('paged_')}",
    )


# Precision


@_warning("fp16-compute", "model.dtype", "arXiv 1905.12322: bf16 has float32's range, fp16 overflows at 65,504")
def _(s: Situation) -> Finding:
    if s.run.model.dtype != "float16" or s.stored != torch.bfloat16 or not s.forecast.target.has_bfloat16:
        return None
    return "float16 for a model that was trained in bfloat16", "set model.dtype=bfloat16"


@_warning("fp32-on-4bit", "model.dtype", "arXiv 2305.14314: 4-bit storage, 16-bit compute")
def _(s: Situation) -> Finding:
    if s.run.quantization is None or s.run.model.dtype != "float32" or not s.forecast.target.has_bfloat16:
        return None
    return "4-bit weights computed in float32: slow, and more exact than they are", "set model.dtype=bfloat16"


@_info("no-bfloat16", "model.dtype", "CUDA compute capability below 8.0")
def _(s: Situation) -> Finding:
    target = s.forecast.target
    if target.device != "cuda" or target.has_bfloat16 or s.run.model.dtype != "auto":
        return None
    return "this GPU has no bfloat16, so auto computes in float32", "set model.dtype=float16 for speed"


@_warning("quantized-twice", "quantization", "bench: a 4-bit file read into bf16 and quantized again errs twice")
def _(s: Situation) -> Finding:
    if s.run.quantization is None or s.file_type is None:
        return None
    return (
        f"the base comes from a GGUF file whose weights are {s.file_type} already",
        "name the original 16-bit model in model.base, or leave the section `quantization` out",
    )


@_info("requantized-merge", "quantization", "arXiv 2305.14314: the adapter makes up for the errors of its 4-bit base")
def _(s: Situation) -> Finding:
    if s.run.quantization is None:
        return None
    return (
        "the adapter will fit these 4-bit weights; merged into 16-bit ones and quantized again it errs twice",
        "serve it on the 4-bit base; or to ship a quantized merge, leave `quantization` out and train in 16 bits",
    )


@_info("16-bit-fits", "quantization", "4-bit weights are dequantized in every pass: bench/results/plan.json")
def _(s: Situation) -> Finding:
    run, forecast = s.run, s.forecast
    if run.quantization is None or forecast.target.device != "cuda":
        return None
    now = frozen_bytes(s.shapes, s.shapes.quantizable(), run.quantization.double_quant, 2)
    more = sum(frozen_bytes(s.shapes, frozenset(), True, 2).values()) - sum(now.values())
    if forecast.step_margin_bytes - more < 0.15 * forecast.target.budget_bytes:
        return None
    return "this would fit in 16 bits, which is exact and no slower", "leave the section `quantization` out"


# Speed and memory


@_warning("eager-attention", "model.attn_implementation", "arXiv 2205.14135: memory grows with the square of length")
def _(s: Situation) -> Finding:
    if s.run.model.attn_implementation != "eager":
        return None
    return "eager attention keeps every score", "set model.attn_implementation=sdpa"


@_error("flash-missing", "model.attn_implementation", "the package flash-attn is not installed")
def _(s: Situation) -> Finding:
    if s.run.model.attn_implementation != "flash_attention_2" or _is_installed("flash-attn"):
        return None
    return (
        "flash_attention_2 is not available here",
        "set model.attn_implementation=sdpa, which has flash kernels of its own",
    )


@_info("flash4-missing", "data.max_length", "bench/attention_backends.py")
def _(s: Situation) -> Finding:
    forecast = s.forecast
    takes_it = forecast.target.device == "cuda" and forecast.target.capability in flash4.LARGEST_HEAD
    is_fast = forecast.engine != "fused" or flash4.is_installed() or forecast.rows.fullest.length <= SHORT
    if not takes_it or is_fast:
        return None
    return (
        "attention over long rows takes up to 2.7 times as long without FlashAttention-4",
        "run pip install 'veneer[flash-attn-4]'",
    )


@_info("checkpointing-ample", "train.gradient_checkpointing", "up to a third of the work is done twice")
def _(s: Situation) -> Finding:
    forecast = s.forecast
    if forecast.target.device != "cuda" or s.run.train.gradient_checkpointing is not True:
        return None
    if forecast.engine == "fused":
        if forecast.step_margin_bytes < 0.15 * forecast.target.budget_bytes:
            return None
        return "memory is left in which less need be recomputed", "set train.gradient_checkpointing=auto"
    held = forecast.phases["backward"].components.get("working set", 0)
    layers = held * s.shapes.depth  # each layer would hold as much as one does while it is recomputed
    if layers > 0.8 * forecast.step_margin_bytes:
        return None
    return "memory is ample: nothing need be recomputed", "set train.gradient_checkpointing=false"


@_info("second-gpu", "train.gradient_accumulation_steps", "bench/many.py: 2.0 times the speed on two H100 over NVLink")
def _(s: Situation) -> Finding:
    if len(s.by_gpus) < 2:
        return None
    one, two = s.by_gpus[:2]
    if one.run_seconds is not None and two.run_seconds is not None:
        saved = one.run_seconds - two.run_seconds
        if s.run.train.max_steps is None and 0 < saved < START_SECONDS:
            message = f"a second GPU saves {saved:.0f} s, about what a run takes to start"
            return message, "train it on one GPU, without --gpus"
    if two.gain is None or two.step_seconds is None or two.gain >= WORTH:
        return None
    gains = f"a second GPU makes it {two.gain:.2f} times as fast: "
    share = two.exchange_seconds / two.step_seconds
    if two.rows_per_step < 2 * one.rows_per_step:
        return f"{gains}there are {two.rows_per_step:,} rows, and two would share them in a step", MORE_ROWS
    if share > two.busiest - 1:
        link = s.forecast.target.gpu_link
        assert link is not None
        return (
            f"{gains}{share:.0%} of a step is the exchange of gradients, at {link.bandwidth / 1e9:.0f} GB/s "
            f"({link.source})",
            "raise train.gradient_accumulation_steps, since gradients are exchanged once a step; `veneer doctor` "
            "measures the link",
        )
    return (
        f"{gains}with {two.rows_per_step} rows of uneven length in a step, one of two GPUs gets {two.busiest - 1:.0%} "
        "more tokens than the mean, and the other waits",
        "raise train.gradient_accumulation_steps: more rows are dealt more evenly",
    )


# Data


@_warning("foreign-template", "data.chat_template", "the base has only ever seen its own")
def _(s: Situation) -> Finding:
    if (
        s.tokenizer is None
        or not s.tokenizer.has_template
        or s.tokenizer.uses_own
        or s.run.data.chat_template == "none"
    ):
        return None
    return (
        f"a chat model trained with {s.run.data.chat_template} instead of its own template",
        "set data.chat_template=auto",
    )


@_warning("raw-text", "data.chat_template", "what a chat model knows of turns is unlearned")
def _(s: Situation) -> Finding:
    if s.tokenizer is None or not s.tokenizer.has_template:
        return None
    if s.run.data.chat_template != "none" and not (s.data and s.data.raw):
        return None
    return (
        "a chat model trained on text without turns",
        "set data.chat_template=auto and give rows with turns, or name a base model",
    )


@_info("no-template", "data.chat_template", "a base model has no turns of its own")
def _(s: Situation) -> Finding:
    if s.tokenizer is None or s.tokenizer.has_template or s.run.data.chat_template not in ("auto", "none"):
        return None
    return (
        "this base has no chat template: prompts and answers are only concatenated",
        "set data.chat_template=chatml",
    )


@_warning("no-end-token", "data.max_length", "the ledger counts them")
def _(s: Situation) -> Finding:
    if s.data is None or s.data.end_of_turn:
        return None
    return (
        f"no end-of-turn token is trained: answers are cut at {s.run.data.max_length} tokens, and none learns to stop",
        "raise data.max_length to the longest row's length, or set data.overlong=drop",
    )


@_warning("max-length-low", "data.max_length", "the ledger counts them")
def _(s: Situation) -> Finding:
    longest, positions = s.run.data.max_length, s.shapes.positions
    if s.data is None or s.data.p95 <= longest:
        return None
    if s.data.raw and s.run.data.overlong == "chunk":
        return None  # nothing is lost
    done = "cut" if s.run.data.overlong == "truncate" else "left out"
    wanted = min(-(-s.data.p95 // 64) * 64, positions or s.data.p95 + 64)
    return (
        f"more than 5% of the rows are longer than {longest} tokens and are {done}",
        f"set data.max_length={wanted}" if wanted > longest else f"shorten them: the model has {positions} positions",
    )


@_error("positions", "data.max_length", "the model's configuration")
def _(s: Situation) -> Finding:
    positions, longest = s.shapes.positions, s.run.data.max_length
    if s.data is not None:
        longest = s.data.longest
    elif longest == Data(train="-").max_length:
        return None  # rows may be so long, but the default does not say so
    if positions is None or longest <= positions:
        return None
    return f"rows of {longest} tokens, the model has positions for {positions}", f"set data.max_length={positions}"


@_warning("pair-lengths", "data.train", "arXiv 2403.19159: preferences for length are learnt first")
def _(s: Situation) -> Finding:
    if s.data is None or s.data.longer is None or s.data.rows < FEW_PAIRS or ONE_SIDED > s.data.longer > 1 - ONE_SIDED:
        return None
    train = s.run.train
    section = train.cpo if train.objective == "cpo" else train.dpo
    if train.objective in ("orpo", "simpo") or (section is not None and section.loss_type == "ipo"):
        return None  # they compare means a token
    is_longer = s.data.longer >= ONE_SIDED
    share, which = (s.data.longer, "longer") if is_longer else (1 - s.data.longer, "shorter")
    return (
        f"the chosen answer is the {which} one in {share:.0%} of the pairs, so a model can learn the length alone",
        "add pairs the other way round, or compare means a token (loss_type: ipo of dpo and cpo, or simpo)",
    )


@_warning("held-out-small", "data.validation", "normal approximation of a share near one half, 95%")
def _(s: Situation) -> Finding:
    if s.data is None or s.data.held_out >= 100:
        return None
    wanted = max(1, min(200, (s.data.rows + s.data.held_out) // 5))
    fix = f"set data.validation={wanted}" if wanted > s.data.held_out else MORE_ROWS
    if not s.data.held_out:
        return "nothing is held out, so nothing can show whether the model got better", fix
    width = 98 / sqrt(s.data.held_out)
    return f"a score on {s.data.held_out} held-out rows is uncertain by {width:.0f} points either way", fix


@_info("prompts-trained", "data.loss_on", "arXiv 2305.14314, table 10: training on answers alone is better")
def _(s: Situation) -> Finding:
    if s.run.data.loss_on != "all" or (s.data is not None and s.data.raw):
        return None
    return "the questions are trained as well as the answers", "set data.loss_on=assistant"
