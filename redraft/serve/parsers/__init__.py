"""Formats in which models write reasoning and tool calls."""
