"""Finds what a run trains beside the adapter's matrices: biases, whole modules, rows of embeddings and head.

PEFT trains and saves them (`bias`, `modules_to_save`, `trainable_token_indices`), but leaves out a name that matches
nothing without a word, and matches names by their last letters; so it is given whole paths. A head that shares the
embeddings' weights is trained with them, as one, since a merged model has one tensor for both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from veneer.config import Adapter, UserError
from veneer.model.adapters import find_method
from veneer.model.shapes import Shapes
from veneer.model.target_modules import matches_nothing, names_of


@dataclass(frozen=True)
class TrainedParts:
    """What is trained beside the adapter's matrices.

    Attributes:
        biases: names of biases.
        modules: paths of modules that are trained whole.
        rows: path of an embedding or a head, and the tokens whose rows of it are trained.
        tied: path of a head that shares the embeddings' weights and follows them; None: none of either is trained, or
            they are two tensors.
    """

    biases: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tied: str | None = None

    @property
    def paths(self) -> frozenset[str]:
        """The modules that are trained whole or in part, but for biases."""
        return self.modules | {path for path, _ in self.rows} | ({self.tied} if self.tied is not None else set())

    def sizes(self, shapes: Shapes) -> list[int]:
        """Return the sizes of the parameters."""
        return self.sizes_in_base_dtype(shapes) + [len(tokens) * shapes.side(path)[1] for path, tokens in self.rows]

    def sizes_in_base_dtype(self, shapes: Shapes) -> list[int]:
        """Return the sizes of those that PEFT keeps in the dtype of the base: biases and modules; rows are float32."""
        whole = {name: shape for name, shape in shapes.weights.items() if name.rpartition(".")[0] in self.modules}
        return [prod(shape) for name, shape in shapes.weights.items() if name in whole or name in self.biases]


NO_PARTS = TrainedParts()


def find_parts(shapes: Shapes, adapter: Adapter, new_tokens: Sequence[int] = ()) -> TrainedParts:
    """Find what a run trains beside the adapter's matrices.

    Args:
        shapes: shapes of the base.
        adapter: section `adapter` of the run.
        new_tokens: ids of tokens that the run adds; their rows are trained.

    Raises:
        UserError: a name matches nothing, a token is beyond the vocabulary, or two settings train the same module.
    """
    targets = shapes.targets(adapter)
    modules = _modules(shapes, adapter.modules_to_save or ())
    rows = _rows(shapes, adapter.trainable_token_indices or ())
    for path in (shapes.tokens, None if shapes.is_tied else shapes.head):
        if path is not None and new_tokens and path not in modules:
            rows[path] = (*rows.get(path, ()), *new_tokens)
    if rows and not find_method(adapter).is_lora:  # the others refuse the setting `trainable_token_indices` themselves
        raise UserError(
            f"data.add_special_tokens: PEFT trains rows of embeddings beside LoRA and DoRA alone, and the run has "
            f"adapter.method = {adapter.method}",
            "leave it out, or set adapter.method: lora",
        )
    follows = shapes.is_tied and (shapes.tokens in modules or shapes.tokens in rows)
    for path in (*modules, *rows, *([shapes.head] if follows else ())):
        if path in targets or (path in modules and path in rows):
            other = "target_modules" if path in targets else "trainable_token_indices"
            setting = "modules_to_save" if path in modules else "trainable_token_indices"
            if path in rows and new_tokens:
                setting = "add_special_tokens (of the section data)"
            raise UserError(
                f"adapter.{setting} trains {path}, and so does adapter.{other}",
                "leave it out of one of the two; adapter.exclude_modules takes modules out of target_modules",
            )
    return TrainedParts(
        biases=_biases(shapes, adapter.bias, targets, modules),
        modules=modules,
        rows=tuple(sorted(rows.items())),
        tied=shapes.head if follows else None,
    )


def _biases(shapes: Shapes, bias: str, targets: frozenset[str], modules: frozenset[str]) -> frozenset[str]:
    if bias == "none":
        return frozenset()
    found = frozenset(
        name
        for name in shapes.weights
        if name.endswith("bias")
        and (path := name.rpartition(".")[0]) not in shapes.beside | modules
        and (bias == "all" or path in targets)
    )
    if not found:
        who = "the adapted modules have" if bias == "lora_only" else "this base has"
        raise UserError(f"adapter.bias = {bias}: {who} no biases", "set adapter.bias: none")
    return found


def _modules(shapes: Shapes, names: Sequence[str]) -> frozenset[str]:
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes.weights))
    paths += [shapes.head] if shapes.is_tied and shapes.head is not None else []
    found = set[str]()
    for name in names:
        matched = {path for path in paths if path == name or path.endswith(f".{name}")}
        if not matched:
            ends = [path for path in (shapes.tokens, shapes.head) if path is not None]
            raise matches_nothing("modules_to_save", name, names_of([*ends, *paths]), "write the end of a path")
        found |= matched
    if shapes.is_tied and shapes.head in found:
        found = found - {shapes.head} | {str(shapes.tokens)}
    return frozenset(found)


def _rows(shapes: Shapes, named: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    setting = "trainable_token_indices"
    by_name = dict(named) if isinstance(named, Mapping) else {str(shapes.tokens): named} if named else {}
    ends = [path for path in (*shapes.embeddings, shapes.head) if path is not None]
    found = dict[str, tuple[int, ...]]()
    for name, tokens in by_name.items():
        matched = [path for path in ends if path == name or path.endswith(f".{name}")]
        if not matched:
            raise matches_nothing(setting, name, names_of(ends), "name the embeddings or the head")
        path = str(shapes.tokens) if shapes.is_tied and matched[0] == shapes.head else matched[0]
        known = shapes.side(path)[0]
        if (largest := max(tokens)) >= known:
            raise UserError(
                f"adapter.{setting}: token {largest}, and {path} has rows for tokens from 0 to {known - 1}",
                "name tokens of the vocabulary; data.add_special_tokens adds new ones",
            )
        if len(set(tokens)) < len(tokens):
            raise UserError(f"adapter.{setting}: a token is named twice", "name each once")
        if found.setdefault(path, tuple(tokens)) != tuple(tokens):
            raise UserError(
                f"adapter.{setting}: embeddings and head of this base share their weights, and are given other tokens",
                "name the same tokens for both, or give a list",
            )
    return found
