"""Which form of the decode step a run uses, settled before anything is compiled.

What there is to choose from, and by what costs, is `kernels_pallas.choice`; this adds what a
request and the placement of its weights allow.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from kernels_pallas.choice import implementation_for
from kernels_pallas.masked_mlp import PALLAS
from kernels_pallas.row_products.tpu import LANES, tile_rows
from popjax.request import Request
from popjax.scouts import without_scouts
from popjax.sparsity import Params


def chosen_implementation(request: Request, params: Params, mesh: Mesh | None) -> str:
    """What decode steps run on; ValueError where that cannot serve the request."""
    # The kernels of accelerators serve FFNs that are not experts.
    layers = (held for name, held in params.items() if name.startswith("layer_"))
    ffns = (held.get("mlp", held.get("shared")) for held in layers)
    matrix = next((ffn["down"] for ffn in ffns if ffn is not None), None)
    asked, vectors = request.options.implementation, len(request.prompts)
    # What serves the weights serves their scouts.
    found = implementation_for(asked, without_scouts(params), matrix, vectors)
    if request.options.pack:
        return found
    obstacle = _index_obstacle(found, matrix, mesh)
    if obstacle is not None:
        raise ValueError(f"pack=False fetches rows by index, {obstacle}")
    return found


def _index_obstacle(implementation: str, matrix: jax.Array | None, mesh: Mesh | None) -> str | None:
    """Why decode steps cannot fetch rows of w [F, D] or tiles by index, and what to do instead."""
    if mesh is not None:
        return f"which needs one device, and the weights lie on {mesh.size}: leave pack=True"
    if implementation not in PALLAS:
        return (
            f"which only the kernels of an accelerator do, and decode steps run on "
            f"{implementation!r} here: leave pack=True"
        )
    if implementation == "pallas_gpu" or matrix is None or matrix.ndim == 3:
        return None
    whole = LANES * tile_rows(matrix.dtype)
    if matrix.shape[1] % whole:
        return (
            f"which {implementation!r} does of rows of a multiple of {whole} weights in "
            f"{matrix.dtype}, and these have {matrix.shape[1]}: leave pack=True"
        )
    return (
        f"which {implementation!r} does of matrices kept as tiles, and these are {matrix.shape}: "
        "load the model with tiles=True, or leave pack=True"
    )
