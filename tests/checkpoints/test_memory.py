"""Converting streams: the peak is the weights plus one tensor, measured in a process of its own.

Reads /proc, so it needs Linux.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MIB = 2**20
COUNT, ROW = 50, 1024
TENSOR_BYTES = ROW * ROW * 4  # 4 MiB, 200 MiB in all
# jax's own growth while arrays are made: measured 1 to 2 MiB.
SLACK = 4 * MIB

CHILD = """
import json, resource, sys, threading
import jax, jax.numpy as jnp
from checkpoints import Row, TensorInfo, convert, open_folder

folder, count, row, transform, dtype = json.loads(sys.argv[1])
rows = (Row("w.{i}", "w_{i}", transform),)
shapes = {f"w_{i}": TensorInfo((row, row), "F32") for i in range(count)}
source = open_folder(folder)
jax.block_until_ready(jnp.zeros(8))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

# The peak since a moment: the kernel's high-water mark starts anew when 5 is written here.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident()
tree = convert(source, rows, shapes, dtype=dtype, check_tensors=True)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({"growth": peak - before, "weights": sum(a.nbytes for a in tree.values())}))
"""


def write_checkpoint(folder: Path) -> None:
    """A file of `COUNT` float32 tensors, without holding them all."""
    header = {
        f"w.{i}": {
            "dtype": "F32",
            "shape": [ROW, ROW],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(COUNT)
    }
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for i in range(COUNT):
            file.write(np.full((ROW, ROW), i, np.float32).tobytes())


@pytest.mark.parametrize(
    ("transform", "dtype"), [("same", "float32"), ("transpose", "float32"), ("same", "bfloat16")]
)
def test_peak_is_weights_plus_one_tensor(tmp_path, transform, dtype):
    write_checkpoint(tmp_path)
    arguments = json.dumps([str(tmp_path), COUNT, ROW, transform, dtype])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["weights"] == COUNT * ROW * ROW * (2 if dtype == "bfloat16" else 4)
    assert result["growth"] <= result["weights"] + TENSOR_BYTES + SLACK, result
    assert result["growth"] >= 0.9 * result["weights"], "the measurement itself"
