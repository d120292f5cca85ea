"""Whole files under one root, in a local (or shared) folder or in an S3 bucket."""

from __future__ import annotations

from impactx.storage.storage import DamagedError, Storage, StorageError

__all__ = ["DamagedError", "Storage", "StorageError"]
