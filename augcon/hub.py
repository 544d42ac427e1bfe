"""The hub: models by name, downloaded where they are not a folder here; datasets that are uploaded."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from augcon.errors import UserError, one_line

# What a model needs besides its weights: configuration, tokenizer, templates.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")
_ELSEWHERE = ["consolidated*", "*/*"]  # a second copy of the weights, in the form of another library
_EXPORTED = ["train.*", "held_out.*"]  # of an earlier export, which may have had other files
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class Model:
    """A model's name, its folder, here or in the hub's cache, and what is not in there yet: file → bytes."""

    name: str
    folder: Path
    missing: dict[str, int] = field(default_factory=dict)

    def to_download(self) -> str:
        """What download() would do. Raises UserError where the disk has no room for it."""
        need, free = sum(self.missing.values()), shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
        what = f"{need / 1e9:.1f} GB of model {self.name!r}; {free / 1e9:.1f} GB are free in {constants.HF_HUB_CACHE}"
        if need > free:
            raise UserError(f"no room to download {what}; free some, or set HF_HOME to a folder on a larger disk")
        return what if need else "nothing"

    def download(self) -> Path:
        """Downloads what is missing, with the hub's own progress; the folder. Raises UserError where that fails."""
        if self.missing:
            print(f"downloading {self.to_download()}", flush=True)
            with _in_one_line(self.name):
                _fetch(self.name)
        return self.folder


def find_model(name: str) -> Model:
    """A model here or on the hub; of the latter no more than .json files are downloaded. Raises UserError without one.

    Where the hub cannot be reached, or with HF_HUB_OFFLINE=1, it has to be in the cache, and whole.
    """
    if Path(name).is_dir():
        return Model(name, Path(name))
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"there is no folder {name}; give a model's folder or its name on the hub")
    with _in_one_line(name):
        try:
            with disable_progress_bars():
                folder = _fetch(name, ["*.json"])
                files = _fetch(name, dry_run=True)
        except errors.DryRunError:
            return Model(name, Path(_fetch(name)))
    return Model(name, Path(folder), {file.filename: file.file_size or 0 for file in files if file.will_download})


def model_folder(name: str) -> Path:
    """The folder of a model, downloaded from the hub unless it is a folder here. Raises UserError without one."""
    return find_model(name).download()


def check_login() -> None:
    """Raises UserError where there is no token for the hub."""
    if not get_token():
        raise UserError(f"there is no token for the hub; {_LOGIN}")


def upload_dataset(folder: Path, name: str) -> str:
    """Uploads a folder as a dataset, private if it is new; its address. Raises UserError where the hub refuses."""
    api = HfApi()
    try:
        with disable_progress_bars():
            made = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
            api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, delete_patterns=_EXPORTED)
    except (OSError, ValueError, errors.HTTPError) as error:
        raise UserError(f"the hub does not take dataset {name!r}: {one_line(error)}") from error
    return str(made)


def _fetch(name: str, patterns: list[str] | None = None, dry_run: bool = False) -> Any:
    """Downloads a model's files into the cache: its folder there, or of a dry run each file."""
    wanted = patterns or ["*.safetensors", *COMPANIONS]
    return snapshot_download(name, allow_patterns=wanted, ignore_patterns=_ELSEWHERE, dry_run=dry_run)


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turns what the hub raises into a UserError."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: accept its terms on its page of the hub, then {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model {name!r} is neither a folder nor on the hub; check the name, or, if it is private, {_LOGIN}"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        raise UserError(
            f"model {name!r} is not a folder, and the hub does not give it ({one_line(error, 160)}); check the name "
            "and the network, or use what is downloaded already with HF_HUB_OFFLINE=1"
        ) from error


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
