"""The report as a page: one file that opens offline. Reads JSON only."""

from stillroom.web.page import render, write

__all__ = ["render", "write"]
