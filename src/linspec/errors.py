"""Every error that linspec raises on purpose.

LinspecError
├── ConfigError          a setting breaks a rule (also a ValueError)
├── InputError           a prompt, text or data set cannot be used (also a ValueError)
│   └── WrongType            it is not even of a type that could be (also a TypeError)
├── CheckpointError      a model directory cannot be read or written
│   └── UnsupportedModel     the directory is sound, its family is not known
├── StateError           a state cannot do what was asked
│   ├── ContextOverflow      a sequence outgrew what the model can attend to
│   └── WorkerStopped        a server is shutting down
├── QueueFull            a server has no room for a request now
├── DrafterError         a drafter does not fit its target
├── NotFinite            a model computes NaN or infinity
└── TrainingError        training cannot go on (NaN loss, output in use)

Messages name the value, the rule and the way out.
"""

from __future__ import annotations


class LinspecError(Exception):
    """Base class: catch this to catch everything linspec raises on purpose."""


class ConfigError(LinspecError, ValueError):
    """A setting breaks a rule."""


class InputError(LinspecError, ValueError):
    """A prompt, a text or a data set cannot be used."""


class WrongType(InputError, TypeError):
    """A prompt or a setting is of a type that can never be used."""


class CheckpointError(LinspecError):
    """A model directory cannot be read or written."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is of a family that linspec does not know."""


class StateError(LinspecError):
    """A state cannot do what was asked of it."""


class ContextOverflow(StateError):
    """A sequence is longer than the model can attend to."""


class WorkerStopped(StateError):
    """A server takes and answers no more requests."""


class QueueFull(LinspecError):
    """A server has no room for a request now; `retry_after` is in how many seconds it may have some."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrafterError(LinspecError):
    """A drafter does not fit the model it should draft for."""


class NotFinite(LinspecError):
    """A model computes NaN or infinity; `what` names the values, in the plural."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} are NaN or infinite: the weights are damaged, or too large for their number "
            "format; `linspec verify MODEL --files` says whether a file is damaged"
        )


class TrainingError(LinspecError):
    """Training cannot start or cannot go on."""
