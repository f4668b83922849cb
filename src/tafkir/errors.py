"""The exceptions that a user may meet: one line that says what, where, what was expected and how to fix it."""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CapacityError",
    "CheckpointError",
    "DataError",
    "GradingError",
    "Interrupted",
    "RecipeError",
    "RegistryError",
    "RequestError",
    "RolloutError",
    "RunDirError",
    "SamplingError",
    "TafkirError",
    "TrainingError",
]


class TafkirError(Exception):
    """Base of every error that Tafkir raises on purpose.

    The command line prints it as one line and exits with `exit_code`; a library user can read the parts.

    Args:
        what: what is wrong, in a few words.
        where: the recipe path, tensor name or `file:line` it is about.
        expected: what would have been right.
        fix: what to do next.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            line += f"; expected {self.expected}"
        if self.fix:
            line += f". Fix: {self.fix}"
        return " ".join(line.split())


class Interrupted(TafkirError):
    """Ctrl-C ended a command, or SIGTERM did; `exit_code` is what a shell says of such an end, 130 or 143."""

    def __init__(self, signal_number: int, *, fix: str | None = None) -> None:
        self.exit_code = 128 + signal_number
        super().__init__("interrupted", fix=fix)


class RecipeError(TafkirError):
    """A recipe, a `--set` override or a command-line choice is not valid."""

    exit_code = 2


class RegistryError(TafkirError):
    """A model registry refuses a file, a signature or a promotion, or does not hold what is asked for."""


class DataError(TafkirError):
    """A data file is missing, malformed or empty."""


class CheckpointError(TafkirError):
    """A checkpoint is missing, truncated, or does not fit the model it is loaded into."""


class CapacityError(TafkirError):
    """The request does not fit: memory, disk, context length or cache."""


class BackendUnavailable(TafkirError):
    """An optional backend or extra is not installed or cannot run on this machine."""


class GradingError(TafkirError):
    """A grader cannot be built (a grader that fails on one answer records the failure instead)."""


class RequestError(TafkirError):
    """A generation request is not valid (sampling parameters, empty or over-long prompt)."""


class RolloutError(TafkirError):
    """A rollout server or worker died, answered late, or answered what cannot be trained on."""


class SamplingError(TafkirError):
    """No token can be drawn: the logits are not finite."""


class RunDirError(TafkirError):
    """A run directory cannot be created, read or written, or holds something else."""


class TrainingError(TafkirError):
    """Training cannot go on: the loss is not finite, or a limit set in the recipe was crossed."""
