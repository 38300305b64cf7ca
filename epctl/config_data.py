"""The settings of the model and of the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from epctl.config_checkpoint import Section


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


# One path may be written without brackets.
Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else _as_tuple(value)),
]


class ModelSection(Section):
    reference: str | None = Field(
        None, description="folder or hub id `org/name@revision`; default: the embedded small model"
    )
    tokenizer: str | None = Field(
        None, description="folder or hub id of the tokenizer; default: the model's own"
    )
    trust_remote_code: bool = Field(
        False, description="run the repository's tokenizer code; needs a pinned revision"
    )


class DataSection(Section):
    train: Paths = Field(
        (),
        description="files, folders, globs, or one hub dataset `org/name[:config][@revision]`; "
        "default: local Python sources",
    )
    eval: Paths = Field((), description="the same, held out; default: a share of `train`")
    format: Literal["auto", "text", "messages"] = Field(
        "auto", description="auto: messages if records have the key, else text"
    )
    text_key: str = Field("text", description="key of the text in jsonl and parquet records")
    messages_key: str = Field(
        "messages", description="key of the chat in jsonl and parquet records"
    )
    images_key: str = Field("images", description="key of a chat's images")
    videos_key: str = Field("videos", description="key of a chat's videos")
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="pixels of an image; larger ones are scaled down; default: the model's",
    )
    max_frame_pixels: int = Field(
        602_112, ge=1, description="the same for a frame of a video (768 tokens of 28 x 28 pixels)"
    )
    video_fps: float = Field(2.0, gt=0, description="frames taken of a second of a video file")
    max_frames: int = Field(64, ge=1, description="frames of a video; more are thinned out")
    split: str = Field("train", description="split of a hub dataset")
    eval_split: str = Field("validation", description="split of a hub dataset in `eval`")
    packing: bool = Field(True, description="several documents a sequence, attention kept apart")
    held_out_share: float = Field(
        0.02, gt=0, lt=0.5, description="share of documents held out when `eval` is not given"
    )
    shuffle: bool = Field(True, description="new order of sequences each epoch, from the seed")
    streaming: Literal["auto", "always", "never"] = Field(
        "auto", description="read a hub dataset over the network; auto: above 1 GiB of files"
    )
    shuffle_window: int = Field(
        1024, ge=1, description="sequences of a stream that are shuffled together"
    )
