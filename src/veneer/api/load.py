"""A run, an adapter or a base, loaded to answer."""

from dataclasses import dataclass
from typing import Any

from veneer.config import Model, Run, UserError
from veneer.config.names import find_adapter
from veneer.data import Renderer
from veneer.machine import find_machine
from veneer.model import load_adapter, load_model, load_tokenizer, locate
from veneer.release import Origin, find_origin


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer: a base with an adapter, or a base alone (`origin` is None then).

    Attributes:
        run: Of an adapter that stands in its run's folder.
        origin: Where adapter and base came from.
    """

    model: Any
    renderer: Renderer
    run: Run | None
    origin: Origin | None = None


def load(name: str, force: bool = False, base: str | None = None) -> Loaded:
    """Load a run, one of its checkpoints or an adapter by its folder, or a base model by any name `model.base` takes.

    Args:
        name: Of the run, the checkpoint, the adapter or the model.
        force: Put the adapter on its base even where its passport says that it does not belong there.
        base: Another base than the adapter names.

    Raises:
        UserError: There is nothing of that name, the run has no adapter yet, or it does not belong to the base.
    """
    machine = find_machine()
    if find_adapter(name) is None:
        if base is not None:
            raise UserError(f"--base {base}: {name} is no adapter, which a base could be put under", "leave it out")
        settings = Model(base=name)
        source = locate(settings)
        renderer = Renderer(load_tokenizer(source))
        return Loaded(load_model(source, settings, None, machine), renderer, None)
    origin = find_origin(name, base, force)
    # Tokenizer and template as they were in training, whatever has become of the base's or of a template's file.
    renderer = origin.renderer()
    model = load_model(origin.source, origin.model, origin.quantization, machine)
    run = origin.run and origin.run.model_copy(update={"model": origin.model})  # with the base that was named instead
    return Loaded(load_adapter(model, origin.adapter), renderer, run, origin)
