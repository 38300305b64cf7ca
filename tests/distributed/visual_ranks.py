"""Ranks that train tiny vision-language models on chats: every layout against a plain loop.

`python -m visual_ranks FOLDER CASES_JSON`; a case names model, layout and optimizer. The plain loop
is transformers' own model on one document at a time: no packing, its own positions, attention and
images. Rank K writes `rank-K.json`.
"""

from __future__ import annotations

import datetime
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tile_models
import torch
import torch.distributed as dist
from train_model_ranks import CPU
from visual_models import IMAGE_ID, VIDEO_ID

from epctl.config import RunConfig, resolve_config
from epctl.launch.model_reference import PROCESSOR_FILES
from epctl.layout.source import read_folder
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.check_reference import _whole_partition
from epctl.runtime.checkpoint import save_model
from epctl.runtime.checkpoint_save import Checkpointer
from epctl.runtime.data_prepare import load_data
from epctl.runtime.engine import create_engine, create_optimizer, train_step
from epctl.runtime.events import EventLog
from epctl.runtime.leave import leave
from epctl.runtime.names import hub_tensors
from epctl.runtime.resume import restore
from epctl.runtime.sequence.vision import PIXELS
from epctl.runtime.train import build
from epctl.runtime.train_loop import TrainLoop
from epctl.runtime.training_model import TrainingModel, load_tokenizer, open_checkpoint
from epctl.runtime.visual_packed import PackedProcessor
from epctl.runtime.visual_rows import VisualData, VisualReader, visuals_of

STEPS = 2
ROWS = 4  # of a step, however they are dealt out


def config_of(case: dict[str, Any], chats: str) -> RunConfig:
    sp = case.get("sp", 1)
    flags = {
        "model.reference": "tiny",
        "data.train": (chats,),
        "data.held_out_share": 0.1,
        "parallel.ep": case.get("ep", 1),
        "parallel.sp": sp,
        "parallel.share_images": case.get("share_images", False),
        "parallel.zero": case["zero"],
        "optim.name": case["optim"],
        "optim.lr": 2e-3,
        "optim.warmup_steps": 0,
        "optim.schedule": "constant",
        "optim.gradient_clipping": 0.5,
        # Rounding of a gradient that is zero but for it must not become a whole step.
        "optim.eps": 1e-3,
        "train.steps": STEPS,
        "train.sequence_length": 157,
        "train.micro_batch_size": ROWS * sp // dist.get_world_size(),
        "train.activation_checkpointing": case.get("recompute", "none"),
    }
    return resolve_config(flags=flags).config


def open_model(folder: str) -> TrainingModel:
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    return open_checkpoint("tiny", Path(folder), tokenizer)


def documents_of(data: VisualData, step: int) -> list[tuple[torch.Tensor, torch.Tensor, list[Any]]]:
    """Returns (ids, labels, images) of every document of a step's rows."""
    found = []
    for position in range(step * ROWS, (step + 1) * ROWS):
        row = data.order.row_at(position)
        packed, place = data.train[row], 0
        for span in data.train.spans[row]:
            here = slice(place, place + span.num_tokens)
            place = here.stop
            ids, labels = (torch.from_numpy(x[here]) for x in (packed.ids_S, packed.labels_S))
            found.append((ids, labels, visuals_of(data.train.documents, span)))
    return found


def plain_inputs(
    case: dict[str, Any], data: VisualData, ids: torch.Tensor, visuals: list[Any]
) -> dict[str, Any]:
    """What transformers' model is given for one document, by its own processor."""
    reader, kind = data.reader, Path(case["model"]).name
    inputs: dict[str, Any] = {"input_ids": ids[None], "use_cache": False}
    images = [reader.files.open(v.files[0]) for v in visuals if v.modality == "image"]
    if kind in tile_models.KINDS and len(images) < len(visuals):
        return inputs | {"pixel_values": torch.cat(list(frames_and_tiles(reader, kind, visuals)))}
    if kind in tile_models.KINDS:
        return inputs | (tile_models.plain_images(kind, images) if images else {})
    assert isinstance(reader.processor, PackedProcessor)
    kinds = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    if images:
        inputs |= dict(reader.processor.image_processor(images=images, return_tensors="pt"))
    clips = [v for v in visuals if v.modality == "video"]
    if clips:
        pixels = [patches_of(reader.files.frames(v.files, v.frames)) for v in clips]
        inputs["pixel_values_videos"] = torch.cat(pixels)
        inputs["video_grid_thw"] = torch.tensor([v.grid for v in clips])
        inputs["second_per_grid_ts"] = torch.tensor([2 / v.fps for v in clips])
    if visuals:
        inputs["mm_token_type_ids"] = kinds[None]
    return inputs


