"""Every error that linspec raises on purpose.

LinspecError
├── ConfigError          a setting breaks a rule (also a ValueError)
├── InputError           a prompt, text or data set cannot be used (also a ValueError)
├── CheckpointError      a model directory cannot be read or written
│   └── UnsupportedModel     the directory is sound, its family is not known
├── StateError           a state cannot do what was asked
│   └── ContextOverflow      a sequence outgrew what the model can attend to
├── DrafterError         a drafter does not fit its target
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


class CheckpointError(LinspecError):
    """A model directory cannot be read or written."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is of a family that linspec does not know."""


class StateError(LinspecError):
    """A state cannot do what was asked of it."""


class ContextOverflow(StateError):
    """A sequence is longer than the model can attend to."""


class DrafterError(LinspecError):
    """A drafter does not fit the model it should draft for."""


class TrainingError(LinspecError):
    """Training cannot start or cannot go on."""
