"""Resident memory stays under one fusion unit + 256 MiB for a model larger than that."""

import json
import subprocess
import sys

import pytest
from stored_models import WIDTH

from epctl.bench.synthetic import Shape, config_of, layer_tensors

# Files with holes: they read as zeros and take no disk.
CHILD = """
import sys
from epctl.cli import app
try: app(sys.argv[1:])
except SystemExit as end: code = end.code
from epctl.bench.measure import peak_resident_bytes
print(peak_resident_bytes(), file=sys.stderr)
sys.exit(code)
"""


def write_sparse(folder, shape, expert_dtype):
    """Writes a folder of one file whose experts have `expert_dtype`; returns its bytes."""
    folder.mkdir()
    entries = {}
    for layer in range(shape.num_layers):
        for name, sizes in layer_tensors(shape, layer).items():
            quantised = ".experts." in name and expert_dtype == "F8_E4M3"
            entries[name] = (expert_dtype if ".experts." in name else "BF16", sizes)
            if quantised:
                grid = tuple(-(-side // 128) for side in sizes)
                entries[f"{name}_scale_inv"] = ("F32", grid)
    header, position = {}, 0
    for name, (dtype, sizes) in sorted(entries.items(), key=lambda entry: -WIDTH[entry[1][0]]):
        end = position + WIDTH[dtype] * sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return position


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("BF16", []), ("F8_E4M3", ["--dtype", "bf16", "--storage", "fused"])],
    ids=["copied", "dequantised-and-fused"],
)
def test_peak_memory_is_bounded_for_a_larger_model(dtype, options, tmp_path):
    shape = Shape(num_layers=3, expert_width=352)
    size = write_sparse(tmp_path / "model", shape, dtype)
    bound = shape.fusion_unit_bytes + 256 * 2**20
    assert size * (2 if options else 1) > 1.5 * bound
    result = subprocess.run(
        [sys.executable, "-c", CHILD, "convert", "shard", str(tmp_path / "model"), "--ep", "2",
         "-o", str(tmp_path / "s"), "--quiet", *options],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stderr.split()[-1]) < bound
