"""The converter: what it makes, and every mismatch it must refuse before reading anything."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints import CheckpointError, Row, TensorInfo, convert

ROWS = (
    Row("embed.weight", "embed/table", "same"),
    Row("layers.{i}.q.weight", "layer_{i}/attn/q", "split"),
    Row("layers.{i}.down.weight", "layer_{i}/mlp/down", "transpose"),
)
N, H, D, F, V = 2, 3, 4, 5, 7


class Memory:
    """A source over arrays that counts what is read."""

    location = "memory"

    def __init__(self, arrays, dtypes=None):
        self.arrays, self.dtypes, self.reads = arrays, dtypes or {}, []

    def names(self):
        return tuple(self.arrays)

    def info(self, name):
        return TensorInfo(self.arrays[name].shape, self.dtypes.get(name, "F32"))

    def read(self, name):
        self.reads.append(name)
        return self.arrays[name].copy()


def arrays(layers=2):
    rng = np.random.default_rng(1)
    made = {"embed.weight": rng.standard_normal((V, D), np.float32)}
    for i in range(layers):
        made[f"layers.{i}.q.weight"] = rng.standard_normal((N * H, D), np.float32)
        made[f"layers.{i}.down.weight"] = rng.standard_normal((D, F), np.float32)
    return made


def expected(layers=2):
    shapes = {"embed/table": TensorInfo((V, D), "F32")}
    for i in range(layers):
        shapes[f"layer_{i}/attn/q"] = TensorInfo((N, H, D), "F32")
        shapes[f"layer_{i}/mlp/down"] = TensorInfo((F, D), "F32")
    return shapes


def run(source, **options):
    return convert(source, ROWS, expected(), **{"dtype": jnp.float32, **options})


def refused(made, match, **options):
    source = Memory(made, options.pop("dtypes", None))
    with pytest.raises(CheckpointError, match=match):
        run(source, **options)
    assert source.reads == [], "nothing may be read before the layout is known to fit"


def test_tree():
    made = arrays()
    tree = run(Memory(made))
    assert list(tree) == ["embed", "layer_0", "layer_1"]
    assert isinstance(tree["embed"]["table"], jax.Array)
    np.testing.assert_array_equal(tree["embed"]["table"], made["embed.weight"])
    for i in range(2):
        layer = tree[f"layer_{i}"]
        q, down = made[f"layers.{i}.q.weight"], made[f"layers.{i}.down.weight"]
        np.testing.assert_array_equal(layer["attn"]["q"], q.reshape(N, H, D))
        np.testing.assert_array_equal(layer["mlp"]["down"], down.T)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.float16, "float32"])
def test_dtype(dtype):
    made = arrays()
    tree = run(Memory(made), dtype=dtype)
    table = tree["embed"]["table"]
    assert table.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(table, made["embed.weight"].astype(jnp.dtype(dtype)))


def test_half_source_widens_exactly():
    made = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays().items()}
    tree = run(Memory(made))
    np.testing.assert_array_equal(tree["embed"]["table"], made["embed.weight"].astype(np.float32))


def test_shapes_may_come_from_anything_with_a_shape():
    shapes = {path: jax.ShapeDtypeStruct(i.shape, jnp.float32) for path, i in expected().items()}
    assert (
        convert(Memory(arrays()), ROWS, shapes, dtype="float32")["layer_1"]["attn"]["q"].ndim == 3
    )


def test_place_gets_paths_and_contiguous_arrays():
    seen = {}

    def place(path, array):
        assert array.flags.c_contiguous and array.dtype == np.float32
        seen[path] = array.shape
        return jnp.asarray(array)

    run(Memory(arrays()), place=place)
    assert seen == {path: info.shape for path, info in expected().items()}


def test_place_on_a_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))

    def place(path, array):
        return jax.device_put(array, sharding) if path.endswith("attn/q") else jnp.asarray(array)

    tree = run(Memory(arrays()), place=place)
    assert tree["layer_0"]["attn"]["q"].sharding == sharding


def test_unexpected_tensors_are_listed_with_their_count():
    made = arrays() | {f"extra.{i}": np.ones(1, np.float32) for i in range(7)}
    refused(made, "no place for 7 tensors: extra.0, extra.1, .*, extra.4 and 2 more$")


def test_matched_but_unexpected_tensor():
    refused(arrays(layers=3), "no place for 2 tensors: layers.2.q.weight, layers.2.down.weight")


def test_ignored_tensors():
    made = arrays() | {f"layers.{i}.inv_freq": np.ones(1, np.float32) for i in range(2)}
    source = Memory(made)
    run(source, ignore=("layers.{i}.inv_freq",))
    assert not any("inv_freq" in name for name in source.reads)
    refused(made, "no place for 2 tensors: layers.0.inv_freq", ignore=("layers.{i}.inv",))


def test_absent_tensor():
    made = arrays()
    del made["layers.1.q.weight"], made["embed.weight"]
    refused(made, "lacks 2 tensors: embed.weight -> embed/table, layers.1.q.weight -> layer_1/a")


def test_absent_tensor_without_a_row():
    with pytest.raises(CheckpointError, match="lacks 1 tensor: no row -> norm/scale"):
        shapes = {**expected(), "norm/scale": TensorInfo((D,), "F32")}
        convert(Memory(arrays()), ROWS, shapes, dtype="float32")


def test_two_rows_match():
    rows = (*ROWS, Row("layers.{x}.q.weight", "other_{x}", "same"))
    with pytest.raises(CheckpointError, match=r"two rows match 2 tensors: layers.0.q.weight \("):
        convert(Memory(arrays()), rows, expected(), dtype="float32")


def test_target_set_twice():
    rows = (*ROWS, Row("wte.weight", "embed/table", "same"))
    made = arrays() | {"wte.weight": np.ones((V, D), np.float32)}
    match = "two tensors set the parameter of 2 tensors: embed.weight -> embed/table, wte.weight ->"
    with pytest.raises(CheckpointError, match=match):
        convert(Memory(made), rows, expected(), dtype="float32")


def test_wrong_shapes():
    made = arrays()
    made["layers.0.q.weight"] = np.ones((N * H, D + 1), np.float32)
    made["embed.weight"] = np.ones((D, V), np.float32)
    match = (
        r"shape is wrong in 2 tensors: embed.weight \(found \(4, 7\), expected \(7, 4\)\), "
        r"layers.0.q.weight \(found \(6, 5\), expected \(6, 4\)\)"
    )
    refused(made, match)


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "F8_E4M3", "IQ2_XXS"])
def test_wrong_type(dtype):
    refused(arrays(), rf"in 1 tensor: embed.weight \({dtype}\)", dtypes={"embed.weight": dtype})


def test_every_kind_of_mismatch_is_in_one_message():
    made = arrays() | {"extra": np.ones(1, np.float32)}
    del made["embed.weight"]
    made["layers.0.q.weight"] = np.ones(3, np.float32)
    refused(made, "memory does not fit this model: .*no place for 1.*lacks 1.*wrong in 1")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights(value):
    made = arrays()
    made["layers.0.q.weight"][1, 2] = made["layers.1.down.weight"][0, :2] = value
    match = (
        r"NaN or infinities in 2 tensors: layers.0.q.weight \(1 of 24 values\), "
        r"layers.1.down.weight \(2 of 20 values\)"
    )
    with pytest.raises(CheckpointError, match=match):
        run(Memory(made), check_tensors=True)
    run(Memory(made), check_tensors=False)


def test_finite_weights_pass_the_check():
    run(Memory(arrays()), check_tensors=True, dtype="bfloat16")


def test_overflow_is_refused():
    made = arrays()
    made["embed.weight"][0, 0] = 1e6
    match = "'embed.weight' has values beyond the range of float16: load it as bfloat16 or float32"
    with pytest.raises(CheckpointError, match=match):
        run(Memory(made), dtype="float16")


def test_dtype_must_be_a_float():
    with pytest.raises(ValueError, match="must be a float type, got int32"):
        run(Memory(arrays()), dtype="int32")


def test_row_matches_whole_names_and_plain_numbers():
    row = ROWS[1]
    assert row.to_targets("layers.12.q.weight") == ("layer_12/attn/q",)
    assert row.to_source("layer_12/attn/q") == "layers.12.q.weight"
    wrong = ["layers.01.q.weight", "layers.-1.q.weight", "layers.x.q.weight", "layersX1.q.weight"]
    for name in [*wrong, "xlayers.1.q.weight", "layers.1.q.weight2"]:
        assert row.to_targets(name) is None


def test_row_with_two_placeholders():
    row = Row("layers.{i}.experts.{e}.up", "layer_{i}/expert_{e}/up", "same")
    assert row.to_targets("layers.3.experts.11.up") == ("layer_3/expert_11/up",)
    assert row.to_source("layer_3/expert_11/up") == "layers.3.experts.11.up"


def test_bad_rows():
    with pytest.raises(ValueError, match="unknown transform 'rotate': use one of \\['same'"):
        Row("a", "b", "rotate")
    with pytest.raises(ValueError, match="must have the same placeholders"):
        Row("a.{i}", "b", "same")
