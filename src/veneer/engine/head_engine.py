"""Makes the engine of a run that writes no text, by its task."""

from typing import Any

import torch

from veneer.config import Model
from veneer.data.batch import Example
from veneer.data.texts import split_texts
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.embedder import EmbeddingEngine
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.model.pooling import find_pooling


def head_engine(settings: Model, model: Any, tokenizer: Any, temperature: float = 0.05) -> ClassifierEngine:
    """Return the engine of a model that classifies or embeds.

    Args:
        settings: settings of the base.
        model: PEFT model, or its base alone.
        tokenizer: tokenizer of the texts.
        temperature: `train.temperature`, for losses of embeddings.
    """
    if settings.task == "token-classification":
        return TokenClassifierEngine.of(model, tokenizer)
    if settings.task in ("sequence-classification", "reward"):
        return ClassifierEngine.of(model, tokenizer)
    engine = EmbeddingEngine.of(model, tokenizer)
    engine.pooling, engine.temperature = find_pooling(settings), temperature
    return engine


def texts_of(task: str, example: Example) -> list[torch.Tensor]:
    """Return the tokens of each text of an example, as the model reads them."""
    if task == "embedding":
        found = split_texts(example.ids)
    elif task == "token-classification":
        found = [example.ids[example.weights == 0]]
    else:
        found = [example.ids[:-1]]
    return [torch.from_numpy(ids).long() for ids in found]
