"""The errors a user can see: each names the field or tensor, what was found and what is allowed."""

from __future__ import annotations


class PluginError(ValueError):
    """Base of every error this package raises on bad input.

    The message is one sentence a line: *where*, *what was found*, *what is allowed*.
    """

    def __init__(self, where: str, found: str, allowed: str) -> None:
        self.where, self.found, self.allowed = where, found, allowed
        super().__init__(f"{where}: found {found}; allowed: {allowed}")

    def __reduce__(self):
        # Engines pickle exceptions between processes; the default rebuilds from the message alone.
        return type(self), (self.where, self.found, self.allowed)


class ConfigError(PluginError):
    """A setting of the plugin is unknown, has a value that is not allowed, or contradicts another."""


class CheckpointError(PluginError):
    """A checkpoint's files, tensors or quantisation description cannot be served."""


class UnsupportedLayerError(PluginError):
    """No provider can serve a layer, or the configuration forbids the one that could (``strict``)."""
