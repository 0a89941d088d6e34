"""The same adapters for vLLM, which serves a fleet: what of them it accepts, and the command that serves them.

vLLM has one chat template and one set of stop tokens a server, and adds no system prompt; so the adapters have to agree
in these. A system prompt of the runs is written into the template that the command names.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.model.tuned import TunedModel
from veneer.release.publish.vllm_lint import vllm_lint

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
WITH_SYSTEM = (
    "{{%- if messages[0]['role'] != 'system' %}}"
    "{{%- set messages = [{{'role': 'system', 'content': {prompt}}}] + messages %}}{{%- endif %}}"
)


def refusals(adapters: Sequence[tuple[str, TunedModel]]) -> list[str]:
    """Return what vLLM would refuse, or answer otherwise than the runs were evaluated; empty: nothing."""
    found = []
    for name, tuned in adapters:
        if tuned.is_full:
            found.append(f"{name}: all weights were trained; serve {tuned.adapter} itself")
            continue
        found += [f"{name}: {check.detail}" for check in vllm_lint(tuned.adapter) if not check.passed]
        if tuned.added_tokens:
            found.append(f"{name}: it adds tokens, which vLLM does not take with an adapter; merge it")
    shared: dict[str, set[Any]] = {
        "chat templates": {tuned.renderer.template for _, tuned in adapters},
        "system prompts": {tuned.renderer.settings.system_prompt for _, tuned in adapters},
        "stop tokens": {tuple(tuned.stop_ids) for _, tuned in adapters if not tuned.is_full},
    }
    for what, values in shared.items():
        if len(values) > 1:
            found.append(f"{', '.join(name for name, _ in adapters)}: {what} differ, and vLLM has one for all")
    return found


def template_for(tuned: TunedModel) -> str | None:
    """Return the chat template for vLLM: the run's, with its system prompt where a conversation has none."""
    renderer = tuned.renderer
    if renderer.template is None or renderer.settings.system_prompt is None:
        return renderer.template
    return (
        WITH_SYSTEM.format(prompt=json.dumps(renderer.settings.system_prompt, ensure_ascii=False)) + renderer.template
    )


def command(adapters: Sequence[tuple[str, TunedModel]], host: str, port: int, template: Path | None) -> list[str]:
    """Return the command that serves adapters with vLLM; a key is read from VLLM_API_KEY there.

    Args:
        adapters: Adapters by name, on one base.
        host, port: Address.
        template: File of the chat template; None: there is none.
    """
    first = adapters[0][1]
    ranks = [rank for _, tuned in adapters for rank in _ranks(tuned.peft_config)]
    largest = next((rank for rank in RANKS if rank >= max(ranks)), max(ranks))
    words = ["vllm", "serve", first.source.location if first.source.kind != "hub" else first.source.name]
    words += ["--host", host, "--port", str(port), "--dtype", first.dtype_name]
    words += ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", str(len(adapters))]
    words += ["--lora-modules", *(f"{name}={tuned.adapter.absolute()}" for name, tuned in adapters)]
    if first.quantization is not None:
        words += ["--quantization", "bitsandbytes"]
    if template is not None:
        words += ["--chat-template", str(template)]
    words += ["--generation-config", "vllm"]
    words += ["--override-generation-config", json.dumps({"stop_token_ids": first.stop_ids})]
    return words


def require_accepted(adapters: Sequence[tuple[str, TunedModel]]) -> None:
    """Raise UserError where vLLM would refuse an adapter or answer otherwise."""
    if wrong := refusals(adapters):
        listed = "\n  ".join(wrong)
        raise UserError(
            f"--engine vllm: it does not serve these as they were evaluated\n  {listed}",
            "merge them, or serve them with veneer's own engine",
        )


def shown(words: Sequence[str]) -> str:
    """Return a command as a shell takes it."""
    return shlex.join(words)


def _ranks(config: dict[str, Any]) -> list[int]:
    return [int(config.get("r") or 8), *map(int, (config.get("rank_pattern") or {}).values())]