def frames_and_tiles(reader: VisualReader, kind: str, visuals: list[Any]) -> Iterator[Any]:
    """InternVL's clips are images that are not cut, in the order of their tokens."""
    for visual in visuals:
        if visual.modality == "image":
            yield tile_models.plain_images(kind, [reader.files.open(visual.files[0])])[
                "pixel_values"
            ]
        else:
            frames = reader.files.frames(visual.files, visual.frames)
            found = tile_models.plain_images(kind, frames, crop_to_patches=False)
            assert len(found["pixel_values"]) == len(frames)
            yield found["pixel_values"]


def patches_of(frames: list[Any]) -> torch.Tensor:
    """Rows of a clip of frames that need no resizing, as the video processors lay them out."""
    import numpy as np
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    video = np.stack([np.asarray(f, dtype=np.float32) / 255 for f in frames])
    video = ((video - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD).transpose(0, 3, 1, 2)
    if len(video) % 2:
        video = np.concatenate([video, video[-1:]])
    t, c, h, w = video.shape
    cut = video.reshape(t // 2, 2, c, h // 8, 2, 4, w // 8, 2, 4)
    rows = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * 2 * 4 * 4)
    return torch.from_numpy(rows).float()


def freeze_unreached(case: dict[str, Any], data: VisualData, model: Any) -> None:
    """Leaves alone what a backward over text and images does not reach: LLaVA's last layer."""
    documents = [d for step in range(STEPS) for d in documents_of(data, step)]
    for ids, labels, visuals in documents:
        model(**plain_inputs(case, data, ids, visuals), labels=labels[None]).loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()


def plain_run(
    case: dict[str, Any], chats: str, data: VisualData, solo: Any
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Two steps of the whole model on one rank; returns losses, norms and weights."""
    from transformers import AutoModelForImageTextToText

    config = config_of(case, chats)
    model = AutoModelForImageTextToText.from_pretrained(case["model"], dtype=torch.float32)
    open_model(case["model"]).weights.note_names(model.train())
    freeze_unreached(case, data, model)
    optimizer = create_optimizer(model, config.optim)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer.wire([_whole_partition(p, solo) for p in trained], CPU)
    history = []
    for step in range(STEPS):
        documents = documents_of(data, step)
        targets = sum(int((labels[1:] != -100).sum()) for _, labels, _ in documents)
        optimizer.zero_grad()
        total = 0.0
        for ids, labels, visuals in documents:
            inputs = plain_inputs(case, data, ids, visuals)
            loss = model(**inputs, labels=labels[None], num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, config.optim.gradient_clipping / (norm + 1e-6)))
        optimizer.step()
        history.append((total, norm))
    return history, {t.name: t.local().detach().clone() for t in hub_tensors(model)}


class _Run:
    """An engine in the case's layout, its data and its loop."""

    def __init__(
        self, case: dict[str, Any], chats: str, folder: Path, weights_from: Path | None = None
    ) -> None:
        config = config_of(case, chats)
        self.config, self.folder = config, folder
        self.mesh = seams.create_mesh(config.parallel.ep, config.parallel.sp)
        self.model = open_model(str(weights_from or case["model"]))
        self.data = data_of(case, chats, folder.parent, self.mesh, self.model)
        events = EventLog(folder, self.mesh.rank)
        module, ds_config = build(config, self.mesh, self.model, CPU, events)
        self.engine, self.optimizer, self.scheduler = create_engine(module, config, ds_config)
        self.checkpointer = Checkpointer(
            folder, config, self.mesh, self.engine, self.optimizer, self.model, events
        )
        self.loop = TrainLoop(
            self.engine, self.scheduler, config, self.mesh, self.data, events,
            self.model.tokenizer, checkpointer=self.checkpointer,
        )  # fmt: skip

    def step(self, step: int, seen: list[list[bool]]) -> tuple[float, float]:
        batches = list(self.loop.batches(step))
        seen += [[name in batch.visuals for name in PIXELS.values()] for batch in batches]
        found = train_step(self.engine, self.scheduler, batches, self.config, self.mesh)
        self.loop.step = step + 1
        return found

    def resumed(self, case: dict[str, Any], chats: str) -> _Run:
        """Saves, forgets everything, and goes on in the layout of `case`."""
        saved = self.checkpointer.save(self.loop.progress())
        self.checkpointer.finish()
        self.engine.destroy()
        again = _Run(case, chats, self.folder, weights_from=saved / "model")
        progress, _ = restore(
            saved, again.config, again.mesh, again.engine, again.optimizer, again.scheduler
        )
        again.loop.begin_at(progress)
        return again


def layout_run(
    case: dict[str, Any], chats: str, folder: Path, expected: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The same steps in the case's layout; returns losses, norms and the worst weight."""
    run, seen = _Run(case, chats, folder), []
    history = [run.step(0, seen)]
    if "then" in case:
        run = run.resumed({**case, **case["then"]}, chats)
    history += [run.step(step, seen) for step in range(1, STEPS)]
    worst = (0.0, "")
    for name, local in weights_of(run.engine.module):
        reference = expected[name].double()
        worst = max(worst, (float((local.double() - reference).norm() / reference.norm()), name))
    videos = sum(
        v.modality == "video"
        for document in range(len(run.data.train.documents.lengths))
        for v in run.data.train.documents.visuals(document)  # type: ignore[attr-defined]
    )
    result = {"history": history, "seen": seen, "worst": worst, "videos": videos}
    if "then" in case:
        result["reload"] = reload(run, case)
    run.engine.destroy()
    return result


def weights_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in hub_tensors(module):
        parameters = [tensor.tensor] if isinstance(tensor.tensor, torch.nn.Parameter) else []
        with seams.full_parameters(parameters):
            yield tensor.name, tensor.local().detach()


def reload(run: _Run, case: dict[str, Any]) -> dict[str, Any]:
    """Saves, and says whether transformers loads the very weights under the hub's own names."""
    from transformers import AutoModelForImageTextToText

    folder = run.folder / "model"
    extras = lambda path: run.model.write_extras(path, torch.float32)  # noqa: E731
    save_model(run.engine.module, run.mesh, folder, extras)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    open_model(str(folder)).weights.note_names(loaded)
    known = {tensor.name: tensor.local().detach() for tensor in hub_tensors(loaded)}
    names = [set(read_folder(Path(path)).tensors) for path in (folder, Path(case["model"]))]
    present = [n for n in PROCESSOR_FILES if (Path(case["model"]) / n).is_file()]
    copied = [(folder / n).read_bytes() == (Path(case["model"]) / n).read_bytes() for n in present]
    return {
        "equal": all(torch.equal(known[n], local) for n, local in weights_of(run.engine.module)),
        "same_names": names[0] == names[1],
        "copied": copied,
    }


def data_of(
    case: dict[str, Any], chats: str, folder: Path, mesh: Any, model: TrainingModel
) -> VisualData:
    tokens = folder / f"tokens-{Path(case['model']).name}"
    data, facts = load_data(
        config_of(case, chats), tokens, mesh, model.tokenizer, model.vocab_size, model.visual
    )
    assert isinstance(data, VisualData), type(data)
    assert facts.images, facts
    assert facts.videos or not case.get("videos", True), facts
    return data


def main(folder: Path, common_chats: str, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=400))
    torch.set_num_threads(1)
    solo = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    plain: dict[tuple[str, str], Any] = {}
    results = {}
    for case in cases:
        key = (case["model"], case["optim"])
        chats = case.get("chats", common_chats)
        if key not in plain:
            mesh = seams.create_mesh(1, 1)
            data = data_of(case, chats, folder, mesh, open_model(case["model"]))
            plain[key] = plain_run(case, chats, data, solo)
        case_folder = folder / case["name"]
        case_folder.mkdir(exist_ok=True)
        found = layout_run(case, chats, case_folder, plain[key][1])
        results[case["name"]] = found | {"plain": plain[key][0]}
        gc.collect()
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    leave(0)
