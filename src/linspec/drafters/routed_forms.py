"""The form of a model for each sequence: without the layers that routers find its prompt not to need."""

from __future__ import annotations

from linspec.decoding.sequence import RunningSequence
from linspec.drafters.routers import Routers
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.models.own_forms import skipping

# forms without other layers that are kept for further prompts
_FORMS = 64


class RoutedForms:
    """Chooses the layers of each sequence once, by its prompt alone, and makes the forms.

    skip: how many layers are left out; None: those that are needed less than by half.
    """

    def __init__(self, model: Decoder, routers: Routers, skip: int | None, name: str) -> None:
        if skip is not None and skip > model.config.layers - 2:
            raise DrafterError(
                f"{name} cannot leave out {skip} layers of {model.config.layers}: the first and the last "
                "are kept; lower skip"
            )
        self.model, self.routers, self.skip = model, routers, skip
        self._forms: dict[frozenset[int], Decoder] = {}
        # of each sequence, by its number
        self._skipped: dict[int, frozenset[int]] = {}

    def of(self, sequence: RunningSequence) -> Decoder:
        """The form for a sequence; the model itself where the prompt needs every layer."""
        skipped = self.skipped(sequence)
        if not skipped:
            return self.model
        if skipped not in self._forms:
            if len(self._forms) >= _FORMS:
                del self._forms[next(iter(self._forms))]
            self._forms[skipped] = skipping(self.model, skipped, skipped)
        return self._forms[skipped]

    def skipped(self, sequence: RunningSequence) -> frozenset[int]:
        """The layers that a sequence does without."""
        found = self._skipped.get(sequence.number)
        if found is None:
            prompt = sequence.tokens[: sequence.prompt_length]
            found = self.routers.skipped(self.routers.needed(self.model, prompt), self.skip)
            self._skipped[sequence.number] = found
        return found

    def forget(self, sequence: RunningSequence) -> None:
        """A sequence begins or has ended."""
        self._skipped.pop(sequence.number, None)
