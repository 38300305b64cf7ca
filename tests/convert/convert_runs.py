"""Conversions as the command line runs them, without its parsing."""

from epctl.convert import command
from epctl.convert.jobs import ShardOptions, plan_folder, plan_reshard, plan_shard_folder
from epctl.convert.open import open_checkpoint, open_shards


def shard(source, output, ep, *, max_file_bytes=4 * 2**30, **options):
    view = open_checkpoint(str(source))
    plan = plan_shard_folder(view, ShardOptions(ep, **options), max_file_bytes)
    return command.write("shard", view, plan, output)[0]


def merge(source, output):
    view = open_shards(str(source))
    return command.write("merge", view, plan_folder(view, "origin", "keep"), output)[0]


def reshard(source, output, ep):
    view = open_shards(str(source))
    return command.write("reshard", view, plan_reshard(view, ep), output)[0]


def export(source, output, storage="origin", dtype="keep"):
    view = open_checkpoint(str(source))
    return command.write("export", view, plan_folder(view, storage, dtype), output)[0]
