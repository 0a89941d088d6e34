"""Lists the values that options of merge and export take, known without the libraries that carry them out."""

from veneer.config.errors import UserError

QUANTS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "--dtype": ("bfloat16", "float16", "float32"),
    "--on": ("trained", "base", "nf4", "best"),
    "--format": ("gguf",),
    "--quant": QUANTS,
}


def require_known(option: str, value: str) -> None:
    """Raises UserError for a value that is not among those an option takes."""
    if value not in OPTIONS[option]:
        raise UserError(f"{option} {value}: not known", f"write one of {', '.join(OPTIONS[option])}")
