"""Declares the section `adapter` of a run, by PEFT's names."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from veneer.config.section import Section

TokenId = Annotated[int, Field(strict=True, ge=0)]


class Adapter(Section):
    """The LoRA adapter, as in PEFT's LoraConfig; `adapter: none` trains all weights instead (docs/full.md)."""

    method: Literal["lora", "dora", "vera", "ia3", "loha", "lokr", "oft", "hra", "fourierft"] = Field(
        "lora",
        description="lora; dora, which trains the norm of each row of a weight too (arXiv 2402.09353); or another "
        "method by PEFT's modules, on the reference engine and linear layers: vera, ia3, oft; loha, lokr, hra, "
        "fourierft on bases in 16 or 32 bits. These refuse settings that they do not have.",
        json_schema_extra={"fix": "write lora, dora, vera, ia3, loha, lokr, oft, hra or fourierft"},
    )
    r: int = Field(16, ge=1, le=4096, description="Rank.")
    lora_alpha: float = Field(32, gt=0, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="Modules to adapt: all-linear; attention or mlp, the linear layers of either part of a decoder "
        "layer; a list of these and of names; or a regular expression of their whole paths.",
        json_schema_extra={
            "fix": "write `all-linear` or a list such as [q_proj, v_proj]; `attention`, `mlp`; or a regular expression "
            "of whole paths, such as '.*\\.(q|v)_proj'"
        },
    )
    exclude_modules: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="Modules among those to leave out, written likewise.",
        json_schema_extra={"fix": "write a list such as [k_proj], or a regular expression of whole paths"},
    )
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None,
        description="Numbers of the decoder layers to adapt, from 0; null: all.",
        json_schema_extra={"fix": "write a list of numbers from 0, such as [0, 1, 2]"},
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field(
        {},
        description="Ranks of modules that differ from r, by the end of a path or a regular expression of it, as "
        "{down_proj: 32}; the first that matches counts.",
        json_schema_extra={"fix": "write pairs such as {down_proj: 32}, with ranks from 1 to 4096"},
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Likewise lora_alpha of modules; each is scaled by its own lora_alpha and rank.",
        json_schema_extra={"fix": "write pairs such as {down_proj: 64}, with numbers above 0"},
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).")
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora", "eva", "loftq"] = Field(
        True,
        description="What training begins with. true: A random, B zero; gaussian: likewise, A normal; pissa or olora, "
        "on bases in 16 or 32 bits: the leading part of the base's weights by singular values or QR (arXiv 2404.02948, "
        "2406.01775), saved as plain LoRA of twice the rank on the base as it is; eva: A by what the run's own rows "
        "put into each module, and ranks by how much that explains (arXiv 2410.07170); loftq, on bases in 4 bits: the "
        "error of their rounding (arXiv 2310.08659).",
        json_schema_extra={"fix": "write true, gaussian, pissa, olora, eva or loftq"},
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="Biases of the base to train as well: those of the adapted modules, or all."
    )
    modules_to_save: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="Modules to train whole and to save with the adapter, such as [embed_tokens, lm_head]; embeddings "
        "and a head that share their weights are trained as one.",
        json_schema_extra={"fix": "write a list of names, such as [embed_tokens, lm_head]"},
    )
    trainable_token_indices: (
        Annotated[tuple[TokenId, ...], Field(min_length=1)]
        | dict[str, Annotated[tuple[TokenId, ...], Field(min_length=1)]]
        | None
    ) = Field(
        None,
        description="Tokens whose rows of the embeddings are trained, by id, also in a head that shares them; or ids "
        "by module, as {embed_tokens: [7], lm_head: [7]}.",
        json_schema_extra={"fix": "write a list of token ids, such as [7, 8], or lists by module"},
    )

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        """Refuse a string that is no regular expression of whole paths; PEFT would match nothing, or fail."""
        if not isinstance(value, str) or value in ("all-linear", "attention", "mlp"):
            return value
        if re.fullmatch(r"\w*", value):
            raise ValueError("is a name; names go in a list")
        require_pattern(value)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            require_pattern(pattern)
        return value


def require_pattern(pattern: str) -> None:
    """Raise ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{pattern}` is no regular expression: {error}") from None
