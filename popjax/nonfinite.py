"""Numbers of a run that are NaN or infinite: one error that names what is to blame for them."""

from __future__ import annotations

import jax.numpy as jnp

from popjax.sparsity import Params


def not_finite(what: str, params: Params | None) -> ValueError:
    """The error that `what` is not finite: by routers that are not themselves, or by a guess."""
    return ValueError(
        f"{what}: {_culprit(params or {})}; check the checkpoint (check_tensors=True) or load it "
        "in float32"
    )


def _culprit(params: Params) -> str:
    routers = {name: held["moe"]["router"] for name, held in params.items() if "moe" in held}
    bad = [name for name, router in routers.items() if not bool(jnp.all(jnp.isfinite(router)))]
    if bad:
        return f"the router of {', '.join(bad[:8])} has NaN or infinities"
    return "the weights or the dtype overflow"


__all__ = ["not_finite"]
