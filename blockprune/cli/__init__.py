"""The command line: thin, and quick to start, since torch is imported by the commands that run."""

from __future__ import annotations

from blockprune.cli.app import app, main

__all__ = ["app", "main"]
