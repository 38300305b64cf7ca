"""What MODEL is, decided from its files before anything starts; no torch.

A checkpoint that cannot be trained is refused here, in a second, not by every rank after minutes.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from epctl.config_data import ModelSection
from epctl.errors import ConfigError, HubError, InputError, LayoutError
from epctl.hub import parse_reference, resolve
from epctl.hub_download import CODE_FILES, TOKENIZER_FILES, WEIGHT_FILES, download
from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout, VisionLayout
from epctl.layout.source import ModelSource

FILE_NAME = "model.json"
# What turns images into patches, and the template that knows where they stand.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
LOCAL_COPY = "give the path of a local copy: `epctl train ./FOLDER`"


@dataclass(frozen=True)
class LocalModel:
    """Where a model and its tokenizer lie on this disk, and which commit they are."""

    id: str
    revision: str | None
    folder: str
    tokenizer_folder: str
    trust_remote_code: bool

    def write(self, run_folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (run_folder / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, run_folder: Path) -> LocalModel:
        return cls(**json.loads((run_folder / FILE_NAME).read_text(encoding="utf-8")))


def open_reference(reference: str) -> tuple[ModelSource, ModelLayout]:
    """Returns config, tensor table and layout of what MODEL names.

    Raises InputError or HubError when it cannot be read, LayoutError when it cannot be trained.
    """
    try:
        source = resolve(reference)
    except HubError as error:
        raise HubError(
            f"{error.message}; there is no folder `{reference}` either",
            hint="give the path of a local copy: `epctl train ./FOLDER`"
            + (f"; {error.hint}" if error.hint else ""),
        ) from None
    layout = detect(source)
    require_trainable(layout)
    return source, layout


def require_trainable(layout: ModelLayout) -> None:
    """Raises LayoutError, with what to do instead, unless epctl can train this layout."""
    moe = layout.moe
    quantization = moe.storage.quantization if moe is not None else None
    if quantization is not None or layout.dtype.startswith("F8"):
        raise LayoutError(
            f"`{layout.id}` is stored quantised ({quantization or layout.dtype}); "
            "training needs bfloat16 or float32 weights",
            hint=dequantize_hint(layout.id),
        )
    if moe is None and layout.vision is None:
        raise LayoutError(
            f"`{layout.id}` (model_type `{layout.model_type}`) has no routed experts; `epctl "
            "train` trains Mixture-of-Experts and vision-language models",
            hint=f"`epctl inspect {layout.id}` shows what is known of it",
        )
    layout.require_trainable()
    if layout.vision is not None:
        _require_known_images(layout, layout.vision)


def _require_known_images(layout: ModelLayout, vision: VisionLayout) -> None:
    """Raises LayoutError unless images enter the model in the way that is trained."""
    tower = vision.tower_prefix or "(top)"
    if layout.decoder is None:
        raise LayoutError(
            f"`{layout.id}` is a vision tower (`{tower}`) without a decoder; `epctl train` trains "
            "on text that is said of images",
            hint="train a vision-language model that holds such a tower",
        )
    refused = [entry.reason for entry in layout.sequence_parallel if not entry.legal]
    if refused:
        raise LayoutError(
            f"`{layout.id}` (model_type `{layout.model_type}`) is not trained on images: "
            f"{refused[0]}",
            hint=f"`epctl inspect {layout.id}` shows what is known of it",
        )
    if vision.image_token_id is None:
        raise LayoutError(
            f"`{layout.id}` (model_type `{layout.model_type}`): its config states no token that "
            "stands for images, so their places in a text are not known",
            hint="a copy in the transformers form (`-hf`) states `image_token_id`",
        )


def dequantize_hint(model_id: str) -> str:
    """Returns the commands that make a trainable copy of a quantised checkpoint."""
    return f"make a bfloat16 copy first: `epctl export {model_id} -o FOLDER --dtype bf16`"


def fetch(source: ModelSource, model: ModelSection) -> LocalModel:
    """Returns the model on this disk, downloading a hub model and its tokenizer first.

    Raises HubError without a network, InputError if the tokenizer is not usable as asked.
    """
    if model.trust_remote_code:
        _require_pinned(model)
    folder = source.folder or _download(source.id, source.revision, source.kind, model)
    tokenizer = folder if model.tokenizer is None else _tokenizer_folder(model)
    check_tokenizer(tokenizer, model)
    if "vision_config" in source.config:
        require_processor(Path(folder))
    return LocalModel(
        source.id, source.revision, str(folder), str(tokenizer), model.trust_remote_code
    )


def require_processor(folder: Path) -> None:
    """Raises InputError unless `folder` has an image processor and Pillow is there to open images.

    Asked for the folder of a vision-language model, before anything starts and by the ranks.
    """
    if importlib.util.find_spec("PIL") is None:
        raise InputError(
            "training on images needs the package `pillow`, not installed here",
            hint="`pip install 'epctl[train]'`",
        )
    if not any((folder / name).is_file() for name in PROCESSOR_FILES[:2]):
        raise InputError(
            f"`{folder}` holds a vision-language model and no image processor (neither "
            f"{PROCESSOR_FILES[1]} nor {PROCESSOR_FILES[0]})",
            hint="copy the file from the model's page into the folder",
        )


def _download(
    model_id: str, revision: str | None, kind: str, model: ModelSection, *, weights: bool = True
) -> Path:
    if kind == "catalog":
        raise HubError(
            f"the weights of `{model_id}` are not on this disk and the hub cannot be reached; "
            "only the bundled catalog knows the model",
            hint=LOCAL_COPY,
        )
    patterns = list(WEIGHT_FILES if weights else TOKENIZER_FILES)
    patterns += CODE_FILES if model.trust_remote_code else []
    return download(model_id, revision, patterns, hint=LOCAL_COPY)


def _tokenizer_folder(model: ModelSection) -> Path:
    assert model.tokenizer is not None
    path = Path(model.tokenizer).expanduser()
    if path.is_dir():
        return path
    model_id, revision = parse_reference(model.tokenizer)
    return _download(model_id, revision, "hub", model, weights=False)


def _require_pinned(model: ModelSection) -> None:
    """A moving branch plus remote code runs whatever somebody pushes next."""
    for reference in (model.tokenizer, model.reference):
        if reference is None or Path(reference).expanduser().is_dir():
            continue
        _, revision = parse_reference(reference)
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ConfigError(
                f"`--trust-remote-code` needs a pinned revision, `{reference}` names none",
                hint=f"write `{reference.partition('@')[0]}@COMMIT` with the 40 hex digits of the "
                "commit that you have read",
            )


def check_tokenizer(folder: Path, model: ModelSection) -> None:
    """Raises InputError if `folder` has no tokenizer, or one that only its own code can read."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in known):
        raise InputError(
            f"`{folder}` holds no tokenizer (none of {', '.join(known)})",
            hint="give one with `--tokenizer PATH|ID`",
        )
    config_path = folder / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    except ValueError as error:
        raise InputError(f"`{config_path}` is not JSON: {error}") from None
    needs_code = "auto_map" in config and not (folder / "tokenizer.json").is_file()
    if needs_code and not model.trust_remote_code:
        raise InputError(
            f"the tokenizer in `{folder}` is Python code of the repository, which epctl does not "
            "run unasked",
            hint="read the code, then pass `--trust-remote-code` with a pinned revision "
            "(`org/name@COMMIT`); or give another tokenizer with `--tokenizer PATH|ID`",
        )
