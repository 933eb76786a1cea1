"""onejump: generators that sample in one or two network calls. The reference toolkit for consistency models."""

__version__ = "0.1.0"
