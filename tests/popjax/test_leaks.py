"""A long decode gives back all it took: memory in use before and after, in one process."""

import ctypes
import gc

import pytest

import popjax

TOKENS = 2000
# A run keeps 10 to 80 kB whatever its length (strings, jax's own tables). One leaked activation of
# a layer (576 floats) a token would be 4.6 MB.
SLACK = 2**19
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def in_use() -> int:
    """Bytes that malloc has given out; resident memory also counts what it holds back."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.slow
@pytest.mark.weights
def test_a_decode_of_2000_tokens_keeps_no_memory() -> None:
    model = popjax.load(dtype="bfloat16")
    method = popjax.OnlinePruning(ratio=0.5)

    def decode() -> int:
        asked = {"max_new_tokens": TOKENS, "eos_token_id": [], "implementation": "native"}
        result = model.generate("The sky is", method=method, **asked)
        assert result.report.new_tokens == TOKENS
        return in_use()

    before = decode()
    assert decode() - before < SLACK
