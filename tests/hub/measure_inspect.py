"""Times `epctl inspect` on 1,000 shards of 671 B parameters: from disk, and from a loopback hub.

    .venv/bin/python tests/hub/measure_inspect.py

The header set is DeepSeek-V3's published tensor table (90,427 tensors with fp8 scales) spread over
1,000 shards; the files are sparse, so only headers take space. The hub runs in its own process and
waits 20 ms before each answer. Each figure is a whole process, interpreter start included.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from loopback import LoopbackHub

from epctl.layout.catalog import catalog_source
from epctl.layout.safetensors import DTYPE_BITS

NUM_SHARDS, LATENCY, MODEL = 1000, 0.020, "org/deepseek-v3-headers"


class SparseShard:
    """A shard whose weights are zeros that are never stored: slices and a length, no more."""

    def __init__(self, tensors):
        header, offset = {}, 0
        for name, entry in tensors:
            size = math.prod(entry.shape) * DTYPE_BITS[entry.dtype] // 8
            header[name] = {
                "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, offset + size]
            }  # fmt: skip
            offset += size
        raw = json.dumps(header).encode()
        self.start = len(raw).to_bytes(8, "little") + raw
        self.size = len(self.start) + offset

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        first, last = part.start, min(part.stop, self.size)
        known = self.start[first:last]
        return known + bytes(max(0, last - first - len(known)))


def model_files():
    source = catalog_source("deepseek-ai/DeepSeek-V3")
    tensors = list(source.tensors.items())
    cuts = [number * len(tensors) // NUM_SHARDS for number in range(NUM_SHARDS + 1)]
    files, weight_map = {"config.json": json.dumps(source.config).encode()}, {}
    for number in range(NUM_SHARDS):
        name = f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        held = tensors[cuts[number] : cuts[number + 1]]
        files[name] = SparseShard(held)
        weight_map |= dict.fromkeys((tensor for tensor, _ in held), name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


def serve():
    with LoopbackHub(latency=LATENCY) as hub:
        hub.add(MODEL, model_files())
        sys.stdout.write(hub.address + "\n")
        sys.stdout.flush()
        sys.stdin.read()
        sys.stderr.write(
            f"{sum(hub.sent.values())} bytes in {sum(hub.requests.values())} requests\n"
        )


def write_folder(folder):
    for name, data in model_files().items():
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            with (folder / name).open("wb") as file:
                file.write(data.start)
                file.truncate(len(data))


def timed(reference, environment):
    program = [sys.executable, "-m", "epctl", "inspect", reference, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    result = subprocess.run(program, capture_output=True, env=environment, check=True)
    elapsed = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    document = json.loads(result.stdout)
    assert document["model"]["num_tensors"] == 90_427
    return elapsed, processor


def report(title, runs):
    times, processor = zip(*runs, strict=True)
    spread = f"median {statistics.median(times):.2f} s, min {min(times):.2f}, max {max(times):.2f}"
    cpu = f"processor time {statistics.median(processor):.2f} s"
    load = f"load average {os.getloadavg()[0]:.1f}"
    sys.stdout.write(f"{title}: {spread} ({len(times)} runs), {cpu}, {load}\n")


def main():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        timed(folder, environment)
        report("disk, warm", [timed(folder, environment) for _ in range(5)])
    with tempfile.TemporaryDirectory() as home:
        hub = subprocess.Popen(
            [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        address = hub.stdout.readline().strip()
        environment |= {"HF_ENDPOINT": address, "HF_HOME": home}
        report("loopback hub, 20 ms", [timed(MODEL, environment) for _ in range(3)])
        hub.communicate()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
