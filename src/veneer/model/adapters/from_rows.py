"""EVA (arXiv 2410.07170) begins an adapter's A with the directions in which a run's own rows vary most at its input.

PEFT computes them, by an incremental principal component analysis of each module's inputs over minibatches, until they
hold still; and it gives ranks to the modules where they explain most, with the same sum. B is zero, so that the model
is at first its base, in 4 bits too.

A resumed run takes its ranks from its checkpoint, whose weights it gets anyway.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from veneer.config import UserError
from veneer.config.notify import notify
from veneer.data.batch import UNTRAINED, Example
from veneer.model.quiet import quiet

KIND = "eva"  # value of init_lora_weights
RHO = 2.0  # most ranks of a module, of those that it would have; PEFT's default
TOKENS_A_RANK = 4  # trained tokens in a minibatch for each rank that a module may get
LEAST_TOKENS = 256
MOST_BATCHES = 300
SETTING = f"adapter.init_lora_weights = {KIND}"
FIX = "lower adapter.r, or set adapter.init_lora_weights: true"


def start_from_rows(model: Any, rows: Sequence[Example], checkpoint: Path | None = None) -> None:
    """Fill A of a new adapter, in place, and give each module its rank.

    Args:
        model: PEFT model of `init_lora_weights: eva`; float32 matrices.
        rows: training data.
        checkpoint: folder of the checkpoint that a run goes on from; None: it begins.

    Raises:
        UserError: there are too few trained tokens, or the directions do not hold still.
    """
    with quiet():
        from peft import get_eva_state_dict, initialize_lora_eva_weights

        if checkpoint is not None:
            a_RI = _of_checkpoint(model, checkpoint)
        else:
            notify("the adapter's first values are computed from the training rows (EVA)", "info", SETTING)
            a_RI = get_eva_state_dict(model, _Minibatches(model, rows), forward_fn=_forward, show_progress_bar=False)
        a_RI = {name: value.float() for name, value in a_RI.items()}
        initialize_lora_eva_weights(model, eva_state_dict=dict(a_RI))
    for name, layer in model.named_modules():
        if name in a_RI and len(a_RI[name]):
            for half in (layer.lora_A, layer.lora_B):
                half["default"].float()  # PEFT makes those of a new rank in the base's dtype
            layer.lora_A["default"].weight.data.copy_(a_RI[name])


def _of_checkpoint(model: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    held = load_file(folder / "adapter_model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if "default" in getattr(layer, "lora_A", ())}
    return {
        name: held.get(f"{name}.lora_A.weight", torch.empty(0, layer.in_features)) for name, layer in layers.items()
    }


def _forward(model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
    """Compute a minibatch up to the last hidden state, or to the logits where the head is adapted."""
    base = model.get_base_model()
    inner = base if hasattr(base.get_output_embeddings(), "base_layer") else base.base_model
    inner(input_ids=inputs["input_ids"], use_cache=False)


class _Minibatches:
    """Rows as PEFT goes through them, again and again: padded on the right, with labels where tokens are trained."""

    def __init__(self, model: Any, rows: Sequence[Example]) -> None:
        config = model.peft_config["default"]
        most = int(RHO * max([config.r, *config.rank_pattern.values()]))
        self._least = max(LEAST_TOKENS, TOKENS_A_RANK * most)
        self._rows, self._device, self._given = rows, model.device, 0
        trained = sum(row.trained for row in rows)
        if trained < self._least:
            raise UserError(
                f"{SETTING}: the training rows have {trained:,} trained tokens, and rank {config.r} needs "
                f"{self._least:,}",
                FIX,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        found: list[Example] = []
        for row in self._rows:
            found.append(row)
            if sum(row.trained for row in found) >= self._least:
                yield self._padded(found)
                found = []

    def _padded(self, rows: Sequence[Example]) -> dict[str, torch.Tensor]:
        self._given += 1
        if self._given > MOST_BATCHES:
            raise UserError(
                f"{SETTING}: after {MOST_BATCHES} minibatches the directions of the rows do not hold still: they vary "
                "in fewer than the ranks that are asked for, or too evenly",
                FIX,
            )
        ids = [torch.from_numpy(row.ids).long() for row in rows]
        labels = [torch.from_numpy(row.weights).ne(0) for row in rows]
        mask = pad_sequence(labels, batch_first=True)
        ids_BL = pad_sequence(ids, batch_first=True)
        return {
            "input_ids": ids_BL.to(self._device),
            "labels": torch.where(mask, ids_BL, UNTRAINED).to(self._device),
        }
