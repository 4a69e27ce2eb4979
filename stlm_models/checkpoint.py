"""Checkpoints that are complete or absent: written aside, synced, renamed, verified when read.

A run folder holds `checkpoints/step-00001234/` with the model and the optimiser as safetensors,
`config.json`, `state.json`, for a model of words `words.json`, and `manifest.json` with the SHA-256
of each and the id of the run. Nothing is pickled.

A folder is a checkpoint where it has exactly such a name and holds a manifest: what else is there
belongs to the user, and is neither read nor deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig, config_from_dict
from .data.words import WordVocabulary
from .files import sync_folder
from .layers.joined import join_parts
from .model import STLM

WORDS = "words.json"
MANIFEST = "manifest.json"
RUN = "run"
"""The key of a run's id in the state and the manifest. Version 0.1.0 wrote none."""
NAME = re.compile(r"step-([0-9]{8,})")
SCANS = 10
"""Number of looks at a folder without a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of one checkpoint.

    Args:
        config: the model's.
        model: its state dict; a tied table is one tensor in it.
        optimizer: its tensors by name.
        state: plain values, among them "step" and, for a run that has one, its id "run".
        words: the vocabulary of a model of words.
        digest: of one that was loaded, SHA-256 of the SHA-256 of its config and of its model.
    """

    config: ModelConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    words: WordVocabulary | None = None
    digest: str = ""


def require_extra(packages: Sequence[str]) -> None:
    """Raise an ImportError with the install line where one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"missing {', '.join(missing)}: pip install {' '.join(missing)}")


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint into the run folder, then drop older ones of the same run.

    The folder gets its name when all of it is on disk, so that a folder with it is whole.

    Raises:
        OSError: where it cannot be written; what was there before stays, nothing half-written does.
        FileExistsError: where the folder holds a checkpoint of another run, a later one of this
            run, another one of the same step, or something else of that name.
    """
    from safetensors.torch import save

    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    step, run_id = int(checkpoint.state["step"]), checkpoint.state.get(RUN)
    path = root / _name(step)
    _require_own(root, step, run_id)
    files = {
        "model.safetensors": save(_contiguous(checkpoint.model)),
        "optimizer.safetensors": save(_contiguous(checkpoint.optimizer)),
        "config.json": _json(checkpoint.config.to_dict()),
        "state.json": _json(checkpoint.state),
    }
    if checkpoint.words is not None:
        files[WORDS] = checkpoint.words.to_json()
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if run_id is not None:
        manifest[RUN] = run_id
    if os.path.lexists(path):
        _require_same(path, manifest)
        return path
    unfinished = root / _unfinished_name(path.name, run_id)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        for file, data in {**files, MANIFEST: _json(manifest)}.items():
            _write_synced(unfinished / file, data)
        sync_folder(unfinished)
        unfinished.rename(path)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(root)
    _drop_older(root, step, run_id)
    return path


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    # While another process saves, a scan may see neither the name that comes nor that which goes.
    for _ in range(SCANS):
        found = max(_checkpoints(run / "checkpoints"), default=None)
        if found is not None:
            return found[1]
    return None


def load_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, every byte of it verified.

    Another process may be saving: where its newer one takes the place of the one that is being
    read, the newer one is.

    Raises:
        ValueError: where there is none, or one of its files is missing, damaged or not ours.
    """
    folder = latest_checkpoint(run)
    if folder is None:
        raise ValueError(_nothing_in(run / "checkpoints"))
    while True:
        try:
            return _load(folder)
        except (ValueError, OSError):
            newest = latest_checkpoint(run)
            if newest is None or newest == folder:
                raise
            folder = newest


def _nothing_in(root: Path) -> str:
    without_manifest = max(_named(root), default=None)
    if without_manifest is not None:
        return f"checkpoint: expected a file {without_manifest[1] / MANIFEST}, found none"
    return f"checkpoint: expected one in {root}, found none"


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load

    manifest = _parse(folder / MANIFEST, _read(folder / MANIFEST))
    names = ("model.safetensors", "optimizer.safetensors", "config.json", "state.json")
    files = {name: _verified(folder / name, manifest) for name in names}
    state = _parse(folder / "state.json", files["state.json"])
    if "options" in state:
        state["options"] = _in_todays_names(state["options"])
    config = config_from_dict(
        _in_todays_names(_parse(folder / "config.json", files["config.json"]))
    )
    model, optimizer = (load(files[name]) for name in names[:2])
    words = None
    if WORDS in manifest:
        words = WordVocabulary.from_json(_verified(folder / WORDS, manifest))
    digest = hashlib.sha256((manifest["config.json"] + manifest["model.safetensors"]).encode())
    return Checkpoint(config, model, optimizer, state, words, digest.hexdigest())


RENAMED = {
    "patch_capacity": "max_patches",
    "rows": "batch_size",
    "accumulate": "grad_accum_steps",
    "clip": "max_grad_norm",
}
"""Fields of configs and options as early runs of 0.1.0 wrote them."""


def _in_todays_names(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, or of the options of a training run, that may be of an early run."""
    named = {RENAMED.get(name, name): value for name, value in values.items()}
    if named.get("patch_rule") == "given":
        named["patch_rule"] = "external"
    return named


