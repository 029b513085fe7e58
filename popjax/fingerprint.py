"""What tells one model from another, so that what was made with one is not used with the other."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np

from popjax.config import ModelConfig, to_json
from popjax.sparsity import Params

# Rows of a matrix that are read: enough to tell weights apart, few enough to read at every use.
_ROWS = 8


def fingerprint(params: Params, config: ModelConfig) -> str:
    """A digest of the config, and of all vectors and the first rows of all matrices in float32.

    Of experts the first row of each matrix. Weights that were trained further differ in it; the
    same weights in another dtype may too. How matrices are kept does not matter, nor gates and
    scouts that were added.
    """
    digest = hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "kv_gate" in name or "'scout_" in name:
            continue
        digest.update(name.encode())
        if "'moe'" in name and leaf.ndim == 3:
            # The first experts whole would be gigabytes, and say nothing of the others.
            rows = leaf[:, 0]
        else:
            rows = leaf[:_ROWS] if leaf.ndim > 1 else leaf
        digest.update(np.asarray(rows.astype(np.float32)).tobytes())
    return digest.hexdigest()[:32]
