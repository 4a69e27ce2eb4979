"""Checkpoints that are complete or absent: written aside, synced, renamed, verified when read.

A run folder holds `checkpoints/step-00001234/` with the model and the optimiser as safetensors,
`config.json`, `state.json`, for a model of words `words.json`, and `manifest.json` with the SHA-256
of each. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig, config_from_dict
from .model import STLM
from .words import WordVocabulary

WORDS = "words.json"
MANIFEST = "manifest.json"
PREFIX = "step-"
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    Args:
        config: the model's.
        model: its state dict; a tied table is one tensor in it.
        optimizer: its tensors by name.
        state: plain values, among them "step".
        words: the vocabulary of a model of words.
        digest: of one that was loaded, SHA-256 of the SHA-256 of its config and of its model.
    """

    config: ModelConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    words: WordVocabulary | None = None
    digest: str = ""


def require_extra(packages: Sequence[str], extra: str = "train") -> None:
    """Raise an ImportError with the install line where one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ImportError(f"missing {names}: install the extra with  pip install 'stlm[{extra}]'")


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint into the run folder, then drop older ones.

    The folder gets its name when all of it is on disk, so that whoever finds one finds a whole one.

    Raises:
        OSError: where it cannot be written; what was there before stays, nothing half-written does.
        FileExistsError: where the folder holds another checkpoint of the same step.
    """
    from safetensors.torch import save

    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    name = f"{PREFIX}{checkpoint.state['step']:08d}"
    files = {
        "model.safetensors": save(_contiguous(checkpoint.model)),
        "optimizer.safetensors": save(_contiguous(checkpoint.optimizer)),
        "config.json": _json(checkpoint.config.to_dict()),
        "state.json": _json(checkpoint.state),
    }
    if checkpoint.words is not None:
        files[WORDS] = checkpoint.words.to_json()
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if (root / name).exists():
        _require_same(root / name, manifest)
        return root / name
    unfinished = root / f"{UNFINISHED}{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        for file, data in {**files, MANIFEST: _json(manifest)}.items():
            _write_synced(unfinished / file, data)
        _sync_folder(unfinished)
        unfinished.rename(root / name)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(root)
    _drop_others(root, keep=name)
    return root / name


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    return max((run / "checkpoints").glob(f"{PREFIX}*"), default=None)


def load_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, every byte of it verified.

    Raises:
        ValueError: where there is none, or one of its files is missing, damaged or not ours.
    """
    folder = latest_checkpoint(run)
    if folder is None:
        raise ValueError(f"checkpoint: expected one in {run / 'checkpoints'}, found none")
    from safetensors.torch import load

    manifest = _parse(folder / MANIFEST, _read(folder / MANIFEST))
    names = ("model.safetensors", "optimizer.safetensors", "config.json", "state.json")
    files = {name: _verified(folder / name, manifest) for name in names}
    state = _parse(folder / "state.json", files["state.json"])
    config = config_from_dict(_parse(folder / "config.json", files["config.json"]))
    model, optimizer = (load(files[name]) for name in names[:2])
    words = None
    if WORDS in manifest:
        words = WordVocabulary.from_json(_verified(folder / WORDS, manifest))
    digest = hashlib.sha256((manifest["config.json"] + manifest["model.safetensors"]).encode())
    return Checkpoint(config, model, optimizer, state, words, digest.hexdigest())


def load_model(run: Path) -> STLM:
    """The model of a run folder, on the CPU and in eval mode.

    Raises:
        ValueError: as `load_checkpoint`, and where the tensors are not those of the config.
    """
    return model_of(load_checkpoint(run))


def model_of(checkpoint: Checkpoint) -> STLM:
    """The model of a checkpoint, on the CPU and in eval mode.

    Raises:
        ValueError: where the tensors are not those of the config.
    """
    model = STLM(checkpoint.config)
    load_tensors(model, checkpoint.model)
    return model.eval()


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model, with one clear line for whatever does not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                "checkpoint: expected the tensors of its own configuration, but"
                f" {name} is {found.get(name, 'missing')} instead of {expected.get(name, 'absent')}"
            )
    model.load_state_dict(dict(tensors))


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _json(values: object) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _require_same(folder: Path, manifest: Mapping[str, str]) -> None:
    """Raise a FileExistsError where the folder holds other parameters than the manifest lists."""
    found = _parse(folder / MANIFEST, _read(folder / MANIFEST))
    # How a run came to a step (its seconds, its options) may be told twice; what it is, once.
    found["state.json"] = manifest["state.json"]
    if found != manifest:
        raise FileExistsError(f"checkpoint: {folder} holds another one of the same step: move it")


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; a synced file may otherwise lose its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop_others(root: Path, keep: str) -> None:
    for folder in root.iterdir():
        if folder.name.startswith(PREFIX) and folder.name != keep:
            # Renamed first: a checkpoint that is half deleted must not look like one.
            folder = folder.rename(root / f"{UNFINISHED}{folder.name}")
        if folder.name.startswith(UNFINISHED):
            shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a file {path}, found none")
    return path.read_bytes()


def _verified(path: Path, manifest: dict[str, Any]) -> bytes:
    data = _read(path)
    expected = manifest.get(path.name)
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise ValueError(
            f"checkpoint: {path} is damaged: expected SHA-256 {expected}, got {actual}"
        )
    return data


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} is damaged: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"checkpoint: {path} is damaged: expected a JSON object")
    return values
