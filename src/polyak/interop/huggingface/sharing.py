"""Sharing a model: a folder with weights, tokenizer and model card, and its upload to the hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.errors import ConfigError, RunError
from polyak.files import make_folder, reason, write_atomic
from polyak.interop.card import card, model_card
from polyak.trust import trusting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def share(
    run: str | Path,
    folder: str | Path,
    *,
    place: str | None = None,
    trust_code: bool = False,
) -> Path:
    """Copy a finished run's model into a folder, as people will load it, with its card.

    Runs written before polyak knew of Hugging Face get the files they lack.

    Args:
        run: the run's folder.
        folder: a new or empty folder.
        place: what the card's example loads; default the folder's name.
        trust_code: run the code of a rule that comes with the run.

    Returns:
        The folder: config.json, modeling_polyak.py, model.safetensors, tokenizer files,
        generation_config.json, README.md, and the code of a rule of the user's own.

    Raises:
        RunError: not a finished run, or the folder is not empty or cannot be written.
    """
    from polyak.training.runs.folder import load_run
    from polyak.training.runs.model_files import write_model_files, write_weights_hash

    target = Path(folder)
    with trusting(trust_code):
        text = model_card(run, place=place or target.name)
        model, tokenizer = load_run(run)  # refuses what does not load
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} is not an empty folder; choose another")
    make_folder(target)
    tokenizer.save(target)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_model_files(target, model.config, tokenizer, dtype)
    source = Path(run) / "model" / "model.safetensors"
    try:
        shutil.copyfile(source, target / source.name)
    except OSError as error:
        raise RunError(f"cannot copy {source} to {target}: {reason(error)}") from error
    write_weights_hash(target)
    write_atomic(target / "README.md", text)
    return target


def push(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    trust_code: bool = False,
) -> str:
    """Upload a finished run's model to the hub, with its tokenizer and card.

    Args:
        run: the run's folder.
        repo_id: `user/name`; made if it does not exist.
        private: of a new repository; None as the account says.
        token: an access token; None for the one that `hf auth login` stored.
        commit_message: of the upload.
        trust_code: run the code of a rule that comes with the run.

    Returns:
        Address of the commit.

    Raises:
        RunError: not a finished run, or the upload fails, with the reason and what to do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = share(run, Path(scratch) / "model", place=repo_id, trust_code=trust_code)
        return _upload(folder, repo_id, private, token, commit_message)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    tokenizer: Any = None,
    **others: Any,
) -> str:
    """Upload a loaded model with a card; what `model.push_to_hub` calls.

    A model that was loaded from a run's `model/` folder and has its weights still gets the run's
    numbers into the card. Other arguments of transformers' `push_to_hub` are not supported.

    Raises:
        ConfigError: an argument that is not supported.
        RunError: the upload fails, with the reason and what to do.
    """
    if others:
        raise ConfigError(
            f"push_to_hub({', '.join(f'{name}=' for name in others)}) is not supported; use "
            "private, token, commit_message and tokenizer"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        run = _run_of(model)
        text = (
            model_card(run, place=repo_id)
            if run is not None
            else card(model.config.model_config(), place=repo_id)
        )
        write_atomic(folder / "README.md", text)
        return _upload(folder, repo_id, private, token, commit_message)


def _run_of(model: PreTrainedModel) -> Path | None:
    """The run whose weights a model has, to the last bit; None if it has none or others."""
    import torch
    from safetensors.torch import load_file

    folder = Path(model.name_or_path or ".")
    if folder.name != "model" or not (folder.parent / "result.json").exists():
        return None
    trained = load_file(folder / "model.safetensors")
    now = dict(model.named_parameters())
    same = trained.keys() == now.keys() and all(
        torch.equal(trained[name], now[name].detach().cpu()) for name in trained
    )
    return folder.parent if same else None


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a model of polyak",
        )
    except Exception as error:  # requests' in one version, httpx's in the other
        said = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"cannot upload to {repo_id!r}: {type(error).__name__}: {said[:200]}; see to the "
            "connection and `hf auth login`, or make a folder with "
            "polyak.interop.huggingface.share and upload that with `hf upload`"
        ) from error
    return str(info.commit_url)
