"""Uploading a finished run to the Hugging Face hub: the model and its description, not the course of training."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from data import InputError, first_line
from loading.arguments import RunArguments
from loading.run_files import PUBLISHED


def open_repository(args: RunArguments) -> str | None:
    """Make sure, before anything is trained, that the run can be uploaded; returns the repository's id.

    Without --push_to_hub, and on all processes but the first, it does nothing and returns None.

    Raises:
        InputError: the hub cannot be reached or refuses, or the name is not a valid one.
    """
    if not args.push_to_hub:
        return None
    # Trainer would upload whatever is in the folder, each time it saves.
    args.push_to_hub = False
    if args.process_index != 0 or args.prepare_only:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        return HfApi().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
    except (HTTPError, OSError, HFValidationError) as error:
        raise InputError(f"--push_to_hub: the repository {name} cannot be opened: {first_line(error)}") from error


def publish(folder: Path, repository: str, args: RunArguments) -> str:
    """Upload a finished run's folder as one commit; returns the address of the repository.

    Raises:
        InputError: it failed; nothing is lost, and the same command tries again.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(PUBLISHED),
            commit_message="Training run",
            token=args.hub_token,
            revision=args.hub_revision,
        )
    except (HTTPError, OSError) as error:
        raise InputError(
            f"the run is finished, but its upload to {repository} failed: {first_line(error)}; the same command "
            "tries the upload again"
        ) from error
    return str(commit.repo_url)
