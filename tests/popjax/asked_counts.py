"""The counts that each method's contract asks of F channels at ratio 0.5, from its definition."""

from popjax.methods import GateFirst, Method, OnlinePruning, RescoreAll, Scout
from popjax.sparsity import ChannelBudget, channel_budget


def asked_of(method: Method, mlp_dim: int) -> ChannelBudget:
    if isinstance(method, OnlinePruning):
        return channel_budget(mlp_dim, 0.5, 0.15)
    if isinstance(method, RescoreAll):
        return ChannelBudget(0, mlp_dim, mlp_dim // 2)
    if isinstance(method, Scout) and method.copied < 1:
        # Online pruning reads 112 rows of 48 channels and 94 of 40; of these 96 are gate and up of
        # the first layer, 32.5 copies in the second, 2 of an exact channel: 75.5 of 88 are left.
        return ChannelBudget(0, mlp_dim, int(75.5 / 88 * mlp_dim))
    if isinstance(method, GateFirst | Scout):
        # The rows that online pruning reads with its default band.
        online = channel_budget(mlp_dim, 0.5, 0.05)
        rows = 2 * online.evaluated + online.active
        if isinstance(method, GateFirst):
            gates = rows * 9 // 16
            return ChannelBudget(0, gates, rows - gates - (rows - gates) * 9 // 14)
        # Of which two copies of four bits, and a scale of sixteen for 32 of them, take a part.
        return ChannelBudget(0, mlp_dim, int((rows - 2 * mlp_dim * 4.5 / 16) * 3 / 4))
    return channel_budget(mlp_dim, 0.5)