def load_model(run: Path) -> STLM:
    """The model of a run folder, on the CPU and in eval mode.

    Raises:
        ValueError: as `load_checkpoint`, and where the tensors are not those of the config.

    >>> model = load_model(run)  # a folder of `stlm_models.train --out`
    >>> len(model.generate(b"def ", max_new_bytes=8))
    8
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
    """Copy tensors into the model, with one clear line for whatever does not fit.

    Matrices that the model holds in one weight may come one by one, as 0.1.0 saved them.
    """
    tensors = join_parts(model, tensors)
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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _unfinished_name(name: str, run_id: object) -> str:
    """A name for each run, so that none deletes what another is about to write."""
    if run_id is None:  # as version 0.1.0 named them
        return f".unfinished-{name}"
    return f".unfinished-{name}-{hashlib.sha256(str(run_id).encode()).hexdigest()[:16]}"


def _named(root: Path) -> Iterator[tuple[int, Path]]:
    """Steps and paths of the folders that have a checkpoint's name, in any order."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        match = NAME.fullmatch(folder.name)
        if match and folder.name == _name(int(match[1])) and folder.is_dir():
            yield int(match[1]), folder


def _checkpoints(root: Path) -> Iterator[tuple[int, Path]]:
    return ((step, folder) for step, folder in _named(root) if (folder / MANIFEST).is_file())


def _run_of(folder: Path) -> object:
    """The id of the run that wrote a checkpoint; None where it has none."""
    try:
        return _parse(folder / MANIFEST, _read(folder / MANIFEST)).get(RUN)
    except ValueError as error:
        raise FileExistsError(f"{error}: move {folder}") from None


def _require_own(root: Path, step: int, run_id: object) -> None:
    """Raise a FileExistsError where the folder holds what this run has not written before."""
    for found, folder in _checkpoints(root):
        if _run_of(folder) != run_id:
            raise FileExistsError(
                f"checkpoint: {folder} is of another run: move it, or save into another folder"
            )
        if found > step:
            raise FileExistsError(
                f"checkpoint: {folder} is later than step {step}, which would take its place: move"
                " it, or save into another folder"
            )


def _require_same(folder: Path, manifest: Mapping[str, str]) -> None:
    """Raise a FileExistsError where the name is taken by anything but the checkpoint itself."""
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"checkpoint: {folder} is in the way and no checkpoint: move it")
    found = _parse(folder / MANIFEST, _read(folder / MANIFEST))
    # How a run came to a step (its seconds, its options) may be told twice; what it is, once.
    found["state.json"] = manifest["state.json"]
    if found != manifest:
        raise FileExistsError(f"checkpoint: {folder} holds another one of the same step: move it")


def _drop_older(root: Path, step: int, run_id: object) -> None:
    """Delete this run's older checkpoints, and what a process that was killed left behind."""
    for found, folder in list(_checkpoints(root)):
        if found < step and not folder.is_symlink() and _is_whole_and_ours(folder, found, run_id):
            # Renamed first: a checkpoint that is half deleted must not look like one.
            folder.rename(root / _unfinished_name(folder.name, run_id))
    left_behind = re.compile(_unfinished_name("step-[0-9]{8,}", run_id).replace(".", r"\."))
    for folder in root.iterdir():
        if left_behind.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _is_whole_and_ours(folder: Path, step: int, run_id: object) -> bool:
    """Tell whether this run wrote it at this step, and no file was renamed or added since."""
    try:
        manifest = _parse(folder / MANIFEST, _read(folder / MANIFEST))
        state = _parse(folder / "state.json", _read(folder / "state.json"))
        names = {path.name for path in folder.iterdir()}
    except (ValueError, FileNotFoundError):
        return False
    is_ours = manifest.get(RUN) == run_id and state.get("step") == step
    return is_ours and names <= manifest.keys() - {RUN} | {MANIFEST}


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
