"""Errors that a user can mend, shown as one line."""

from __future__ import annotations


class UsageError(Exception):
    pass
