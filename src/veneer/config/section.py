"""Declares what all sections of settings are."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        """Numbers that torch and NumPy hold, and text that names files and is written to them."""
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and part >= 2**63:
                raise ValueError("should be less than 2**63")
            if isinstance(part, str | Path) and _NO_TEXT.search(str(part)):
                raise ValueError("holds NUL or bytes that are not UTF-8; rename the file, or write other text")
        return value
