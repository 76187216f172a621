"""Reads a checkpoint, or says that it is damaged."""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: Path, device: torch.device, names: Collection[str]) -> dict[str, Any]:
    """What torch.save wrote there, with the checksums that it wrote and torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            sound = file.testzip() is None
        state = torch.load(path, map_location=device) if sound else None
    except Exception:  # noqa: BLE001  there is no kind of error that a damaged zip or pickle does not raise
        state = None
    if not isinstance(state, dict) or state.keys() != set(names):
        raise SystemExit(f"{path} cannot be read: it was damaged after it was written. Delete it, or give another --out.")
    return state
